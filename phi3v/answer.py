"""
Ask a model about images: one that was trained, an adapter, or the one to start from.

One question, whose answer alone goes to stdout:

    python -m phi3v.answer MODEL --image page.jpg "What is the total?"
    python -m phi3v.answer MODEL --image a.jpg b.jpg "Which one is older?"

A file of questions, to a file of answers in the same order. It may be interrupted at any time: the
same command goes on with what is missing.

    torchrun --nproc_per_node=8 -m phi3v.answer MODEL --file questions.jsonl \\
        --image_dir images --output answers.jsonl

    {"id": "7", "image": "a.jpg", "question": "What is it?"}            a line of questions.jsonl
    {"id": "7", "question": "What is it?", "answer": "A cat.", "model": "MODEL"}  of answers.jsonl

A question may have several "images". Conversations and records as training takes them are
questions as well: their last answer may be absent, and is never shown to the model.

A chat page in the browser, for this machine alone (on another one: ssh -L 7860:127.0.0.1:7860):

    python -m phi3v.answer MODEL --serve

MODEL is a hub id or a folder: the output folder of a recipe, its merged/, or an adapter's, whose
base is found by the name that the adapter has for it. Answers are greedy.
"""

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments

from .answer_file import answer_file
from .data.formats import UNANSWERED
from .data.images import load_images
from .data.records import check_record
from .distributed import rank, world_size
from .errors import RunError, explain_failures, phase, quoted
from .training.arguments import COUNT, HelpFormatter, RecipeParser, number
from .training.attention import choose_attention
from .training.generation import generate
from .training.hardware import gpu_problems
from .training.launch import TIMEOUT, init_after_restart, quieten
from .training.loading import load_processor, load_weights, model_folder, quantization_config

from peft import PeftConfig, PeftModel

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GRADIO = "gradio>=6"


class _Parser(argparse.ArgumentParser):
    error = RecipeParser.error


def get_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = _Parser(
        "python -m phi3v.answer",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # What the recipes' functions ask for besides.
    parser.set_defaults(max_length=None, pack_length=None, use_liger=False)
    parser.add_argument("model_name_or_path", metavar="MODEL", help="hub id or folder")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="to be answered on stdout")
    add = parser.add_argument
    add("--image", metavar="FILE", nargs="+", action="extend", help="that QUESTION is about")
    add("--file", metavar="FILE", help="questions, one JSON object per line, or a JSON list")
    add("--image_dir", metavar="DIR", help="that image paths are relative to (default: FILE's)")
    add("--output", metavar="FILE", help="where the answers to --file go")
    add(
        "--skip_bad_samples",
        action="store_true",
        help="go on without questions that are wrong or whose images cannot be read, and say which",
    )
    add("--serve", action="store_true", help="a chat page in the browser; needs gradio")
    add("--port", type=number(int, 1, 65535), default=7860, help="of the page, on 127.0.0.1")
    add("--base", metavar="MODEL", help="of an adapter, if it is elsewhere by now")
    add("--model_revision", metavar="REV", help="of a hub id: the branch, tag or commit")
    add("--max_new_tokens", type=COUNT, default=256, help="longest answer")
    add("--batch_size", type=COUNT, default=8, help="questions at a time, per GPU")
    add(
        "--num_crops",
        type=number(int, 1, 16),
        help="most HD crops an image is cut into (default: as trained)",
    )
    add("--load_in_4bit", dest="use_qlora", action="store_true", help="weights of 4 bits (NF4)")
    add(
        "--use_flash_attention",
        action="store_true",
        help="of the package flash-attn where it is installed, else PyTorch's own",
    )
    add("--no-tqdm", dest="tqdm", action="store_false", default=True, help="no progress bar")
    args = parser.parse_intermixed_args(argv)
    args.image = args.image or []
    if len(args.image) > 1 and args.question is None and not os.path.isfile(args.image[-1]):
        args.question = args.image.pop()  # --image takes every word that follows
    # MODEL as it is called in messages and answers; an adapter's base takes its place.
    args.model, args.bf16 = args.model_name_or_path.rstrip("/"), args.use_flash_attention
    if args.file and args.image_dir is None:
        args.image_dir = os.path.dirname(args.file) or "."
    if problem := next(_problems(args), None):
        parser.error(problem)
    return args


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if sum([args.question is not None, args.file is not None, args.serve]) != 1:
        yield "give one of QUESTION, --file and --serve."
    if args.image and args.question is None:
        yield "--image belongs to a QUESTION."
    for image in args.image:
        if not os.path.isfile(image):
            yield f"--image {quoted(image)} is no file. Check the path."
    if (args.file is None) != (args.output is None):
        yield "--file and --output belong together."
    if args.file and os.path.realpath(args.file) == os.path.realpath(args.output or ""):
        yield "--output is --file, which would be overwritten. Choose another name."
    if args.file and not os.path.isdir(args.image_dir):
        yield f"--image_dir {quoted(args.image_dir)} is no folder. Check the path."
    if not args.file and world_size() > 1:
        yield "several processes share a --file alone. Start it without torchrun."
    if args.serve and not importlib.util.find_spec("gradio"):
        yield f'--serve needs the package gradio: pip install "{GRADIO}"'
    if args.use_qlora and not importlib.util.find_spec("bitsandbytes"):
        yield "--load_in_4bit needs the package bitsandbytes: pip install bitsandbytes"
    yield from gpu_problems(args)


def main(argv: list[str] | None = None) -> None:
    args = get_arguments(argv)
    # No folder can be made in the null device, so a traceback goes to a temporary one.
    explain_failures(os.path.dirname(os.path.abspath(args.output)) if args.file else os.devnull)
    run = start(args)
    adapter = find_adapter(args)
    has_processor = adapter is not None and (adapter / "preprocessor_config.json").exists()
    with _naming(args, adapter):
        processor = load_processor(args, adapter if has_processor else None)

    def load() -> torch.nn.Module:
        return load_model(args, run, adapter)

    def ask(model: torch.nn.Module, questions: Sequence[dict], **options) -> list[str]:
        with _explained_memory():
            answers = generate(model, processor, questions, run, args.max_new_tokens, **options)
        return [text for text, _ in answers]

    if args.file:
        answer_file(args, run, processor, load, ask)
    elif args.serve:
        from .chat_page import serve

        model = load()
        serve(
            lambda turns, streamer: ask(model, [conversation(turns)], streamer=streamer)[0],
            *(processor.tokenizer, args.model, args.port),
        )
    else:
        turn = {"images": args.image, "user": args.question, "assistant": UNANSWERED}
        question = conversation([turn])
        load_images(question, processor.image_processor)  # an error comes before the model
        print(*ask(load(), [question]))


def start(args: argparse.Namespace) -> TrainingArguments:
    """The ranks meet. Returned is what `generate` asks for; nothing is trained."""
    on_gpu = torch.cuda.is_available()
    quieten(first=False, bars=args.tqdm and args.question is None and rank() == 0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `trainer_arguments` does
    with phase("starting the processes"):
        init_after_restart(on_gpu)
        return TrainingArguments(
            use_cpu=not on_gpu,
            per_device_eval_batch_size=args.batch_size,
            dataloader_num_workers=4 if on_gpu and args.file else 0,
            ddp_timeout=int(TIMEOUT.total_seconds()),
            disable_tqdm=True,
        )


def find_adapter(args: argparse.Namespace) -> Path | None:
    """The folder of the adapter that MODEL is, whose base then takes its place in `args`."""
    patterns = ["*.json", "*.jinja", "*.model", ADAPTER_WEIGHTS]
    with _naming(args, None):
        folder = model_folder(args.model_name_or_path, patterns, args.model_revision)
    if not (folder / ADAPTER).exists():
        return None
    with phase(f"MODEL {args.model}") as require:
        config = PeftConfig.from_pretrained(folder)
        # Others (.bin) can run code.
        require((folder / ADAPTER_WEIGHTS).is_file(), f"it holds no {ADAPTER_WEIGHTS}.")
        base = args.base or config.base_model_name_or_path
        require(base, "it does not name its base. Give it: --base MODEL")
    args.model_name_or_path = base
    args.model_revision = None if args.base or os.path.isdir(base) else config.revision
    return folder


def load_model(
    args: argparse.Namespace, run: TrainingArguments, adapter: Path | None
) -> torch.nn.Module:
    """The model, on the device. An adapter stays beside its base, as in the evaluations."""
    dtype = precision(run.device)
    bits = {"quantization_config": quantization_config(dtype)} if args.use_qlora else {}
    with _naming(args, adapter):
        model = load_weights(
            args.model_name_or_path,
            dtype=dtype,
            revision=args.model_revision,
            attn_implementation=choose_attention(args),
            device_map={"": run.device},
            **bits,
        )
    if adapter is None:
        return model
    with phase(f"MODEL {args.model}"):
        # In the precision of the base, as training computes with it.
        return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)


def precision(device: torch.device) -> torch.dtype:
    """What answers are computed in: bf16 on Ampere and newer."""
    if device.type != "cuda":
        return torch.float32
    is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if is_ampere else torch.float16


def conversation(turns: list[dict]) -> dict:
    """
    A record of turns, the last of which is to be answered.

    Raises:
        DataError: a text is not what it has to be.
    """
    return check_record({"id": "question", "conversations": turns})


@contextlib.contextmanager
def _naming(args: argparse.Namespace, adapter: Path | None) -> Iterator[None]:
    """Errors of a model name it as this command does, and not by the recipes' flags."""
    name = "MODEL" if adapter is None else f"the base of {args.model} (another one: --base):"
    try:
        yield
    except RunError as error:
        text = str(error).replace("--model_name_or_path", name)
        raise RunError(text.replace("--use_qlora", "--load_in_4bit")) from error.__cause__


@contextlib.contextmanager
def _explained_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU has no memory left. Lower --batch_size or --num_crops, or use --load_in_4bit "
            "or --use_flash_attention."
        ) from error


if __name__ == "__main__":
    main()
