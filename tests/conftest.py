"""
What the tests share: the tiny official-format checkpoint, and where the real tokenizer is, if it is
anywhere.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoProcessor

import phi3v  # noqa: F401  registers the classes
from demo.make_checkpoint import write_checkpoint
from golden_util import WTE_ALIAS, official_weights
from helpers.launcher import Launcher

# The tests run on every core, and threads of one would wait for those of another.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A group that a test left would make the next one a rank of it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group behind")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of what is random; otherwise another in every run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes take longest. Begun last, one would keep a single worker busy."""
    long = {item.path for item in items if "launcher" in item.fixturenames}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def seed(request) -> int:
    """Drawn where --seed gives none. A failed test prints it."""
    given = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(10**6) if given is None else given
    print(f"repeat this with --seed {seed}")
    return seed


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts Python programs in processes of their own, without waiting for imports."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """What `datasets` keeps of the test's data goes with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def forward_cases() -> dict:
    return json.loads((GOLDEN / "forward.json").read_text())["cases"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """
    A checkpoint in the official format with the weights that the golden numbers were computed with.
    """
    folder = tmp_path_factory.mktemp("tiny")
    shapes = json.loads((GOLDEN / "keys_tiny.json").read_text())
    weights = {name: torch.from_numpy(w) for name, w in official_weights(shapes).items()}
    weights[WTE_ALIAS] = weights[WTE_ALIAS].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((GOLDEN / "config.json").read_text())
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """The real tokenizer's files, which are not part of this repository."""
    folder = os.environ.get("PHI3V_TOKENIZER", "")
    if not (Path(folder) / "tokenizer.json").is_file():
        pytest.skip("set PHI3V_TOKENIZER to a folder with Phi-3.5-vision's tokenizer files")
    return Path(folder)


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory) -> Path:
    """The demo's checkpoint: tiny, random weights, with a tokenizer and a processor."""
    folder = tmp_path_factory.mktemp("demo") / "tiny_phi3v"
    write_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def demo_processor(demo_checkpoint):
    return AutoProcessor.from_pretrained(demo_checkpoint)
