"""Evaluations between steps: on a part, for the best checkpoint, and to stop early."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from helpers.records import MORE
from helpers.trainers import arguments, make_trainer
from phi3v.training import RecipeParser

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

NAMED = [{**record, "id": f"sample {i}"} for i, record in enumerate(MORE)]
BEST = ("--load_best_model_at_end", "--metric_for_best_model", "accuracy")


def test_a_part_is_evaluated_between_steps(demo_checkpoint, tmp_path):
    """--eval_samples: evenly spaced ones between steps, all of them before and after."""
    flags = ("--eval_steps", "1", "--eval_samples", "2", "--max_new_tokens", "2")
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path, *flags), NAMED)
    trainer.evaluate(file_name="eval_before.json")
    trainer.train()
    trainer.evaluate(file_name="eval_after.json")
    ids = {path.name: json.loads(path.read_text())["ids"] for path in tmp_path.glob("eval_*.json")}
    everything = [record["id"] for record in NAMED]
    assert ids.pop("eval_before.json") == ids.pop("eval_after.json") == everything
    assert len(ids) == 3 and all(found == ["sample 0", "sample 2"] for found in ids.values())


def train(checkpoint, folder, scores: list[float], *flags: str):
    """A run of at most ten epochs whose evaluations come out as `scores`."""
    flags = ("--num_train_epochs", "10", "--eval_steps", "1", "--save_steps", "1", *BEST, *flags)
    args = arguments(checkpoint, folder, *flags, "--max_new_tokens", "1")
    scores = iter(scores)
    trainer = make_trainer(args, NAMED[:2], compute_metrics=lambda _: {"accuracy": next(scores)})
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


def test_the_best_checkpoint_is_kept_and_training_stops_early(demo_checkpoint, tmp_path):
    """
    Three evaluations that are no better end the run, with the best one's weights. One that was
    killed among them, and goes on, ends at the same step with the same weights.
    """
    flags = ("--early_stopping_patience", "3")
    scores = [0.1, 0.5, 0.4, 0.3, 0.2, 0.9]
    whole = train(demo_checkpoint, tmp_path / "a", scores, *flags)
    assert whole.state.global_step == 5
    assert whole.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    saved = load_file(tmp_path / "a" / "model.safetensors")
    assert all((saved[name] == best[name]).all() for name in best)

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-5")
    (tmp_path / "b" / "model.safetensors").unlink()
    flags = (*flags, "--resume_from_checkpoint")
    resumed = train(demo_checkpoint, tmp_path / "b", scores[3:], *flags)
    assert resumed.state.global_step == 5 and resumed.state.best_metric == 0.5
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert all((again[name] == best[name]).all() for name in best)


def test_the_last_evaluation_may_be_the_best(demo_checkpoint, tmp_path):
    """Also where the run was killed in it, when its checkpoint is written and its metric is not."""
    flags = ("--max_steps", "2")
    whole = train(demo_checkpoint, tmp_path / "a", [0.1, 0.5], *flags)
    assert whole.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-2")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "eval_step_2.json").unlink()
    resumed = train(demo_checkpoint, tmp_path / "a", [0.5], *flags, "--resume_from_checkpoint")
    assert resumed.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early_stopping_patience", "2"], "needs --eval_steps and --load_best"),
        (["--early_stopping_patience", "2", *BEST], "needs --eval_steps and --load_best"),
        (["--load_best_model_at_end"], "needs --metric_for_best_model"),
    ],
)
def test_flags_that_need_others(flags, message, capsys):
    """Said before anything is loaded."""
    with pytest.raises(SystemExit):
        RecipeParser("").parse_args(flags)
    assert message in capsys.readouterr().err
