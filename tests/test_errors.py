"""What is said of failures, and where their tracebacks are."""

import atexit
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phi3v.errors import DataError, RunError, explain_failures, phase


@pytest.fixture
def fail(monkeypatch, capsys):
    """Let a run with this output folder end by `failure`; what is printed."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back at the end
    monkeypatch.setattr(atexit, "register", lambda function: function)

    def end(failure: Callable[[], object], output_dir: Path, **environment: str) -> str:
        monkeypatch.setattr(tempfile, "tempdir", str(output_dir.parent))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        explain_failures(output_dir)
        try:
            with phase("--deepspeed x.json"):
                failure()
            1 / 0  # noqa: B018
        except (RunError, ZeroDivisionError) as error:
            sys.excepthook(type(error), error, error.__traceback__)
        return capsys.readouterr().err

    return end


def missing_key() -> None:
    {}["a"]


def our_own() -> None:
    raise RunError("mine")


def test_what_libraries_raise():
    """One line with what it was about; the kind of error where its text says too little."""
    for error, said in [
        (ValueError("a\n  b."), "a b."),
        (KeyError("a"), "KeyError: 'a'."),
        (AssertionError(), "AssertionError."),
        (OSError(2, "No such file", "f"), "[Errno 2] No such file: 'f'."),
    ]:
        with pytest.raises(RunError) as raised, phase("--flag x"):
            raise error
        assert str(raised.value) == f"--flag x: {said}" and raised.value.__cause__ is error
    with (
        pytest.raises(RunError, match=r"^--flag x: too few\.$") as raised,
        phase("--flag x") as require,
    ):
        require([1], "is enough")
        require([], "too few.")
    assert raised.value.__cause__ is None


def test_what_passes_a_phase():
    """Errors of ours, and those that have an explanation of their own."""
    for error in (DataError("a"), RunError("b"), torch.OutOfMemoryError("c"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, phase("--flag x"):
            raise error
        assert raised.value is error


def test_a_library_fails(fail, tmp_path):
    """One line that says where the traceback is, also where that is not the output folder."""
    said = fail(missing_key, tmp_path / "out")
    path = tmp_path / "out" / ".phi3v" / "error.txt"
    message = "error: --deepspeed x.json: KeyError: 'a'. The traceback is in "
    assert said == f"{message}{path}.\n" and "Traceback" in path.read_text()
    (tmp_path / "file").touch()
    said = fail(missing_key, tmp_path / "file")
    [path] = tmp_path.glob("phi3v-*/error.txt")
    assert said == f"{message}{path}.\n"


def test_torchruns_record(fail, tmp_path):
    """It holds the message, of the rank that failed."""
    environment = {"RANK": "3", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "record.json")}
    assert fail(missing_key, tmp_path, **environment) == ""
    path = tmp_path / ".phi3v" / "error-rank3.txt"
    record = json.loads((tmp_path / "record.json").read_text())["message"]
    assert record["message"] == (f"--deepspeed x.json: KeyError: 'a'. The traceback is in {path}.")
    assert path.exists()


def test_a_mistake_of_the_code(fail, tmp_path):
    """Python's traceback, and the file."""
    said = fail(lambda: None, tmp_path)
    trace = (tmp_path / ".phi3v" / "error.txt").read_text()
    assert said.startswith(trace) and "ZeroDivisionError" in said and "error.txt" in said


def test_an_error_of_ours(fail, tmp_path):
    """Nothing but the message."""
    assert fail(our_own, tmp_path) == "error: mine\n"
    assert not list(tmp_path.iterdir())
