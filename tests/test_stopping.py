"""SIGTERM in a step and in an evaluation: what is saved, and that the run goes on from there."""

import json
import os
import signal
from pathlib import Path

import pytest

from helpers.trainers import arguments, make_trainer
from phi3v.training import stopping
from phi3v.training.output_folder import OutputFolder, incompleteness

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def old_handler():
    """Pytest's own answer to SIGTERM is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    stopping._received = False


class Run:
    """Six steps with an evaluation of three batches after every other one."""

    def __init__(self, checkpoint: Path, folder: Path, *flags: str):
        flags = ("--eval_steps", "2", "--eval_batch_size_per_gpu", "1", *flags)
        flags = ("--batch_size", "1", "--num_train_epochs", "2", "--max_new_tokens", "2", *flags)
        self.whole_at_evaluation = []
        self.folder = OutputFolder(folder)
        self.trainer = make_trainer(
            arguments(checkpoint, folder, *flags), compute_metrics=self.metrics
        )

    def metrics(self, results: list) -> dict[str, float]:
        self.whole_at_evaluation.append(
            [path.name for path in self.folder.checkpoints() if not incompleteness(path)]
        )
        return {"count": len(results)}

    def train(self, signal_at: tuple[int, int] | None = None) -> None:
        """Train; SIGTERM comes in a batch of the evaluation after a step: (step, batch)."""
        generate, count = self.trainer.model.generate, 0

        def send_and_generate(**inputs):
            nonlocal count
            count += 1
            if signal_at and (self.trainer.state.global_step, count) == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return generate(**inputs)

        self.trainer.model.generate = send_and_generate
        self.trainer.train(self.trainer.args.resume_from_checkpoint)
        self.generated = count

    def evaluations(self) -> dict[str, dict]:
        paths = sorted(self.folder.path.glob("eval_step_*.json"))
        return {path.name: json.loads(path.read_text()) for path in paths}

    def logged(self) -> dict[int, float]:
        history = self.trainer.state.log_history
        return {entry["step"]: entry["eval_count"] for entry in history if "eval_count" in entry}


@pytest.mark.parametrize("flags", [(), ("--save_steps", "1")], ids=["at SIGTERM only", "each step"])
def test_an_evaluation_is_left_at_the_next_batch(demo_checkpoint, tmp_path, flags):
    """
    A checkpoint of the step is saved, nothing half evaluated is written, and the resumed run does
    that evaluation first. Metrics are in the Trainer's own log.
    """
    whole = Run(demo_checkpoint, tmp_path / "whole")
    whole.train()
    names = [f"eval_step_{step}.json" for step in (2, 4, 6)]
    assert list(whole.evaluations()) == names and whole.logged() == {2: 3, 4: 3, 6: 3}

    run = Run(demo_checkpoint, tmp_path / "stopped", *flags)
    with pytest.raises(SystemExit) as stopped:
        run.train(signal_at=(4, 4))
    assert stopped.value.code == stopping.STOPPED == 143
    assert list(run.evaluations()) == names[:1]
    newest = run.folder.checkpoints()[-1]
    assert newest.name == "checkpoint-4" and incompleteness(newest) is None
    assert not run.folder.finished

    again = Run(demo_checkpoint, tmp_path / "stopped", *flags, "--resume_from_checkpoint")
    again.train()
    assert again.evaluations() == whole.evaluations() and again.logged() == whole.logged()
    assert again.generated == 2 * 3, "the evaluation after step 2 is not done again"


def test_a_checkpoint_comes_before_the_evaluation_of_its_step(demo_checkpoint, tmp_path):
    """So that a kill in a long evaluation does not cost it."""
    run = Run(demo_checkpoint, tmp_path, "--save_steps", "2")
    run.train()
    assert run.whole_at_evaluation == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
    ]


def test_sigterm_after_the_last_step(demo_checkpoint, tmp_path):
    """The model can still be saved. The last evaluation is left, with SIGTERM's exit status."""
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path))
    trainer.train()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.received()
    trainer.save_model()
    with pytest.raises(SystemExit) as stopped:
        trainer.evaluate(file_name="eval_after.json")
    assert stopped.value.code == stopping.STOPPED
    assert (tmp_path / "model.safetensors").exists() and not trainer.folder.finished
