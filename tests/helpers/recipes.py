"""A recipe's main(), in the test's own process."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


def recipe(name: str) -> ModuleType:
    return importlib.import_module(f"finetune_hf_trainer_{name}")


def run(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: object
) -> list[dict]:
    """Run a recipe's main() and return its two evaluations."""
    output_dir = tmp_path / "output"
    argv = [
        f"finetune_hf_trainer_{name}.py",
        f"--model_name_or_path={checkpoint}",
        f"--output_dir={output_dir}",
        *("--batch_size", "2", "--num_crops", "2", "--no-tqdm", "--deepspeed", "none"),
        *("--max_new_tokens", "3"),
        *map(str, flags),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    recipe(name).main()
    assert (output_dir / "model.safetensors").is_file()
    return [
        json.loads((output_dir / f"eval_{when}.json").read_text()) for when in ("before", "after")
    ]
