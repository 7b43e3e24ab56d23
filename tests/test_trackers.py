"""--report_to: every evaluation of a run arrives, in one run of the tracker."""

from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from helpers.trainers import SETTINGS, arguments, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = [0, 1, 2, 3, 3]  # before, three of --eval_steps, after


def train(checkpoint: Path, folder: Path, tracker: str, monkeypatch) -> None:
    """What a recipe does, with an evaluation before, after and at every step."""
    monkeypatch.chdir(folder)
    monkeypatch.delitem(SETTINGS, "report_to")
    flags = ("--report_to", tracker, "--eval_steps", "1", "--batch_size", "1")
    args = arguments(checkpoint, "output", *flags, "--max_new_tokens", "2")
    trainer = make_trainer(args, compute_metrics=lambda results: {"accuracy": 0.25})
    trainer.evaluate(file_name="eval_before.json")
    trainer.train()
    trainer.save_model()
    trainer.evaluate(file_name="eval_after.json")


def test_a_tracker_is_told_of_all_evaluations(demo_checkpoint, tmp_path, monkeypatch):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.extend(state.global_step for name in logs if name == "eval_accuracy")

        def on_train_end(self, args, state, control, **kwargs):
            told.append("end")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    train(demo_checkpoint, tmp_path, "tensorboard", monkeypatch)
    assert told == [*STEPS, "end"]


# ---------------------------------------------------------------- the real ones: with_trackers.sh


def test_tensorboard(demo_checkpoint, tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(demo_checkpoint, tmp_path, "tensorboard", monkeypatch)
    [run] = (tmp_path / "output" / "runs").iterdir()
    events = accumulators.EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/accuracy")] == STEPS
    assert not (tmp_path / "runs").exists()


def test_mlflow(demo_checkpoint, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    train(demo_checkpoint, tmp_path, "mlflow", monkeypatch)
    client = mlflow.MlflowClient()
    [run] = client.search_runs(["0"])
    history = client.get_metric_history(run.info.run_id, "eval_accuracy")
    assert [metric.step for metric in history] == STEPS


def test_trackio(demo_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read at import
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    train(demo_checkpoint, tmp_path, "trackio", monkeypatch)
    [run] = SQLiteStorage.get_runs("huggingface")
    logs = SQLiteStorage.get_logs("huggingface", run)
    assert [log["eval/accuracy"] for log in logs if "eval/accuracy" in log] == [0.25] * len(STEPS)


def test_wandb(demo_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = pytest.importorskip("wandb")
    train(demo_checkpoint, tmp_path, "wandb", monkeypatch)
    wandb.finish()
    [run] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert run.read_bytes().count(b"eval/accuracy") >= len(STEPS)
