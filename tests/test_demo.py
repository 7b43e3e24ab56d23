"""The demo, from nothing to a model that learned."""

import json
import os
import subprocess
import sys

import pytest

from conftest import REPO


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """Videos, conversion, two processes: at most chance before, at least 80 % after training."""
    result = subprocess.run(
        [sys.executable, "-m", "demo.run", "--work_dir", str(tmp_path), "--seed", "7"],
        cwd=REPO,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = (
        json.loads((tmp_path / "output" / f"eval_{when}.json").read_text())
        for when in ("before", "after")
    )
    assert before["accuracy"] <= 0.2 and after["accuracy"] >= 0.8
    assert len(set(after["ids"])) == len(after["ids"]) == 300
    assert f"accuracy after training:  {after['accuracy']:.1%}" in result.stdout
