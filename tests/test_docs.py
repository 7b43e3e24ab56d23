"""The README and docs/: commands that parse, links that lead somewhere, numbers that are computed."""

import argparse
import ast
import contextlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from transformers import TrainingArguments

from benchmarks.memory import full_size, make_batch, make_prompts
from phi3v import check
from phi3v.training import RecipeParser, arguments
from phi3v.training.flops import PEAK_FLOPS, training_flops
from small_datasets import picture

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"<lr>": "1e-5", "<epochs>": "2", "<num_nodes>": "2", "${{outputs.model}}": "out"}
# What runs everywhere. Any other program stands in a block that says before it what it needs.
ANYWHERE = {"pip", "make", "python", "torchrun"}
# Other packages' modules, and the file that the reader of own_data.md has saved.
ELSEWHERE = {"lmms_eval", "vllm", "make_records"}


class Parsed(Exception):
    """A command line has passed its parser."""


def bash_blocks() -> Iterator[tuple[str, str, bool]]:
    """Page, commands, and whether the text before them says what they need."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in BLOCK.finditer(text):
            before = text[: found.start()].rstrip().rpartition("\n\n")[2]
            if found[1] == "bash":
                yield page.name, found[2], re.search(r"\bneeds?\b", before, re.I) is not None


def words_of(commands: str) -> Iterator[list[str]]:
    """The words of each command."""
    for placeholder, value in PLACEHOLDERS.items():
        commands = commands.replace(placeholder, value)
    unfinished = ""
    for line in commands.replace("\\\n", " ").splitlines():
        unfinished += f"{line}\n"
        with contextlib.suppress(ValueError):  # a quotation goes on in the next line
            words = shlex.split(unfinished, comments=True)
            unfinished = ""
            if words:
                yield words
    assert not unfinished


@pytest.fixture
def machine(monkeypatch):
    """One that has what a command needs. Programs end when their flags are parsed, by Parsed."""

    def stop_after(parser, name):
        original = getattr(parser, name)

        def parse(*args, **kwargs):
            original(*args, **kwargs)
            raise Parsed

        monkeypatch.setattr(parser, name, parse)

    for name in ("parse_args", "parse_intermixed_args"):
        stop_after(argparse.ArgumentParser, name)
    stop_after(RecipeParser, "parse_args")
    monkeypatch.setattr(arguments, "gpu_problems", lambda args: ())
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("WORLD_SIZE", "1")
    return monkeypatch


def check_command(words: list[str], machine: pytest.MonkeyPatch) -> None:
    """Its files exist, and its flags pass the parser of the program."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "torchrun":
        check_torchrun(rest, machine)
    elif program == "python":
        check_python(rest, machine)
    elif program == "pip" and "-r" in rest:
        assert Path(rest[rest.index("-r") + 1]).is_file()


def check_torchrun(words: list[str], machine: pytest.MonkeyPatch) -> None:
    """A batch has to be divisible by the processes that it starts."""
    meet, _ = get_args_parser().parse_known_args(words)
    nodes = int(meet.nnodes.rpartition(":")[2])
    machine.setenv("WORLD_SIZE", str(int(meet.nproc_per_node) * nodes))
    script = [meet.training_script, *meet.training_script_args]
    check_python(["-m", *script] if meet.module else script, machine)
    machine.setenv("WORLD_SIZE", "1")


def check_python(words: list[str], machine: pytest.MonkeyPatch) -> None:
    is_module = words[0] == "-m"
    name, *flags = words[is_module:]
    if name.split(".")[0] in ELSEWHERE or name.startswith("docs/"):
        return
    if "--deepspeed" in flags:
        assert Path(flags[flags.index("--deepspeed") + 1]).is_file()
    machine.setattr(sys, "argv", [name, *flags])
    machine.delitem(sys.modules, name, raising=False)  # or runpy warns
    with pytest.raises(Parsed):
        if is_module:
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(name, run_name="__main__")


@pytest.mark.parametrize(("page", "commands", "marked"), [*bash_blocks()])
def test_commands_parse(page, commands, marked, machine):
    """
    A flag that was renamed, a batch that GPUs do not divide, a file or target that is gone; what
    cannot run everywhere says before the block what it needs.
    """
    for words in words_of(commands):
        if not marked:
            assert words[0] in ANYWHERE, f"{page}: a line with 'needs' has to go before {words}"
        check_command(words, machine)
