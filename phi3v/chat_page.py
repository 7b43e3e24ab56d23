"""The chat page of `python -m phi3v.answer MODEL --serve`."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import: nothing is reported home

import gradio
from transformers import TextIteratorStreamer

from .data.formats import UNANSWERED
from .errors import explanation
from .model.processing_phi3_v import Phi3VProcessor

Answer = Callable[[list[dict], TextIteratorStreamer], list[str]]


class Stream(TextIteratorStreamer):
    """The answer as it grows; nobody may want the rest of it."""

    stopped = False

    def put(self, value) -> None:
        if self.stopped:
            raise StopAnswering
        super().put(value)


class StopAnswering(Exception):
    """Leaves `generate` at the next token."""


def serve(answer: Answer, processor: Phi3VProcessor, model: str, port: int) -> None:
    """
    Show the page on 127.0.0.1 until Ctrl-C.

    Args:
        answer: of the turns of a record, the answer to the last; its tokens go to the streamer.
    """
    page = chat_page(answer, processor, model)
    # Explicit, so that Gradio's environment variables cannot make it public.
    page.launch(server_name="127.0.0.1", server_port=port, share=False, footer_links=[])


def chat_page(answer: Answer, processor: Phi3VProcessor, model: str) -> gradio.ChatInterface:
    """The page, not yet served."""
    worker = ThreadPoolExecutor(1)  # one answer at a time

    def reply(message: dict, history: list[dict]) -> Iterator[str]:
        stream = Stream(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        future = worker.submit(answer, turns(message, history), stream)
        future.add_done_callback(lambda _: stream.end())  # also after an error
        text = ""
        try:
            for piece in stream:
                text += piece
                yield text
            yield future.result()[0]
        except Exception as error:
            raise gradio.Error(explanation(error) or repr(error), duration=None) from error
        finally:
            stream.stopped = True  # the Stop button, or a page that was closed

    return gradio.ChatInterface(
        reply,
        multimodal=True,
        title=model,
        textbox=gradio.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask something. Images: drop or paste them, or use the button.",
        ),
    )


def turns(message: dict, history: list[dict]) -> list[dict]:
    """
    The turns of a record. An image belongs to the question that it was sent with.

    Args:
        message: {"text", "files"}, what was just sent.
        history: messages {"role", "content"}, whose content is a list of parts.
    """
    found = []
    for entry in history:
        texts = [part["text"] for part in entry["content"] if part["type"] == "text"]
        files = [part["file"]["path"] for part in entry["content"] if part["type"] == "file"]
        if entry["role"] == "user":
            found.append({"images": files, "user": "\n".join(texts), "assistant": UNANSWERED})
        elif found and "".join(texts).strip():
            found[-1]["assistant"] = "\n".join(texts)
    last = {"images": message["files"], "user": message["text"], "assistant": UNANSWERED}
    return [*found, last]
