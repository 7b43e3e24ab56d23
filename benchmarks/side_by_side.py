"""Measure ours and the baseline in turns, and say how far apart they are and how sure that is."""

import argparse
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "pillow", "av")

Measured = TypeVar("Measured")


def make_parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """The flags that every benchmark has; `--rounds` where there is a default for it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help=f"times that each is measured ({rounds})"
        )
    parser.add_argument(
        "--save", action="store_true", help="write the table into benchmarks/results/ too"
    )
    return parser


def in_turns(
    variants: dict[str, Callable[[], Measured]], rounds: int, warm_up: int = 1
) -> dict[str, list[Measured]]:
    """
    Call every variant once per round, after `warm_up` rounds that do not count, and collect what
    they return. Whatever slows the machine for a while slows all of them.
    """
    measured = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, measure in variants.items():
            value = measure()
            if number >= warm_up:
                measured[name].append(value)
    return measured


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (minimum to maximum)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(larger: Sequence[float], smaller: Sequence[float]) -> str:
    """How many times larger, round by round: median (minimum to maximum)."""
    return spread([one / other for one, other in zip(larger, smaller, strict=True)])


def report(
    name: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    save: bool,
    part: str | None = None,
) -> None:
    """
    Print a Markdown table with the machine and the command; write it to results/ too. `part` tells
    the tables of one benchmark apart.
    """
    lines = [f"# {name}, {datetime.date.today().isoformat()}", ""]
    lines += [f"`python -m benchmarks.{' '.join([_module(), *sys.argv[1:]])}`", "", machine(), ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    text = "\n".join(lines) + "\n"
    print(text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        names = [datetime.date.today().isoformat(), _module(), *([part] if part else []), _kind()]
        path = RESULTS / f"{'-'.join(names)}.md"
        path.write_text(text)
        print(f"Written to {path}")


def machine() -> str:
    """The hardware and the versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{_device()}, {len(os.sched_getaffinity(0))} CPU cores ({_cpu()}), load "
        f"{os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}, {versions}."
    )


def _module() -> str:
    return Path(sys.argv[0]).stem


def _kind() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def _device() -> str:
    if not torch.cuda.is_available():
        return "No GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
