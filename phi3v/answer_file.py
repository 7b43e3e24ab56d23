"""
The file of questions of `python -m phi3v.answer`, to a file of answers in the same order.

Answers are appended to OUTPUT.part, which becomes OUTPUT at the end. So OUTPUT is whole where it
exists, and the same command goes on where it stopped.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainingArguments

from .data.formats import load_records
from .data.preparation import check_all_images
from .data.records import Records
from .distributed import on_first_rank, print_first, rank
from .errors import RunError, one_line, phase
from .model.processing_phi3_v import Phi3VProcessor

# So many batches a rank has answered when they are written: what an interruption costs at most.
# Similar lengths meet in batches among so many questions, see `generate`.
BATCHES_AT_A_TIME = 16


def answer_file(
    args: argparse.Namespace,
    run: TrainingArguments,
    processor: Phi3VProcessor,
    load: Callable[[], torch.nn.Module],
    ask: Callable[..., list[str]],
) -> None:
    """
    Answer --file into --output. The ranks share the work, and the first one writes.

    Args:
        load: the model, for which it is not asked where everything is answered.
        ask: the answers of that model to a sequence of records, on every rank; `bar` goes on.

    Raises:
        DataError: a question is wrong, or an image cannot be read.
        RunError: --output cannot be written, or is of other questions or another model.
    """
    questions = load_records(args.file, args.image_dir, questions=True)
    questions = check_all_images(questions.check(args.skip_bad_samples), processor, args)
    count, part = len(questions), Path(f"{args.output}.part")
    done = on_first_rank(lambda: _find_answers(Path(args.output), part, questions, args.model))
    if done is None:
        print_first(f"{args.output} is complete: {count:,} answers of {args.model}. It is kept.")
        return
    if done:
        print_first(f"{part} has {done:,} of {count:,} answers. Going on.")
    model = load() if done < count else None
    hidden = not args.tqdm or rank() != 0
    with tqdm(total=count, initial=done, unit="question", disable=hidden) as bar:
        while done < count:
            size = BATCHES_AT_A_TIME * run.world_size * run.per_device_eval_batch_size
            some = questions.select(range(done, min(done + size, count)))
            lines = map(_line, some, ask(model, some, bar=bar), [args.model] * len(some))
            if rank() == 0:
                with _writing(part), open(part, "a", encoding="utf-8", newline="\n") as file:
                    file.writelines(lines)
            done += len(some)
    if rank() == 0:
        with _writing(args.output):
            part.replace(args.output)
    print_first(f"{args.output} has {count:,} answers.")


def _find_answers(output: Path, part: Path, questions: Records, model: str) -> int | None:
    """
    How many questions, from the first on, are answered in `part`, where a half-written last line is
    cut off; None where all are in `output`.
    """
    path = output if output.exists() else part
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:  # it has to be writable, before the model is loaded
            file.seek(0)
            whole = file.read().rpartition(b"\n")
    lines = b"".join(whole[:2]).splitlines()
    with phase(f"--output: {path}") as require:
        fits = len(lines) == len(questions) if path == output else len(lines) <= len(questions)
        require(fits, f"{len(lines)} lines for {len(questions)} questions. Choose another file.")
    for number, (line, question) in enumerate(zip(lines, questions, strict=False), 1):
        with phase(f"--output: {path}, line {number}") as require:
            found, due = json.loads(line), json.loads(_line(question, "", model))
            for key in ("id", "question", "model"):
                same = found.get(key) == due[key]
                require(same, f"{key} is not {due[key]!r}. Choose another file, or delete it.")
    if path == output:
        return None
    with _writing(part):
        os.truncate(part, sum(map(len, whole[:2])))
    return len(lines)


def _line(question: dict, answer: str, model: str) -> str:
    """A line of --output."""
    content = {"id": question["id"], "question": question["conversations"][-1]["user"]}
    return json.dumps({**content, "answer": answer, "model": model}, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"--output: {path} cannot be written: {one_line(error)}. When that is solved, the same "
            "command goes on."
        ) from error
