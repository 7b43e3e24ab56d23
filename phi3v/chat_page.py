"""The chat page of `python -m phi3v.answer MODEL --serve`."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import gradio
from transformers import TextIteratorStreamer

from .data.formats import UNANSWERED
from .errors import explanation, one_line, phase

HINT = "Ask something. Images: drop or paste them here, or use the button."
FAILED = "Not answered"


class Stream(TextIteratorStreamer):
    """The answer as it grows, as long as somebody reads it."""

    stopped = False

    def put(self, value) -> None:
        if self.stopped:
            raise InterruptedError("nobody reads this answer any more")
        super().put(value)


def serve(answer: Callable[[list[dict], Stream], str], tokenizer, title: str, port: int) -> None:
    """
    Show the page on 127.0.0.1 until Ctrl-C.

    Args:
        answer: the answer to the last of a record's turns; its tokens go to the stream.

    Raises:
        RunError: the port is taken.
    """
    page = chat_page(answer, tokenizer, title)
    with phase(f"--port {port}"):
        # All said here, so that no environment variable of Gradio's makes it public.
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    print(f"The chat page is on http://127.0.0.1:{port}. Ctrl-C ends it.", flush=True)
    page.block_thread()


def chat_page(
    answer: Callable[[list[dict], Stream], str], tokenizer, title: str
) -> gradio.ChatInterface:
    """The page, not yet served. Arguments as for `serve`."""
    worker = ThreadPoolExecutor(1)  # one answer at a time

    def reply(message: dict, history: list[dict]) -> Iterator[str | gradio.ChatMessage]:
        stream = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
        future = worker.submit(answer, to_turns(message, history), stream)
        future.add_done_callback(lambda _: stream.end())  # after an error too
        text = ""
        try:
            for piece in stream:
                text += piece
                yield text
            yield future.result()
        except Exception as error:
            # Gradio (6.31) leaves the text box locked after an exception.
            said = explanation(error) or one_line(error)
            yield gradio.ChatMessage(said, metadata={"title": FAILED})
        finally:
            stream.stopped = True  # by the Stop button, for example

    return gradio.ChatInterface(
        reply,
        multimodal=True,
        title=title,
        chatbot=gradio.Chatbot(buttons=["copy"], show_label=False),
        textbox=gradio.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder=HINT,
            show_label=False,
            stop_btn=True,
        ),
        analytics_enabled=False,
        api_visibility="private",
    )


def to_turns(message: dict, history: list[dict]) -> list[dict]:
    """
    The turns of a record, where images belong to the question that they were sent with. A question
    that failed, or was stopped at once, is none.

    Args:
        message: what was just sent, {"text", "files"}.
        history: messages, {"role", "content"}, whose content is a list of parts.
    """
    turns, question = [], {}
    for entry in history:
        text = "\n".join(part["text"] for part in entry["content"] if part["type"] == "text")
        failed = (entry.get("metadata") or {}).get("title") == FAILED
        if entry["role"] == "user":
            files = [part["file"]["path"] for part in entry["content"] if part["type"] == "file"]
            question = {"images": files, "user": text}
        elif text.strip() and not failed:
            turns.append({**question, "assistant": text})
    last = {"images": message["files"], "user": message["text"], "assistant": UNANSWERED}
    return [*turns, last]
