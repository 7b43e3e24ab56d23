"""What an output folder tells about its run: evaluations, the log of the training, samples."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import RunError, phase
from .training.metrics import anls, metrics_of
from .training.output_folder import REPORT_DATA

EVALUATION = re.compile(r"eval_(before|after|step_(\d+))\.json")


class Answer(NamedTuple):
    """What came back for one sample. All texts are normalised."""

    answers: list[str]  # the accepted ones
    text: str
    probability: float | None  # of the first of two choices, where there are any

    @property
    def right(self) -> bool:
        return self.text in self.answers

    @property
    def score(self) -> float:
        """ANLS of this sample."""
        return anls([self.text], [self.answers])


class Evaluation(NamedTuple):
    label: str  # before, step 20, after
    step: int
    metrics: dict[tuple[str, str], float]  # see `metrics_of`
    answers: dict[str, Answer]  # by sample id


@dataclass
class Run:
    """
    A run as its output folder shows it. What a run has not come to yet is empty.

    Attributes:
        evaluations: in their order in time, at least one.
        log: entries of trainer_state.json.
        about, command: how the model came about, and the command line.
        choices: the two answers that probabilities are of, if there are any.
        samples: `id`, `question` and `images`, each a WebP in base64.
    """

    name: str
    evaluations: list[Evaluation]
    log: list[dict]
    about: list[str]
    command: str
    choices: list[str]
    samples: list[dict]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def dataset_losses(self) -> list[str]:
        """Fields of the log with the loss of each dataset of a mixture."""
        names = [name for entry in self.log for name in entry if name.startswith("loss_")]
        return sorted({*names})

    def curve(self, field: str) -> tuple[list[float], list[float]]:
        """Steps, and what was logged there."""
        points = [(entry["step"], entry[field]) for entry in self.log if field in entry]
        return [step for step, _ in points], [value for _, value in points]

    def summary(self, field: str) -> object:
        """A number of the training as a whole; None where there is none."""
        return next((entry[field] for entry in reversed(self.log) if field in entry), None)


def read_run(folder: Path) -> Run:
    """
    Read an output folder, of a run that goes on as well.

    Raises:
        RunError: there is no evaluation in it, or a file is not what a run writes.
    """
    with phase(str(folder)):
        state = _read(folder / "trainer_state.json") or {"log_history": [], "global_step": 0}
        data = {"about": [], "command": "", "choices": [], "samples": []}
        data |= _read(folder / REPORT_DATA) or {}
        found = [(path, EVALUATION.fullmatch(path.name)) for path in folder.glob("eval_*.json")]
        evaluations = [
            _evaluation(_read(path), *match.groups(), state["global_step"])
            for path, match in found
            if match
        ]
        evaluations.sort(key=lambda each: (each.label == "after", each.step))
        if not evaluations:
            raise RunError(f"{folder} holds no evaluation of a run, such as eval_before.json.")
        return Run(folder.absolute().name, evaluations, state["log_history"], **data)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _evaluation(content: dict, label: str, step: str | None, last_step: int) -> Evaluation:
    rows = zip(
        content["ids"],
        [[each] if isinstance(each, str) else each for each in content["answers_unique"]],
        content["generated_texts_unique"],
        content.get("probabilities") or [None] * len(content["ids"]),
        strict=True,
    )
    return Evaluation(
        label.replace("_", " "),
        int(step or 0) if label != "after" else last_step,
        metrics_of(content),
        {identifier: Answer(*row) for identifier, *row in rows},
    )
