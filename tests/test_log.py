"""What a person sees of a run."""

import re

import pytest

from helpers.records import RECORDS
from helpers.trainers import arguments, make_trainer
from phi3v.training.log import in_words, log_line

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

RATES = {
    "loss": 1.5,
    "learning_rate": 4e-5,
    "samples_per_second": 5.81,
    "peak_memory_gb_per_process": 36.04,
}


def test_lines_are_short_and_aligned():
    """A long run's first and last lines have their numbers below each other, in 120 characters."""
    lines = [
        log_line(10, 12_000, 0.01, {**RATES, "mfu": 0.081, "loss": 11.25}, 8 * 3600),
        log_line(11_990, 12_000, 2.99, {**RATES, "mfu": 0.45, "samples_per_second": 12.5}, 65),
    ]
    assert lines[0] == (
        "step    10/12000  epoch 0.01  loss 11.2500  lr 4.00e-05    5.81 samples/s  MFU  8.1%  "
        "36.0 GB  8 h 00 min left"
    )
    assert lines[1].endswith("MFU 45.0%  36.0 GB  1 min 05 s left")
    assert {line.index("samples/s") for line in lines} == {lines[0].index("samples/s")}
    assert max(map(len, lines)) <= 120


def test_durations():
    assert [in_words(s) for s in (0.4, 59.6, 3599, 7503)] == [
        "0 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 05 min",
    ]


@pytest.mark.parametrize("flags", [(), ("--no-tqdm",)])
def test_a_run_prints_lines_and_no_dictionaries(demo_checkpoint, tmp_path, capsys, flags):
    """One line for each logging step; at the end, where the results are and what to type next."""
    args = arguments(demo_checkpoint, tmp_path / "out", "--num_train_epochs", "2")
    args.tqdm = not flags
    trainer = make_trainer(args, RECORDS)
    trainer.train()
    trainer.save_model()
    trainer.evaluate(file_name="eval_after.json")
    printed = capsys.readouterr()
    assert "{" not in printed.out
    steps = re.findall(r"^step (\d)/4  epoch .* left$", printed.out, re.MULTILINE)
    assert steps == ["1", "2", "3", "4"]
    assert "Training: 4 of 4 steps, 2 epochs of 3 samples\n" in printed.out
    assert f"Results: {args.output_dir}. Ask it: python -m phi3v.answer" in printed.out
    assert ("4/4" in printed.err) == args.tqdm
    logged = trainer.state.log_history
    assert all("grad_norm" in entry for entry in logged if "loss" in entry)
