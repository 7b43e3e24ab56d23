"""
What grows with what: crops, tokens, images, rows of jsonl and of shards, processes; and the
arithmetic of a cluster. `benchmarks/SCALING.md` reads the tables.

    python -m benchmarks.scaling                    # all tables; 1e6 rows need 2 GB of /tmp
    python -m benchmarks.scaling --parts cluster    # the arithmetic alone, nothing is measured

`samples`: a step (forward, backward, AdamW) of ours on the scaled-down model, and the collator's
time for its batch. `rows`: `load_records` on a jsonl of eight images per row, and its check, in a
process of its own. `shards`: `python -m phi3v.shards` of a jsonl with a small photo per row, the
same start on what it writes, and reading it. `processes`: the same step under DDP, one sample and
one thread per process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoProcessor

from benchmarks.models import SIZES, make_config, save_random
from benchmarks.preprocessing import KINDS, make_file, read
from benchmarks.side_by_side import make_parser, report, spread
from benchmarks.training_step import collate, process_memory, run, to_device
from phi3v import Phi3VForCausalLM
from phi3v.data.collators import TrainingCollator
from phi3v.data.formats import load_records
from phi3v.data.shard_order import ShardOrder
from phi3v.training.checkpoints import fingerprint
from phi3v.training.flops import training_flops
from phi3v.training.throughput import count_batch

PARTS = ("samples", "rows", "shards", "processes", "cluster")


def step_seconds(model: torch.nn.Module, batch: dict, steps: int) -> list[float]:
    """Seconds of every step after the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def count_units(batch: dict) -> dict[str, int]:
    """How often a batch has each unit that `training_flops` counts by."""
    # Every row is one sample, and none is padded.
    counted = count_batch({**batch, "lengths": [len(row) for row in batch["input_ids"]]}, 336)
    return {unit: int(counted[unit]) for unit in ("tokens", "pairs", "labels", "crops")}


# ---- One sample ----


def sample_rows(size: str, steps: int) -> list[list[str]]:
    """A photo at several num_crops, several images, and text of several lengths."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(size, Path(folder), torch.float32, "cpu")
        processor = AutoProcessor.from_pretrained(folder)
        model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    photo = read(make_file(*KINDS["photo, JPEG"], seed=0))
    flops = training_flops(model)
    cases = [(f"1 photo, num_crops {n}", 1, n, 1) for n in (1, 4, 9, 16)]
    cases += [(f"{n} photos, num_crops 4", n, 4, 1) for n in (2, 4, 8)]
    cases += [(f"text of {n} words", 0, 1, n) for n in (250, 500, 1000, 2000)]
    rows = []
    for name, images, num_crops, words in cases:
        processor.image_processor.num_crops = num_crops
        turn = {"images": [photo] * images, "user": "word " * words, "assistant": "An answer."}
        records = [{"id": "0", "conversations": [turn]}]
        collate = TrainingCollator(processor, for_trainer=True)
        collate(records)
        start = time.perf_counter()
        batch = collate(records)
        collated = time.perf_counter() - start
        counted = count_units(batch)
        del batch["ids"], batch["lengths"]
        work = sum(flops[unit] * count for unit, count in counted.items())
        seconds = step_seconds(model, batch, steps)
        rows.append(
            [
                *(name, f"{counted['tokens']:,}", str(counted["crops"]), f"{1000 * collated:.0f}"),
                *(spread(seconds), f"{work / 1e12:.3f}"),
                f"{work / 1e9 / statistics.median(seconds):.0f}",
            ]
        )
    return rows


# ---- Rows of a jsonl ----


def make_jsonl(folder: Path, count: int) -> None:
    (folder / "images").mkdir()
    for number in range(100):
        (folder / "images" / f"{number}.jpg").write_bytes(b"an image")
    with (folder / "data.jsonl").open("w") as file:
        for row in range(count):
            turn = {
                "images": [f"{(8 * row + number) % 100}.jpg" for number in range(8)],
                "user": "Classify the video into one of the following classes: a, b, c.",
                "assistant": "a",
            }
            file.write(json.dumps({"id": str(row), "conversations": [turn]}) + "\n")


def load_in_child(folder: Path) -> None:
    """Print seconds, and bytes above those of the libraries, as JSON."""
    libraries, start = process_memory("VmHWM"), time.perf_counter()
    load_records(folder / "data.jsonl", folder / "images").check()
    print(json.dumps([time.perf_counter() - start, process_memory("VmHWM") - libraries]))


def jsonl_rows(counts: list[int]) -> list[list[str]]:
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make_jsonl(Path(folder), count)
            seconds, memory = child("rows", ["--folder", folder], {})
        rows.append([f"{count:,}", f"{seconds:.1f}", f"{memory / 2**20:.0f}"])
    return rows


# ---- Shards ----


def make_photos(folder: Path, count: int) -> None:
    """A jsonl of `count` rows, with one of 100 JPEGs of some 2 kB each."""
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(100):
        pixels = noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    with (folder / "data.jsonl").open("w") as file:
        for row in range(count):
            turn = {"images": [f"{row % 100}.jpg"], "user": "What is it?", "assistant": str(row)}
            file.write(json.dumps({"id": str(row), "conversations": [turn]}) + "\n")


def read_in_child(folder: Path) -> None:
    """
    Print seconds of a start, bytes above those of the libraries after it and after reading, and
    milliseconds a record in a random order and in that of --streaming, as JSON.
    """
    libraries, start = process_memory("VmRSS"), time.perf_counter()
    records = load_records(folder / "shards", None).check()
    fingerprint(records)
    order = ShardOrder(records, batch_size=1, streams=1, seed=0)
    started = time.perf_counter() - start
    memory, milliseconds = [process_memory("VmRSS") - libraries], []
    for indices in (torch.randperm(len(records))[:2000].tolist(), list(order)[:2000]):
        start = time.perf_counter()
        for index in indices:
            records[index]
        milliseconds.append(1000 * (time.perf_counter() - start) / len(indices))
    memory.append(process_memory("VmRSS") - libraries)
    print(json.dumps([started, *memory, *milliseconds]))


def shard_rows(counts: list[int]) -> list[list[str]]:
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder), count)
            command = [sys.executable, "-m", "phi3v.shards", f"{folder}/data.jsonl", "--no-tqdm"]
            command += ["--image_dir", f"{folder}/images", "--out_dir", f"{folder}/shards"]
            start, before = time.perf_counter(), children_seconds()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            wrote, work = time.perf_counter() - start, children_seconds() - before
            started, memory, later, *reading = child("shards", ["--folder", folder], {})
        rows.append(
            [
                *(f"{count:,}", f"{wrote:.0f}", f"{work:.0f}", f"{started:.2f}"),
                *(f"{memory / 2**20:.0f}", f"{later / 2**20:.0f}"),
                *(f"{ms:.2f}" for ms in reading),
            ]
        )
    return rows


def children_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def child(part: str, flags: list[str], environment: dict, launcher: tuple[str, ...] = ()) -> list:
    """What a part prints in a process of its own."""
    command = [sys.executable, *launcher, "-m", "benchmarks.scaling", "--child", part, *flags]
    return run(command, **environment)


# ---- Processes ----


def step_in_child(size: str, steps: int) -> None:
    """A rank of DDP: the first one prints its seconds as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = make_config(size)
    model = Phi3VForCausalLM(config).train()
    model.config._attn_implementation = "sdpa"
    batch = to_device(collate(), "cpu", torch.float32)
    seconds = step_seconds(DistributedDataParallel(model), batch, steps)
    if dist.get_rank() == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


def process_rows(counts: list[int], size: str, steps: int) -> list[list[str]]:
    rows, alone, flags = [], None, ["--size", size, "--steps", str(steps)]
    for count in counts:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
        seconds = child("processes", flags, {"OMP_NUM_THREADS": "1"}, launcher)
        rate = count / statistics.median(seconds)
        alone = alone or rate
        rows.append([str(count), spread(seconds), f"{rate:.3f}", f"{rate / alone:.2f}"])
    return rows


# ---- A cluster ----


def cluster_rows(args: argparse.Namespace) -> list[list[str]]:
    """
    Step times of full finetuning, from the sizes of the model and assumed rates of the hardware.

    The backward pass is two thirds of the step's work, and hides that much of the gradients' way.
    ZeRO-2 sums gradients in bf16 after every micro-batch and gathers the weights once per step;
    ZeRO-3 gathers weights in the forward and the backward pass as well, which is hidden by the work
    as far as it goes; hybrid sharding does so inside a machine, and sums shards of gradients
    between machines.
    """
    with torch.device("meta"):
        model = Phi3VForCausalLM(make_config("full"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops(model)
    work = sum(flops[unit] * count for unit, count in count_units(collate()).items())
    sample = work / (args.peak * 1e12 * args.mfu)
    rows = []
    for gpus in (8, 16, 64, 256, 1024):
        for size in (1, 8):
            compute = sample * size
            between = args.nvlink if gpus <= 8 else args.network
            way = 2 * weights * (gpus - 1) / gpus / 1e9  # GB of bf16, once around
            zero2 = compute + max(0, way / between - compute * 2 / 3) + way / between
            zero3 = max(compute, 3 * way / between)
            inside = 2 * weights * 7 / 8 / 1e9 / args.nvlink
            across = 0 if gpus <= 8 else 2 * 2 * weights / 8 / 1e9 / args.network
            hybrid = max(compute, 3 * inside + across)
            rate = gpus * size / zero2
            rows.append(
                [
                    *(str(gpus), str(size), str(gpus * size), f"{compute:.2f}", f"{way:.1f}"),
                    *(f"{s:.2f} ({compute / s:.0%})" for s in (zero2, zero3, hybrid)),
                    *(f"{memory_gb(weights, gpus, kind):.1f}" for kind in ("zero2", "zero3")),
                    *(f"{rate:,.0f}", f"{rate * args.image_mb:,.0f}"),
                ]
            )
    return rows


def memory_gb(weights: int, gpus: int, kind: str) -> float:
    """
    GB per GPU for weights, gradients (bf16), and AdamW's two moments and a copy of the weights
    (float32). ZeRO-2 shares out all but the weights, ZeRO-3 everything.
    """
    shared = (2 + 3 * 4) * weights / gpus
    return (2 * weights / (gpus if kind == "zero3" else 1) + shared) / 1e9


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the measured model")
    parser.add_argument("--steps", type=int, default=3, help="measured of every kind (3)")
    counts = [1000, 10_000, 100_000, 1_000_000]
    parser.add_argument("--rows", nargs="+", type=int, default=counts, help="of jsonl files")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="of DDP (1 2)")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU in bf16 (989)")
    parser.add_argument("--mfu", type=float, default=0.45, help="that one GPU reaches (0.45)")
    parser.add_argument("--nvlink", type=float, default=400, help="GB/s inside a machine (400)")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU between (50)")
    parser.add_argument("--image_mb", type=float, default=0.5, help="of a page on disk (0.5)")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "rows":
        return load_in_child(args.folder)
    if args.child == "shards":
        return read_in_child(args.folder)
    if args.child == "processes":
        return step_in_child(args.size, args.steps)
    for part in args.parts:
        print_part(part, args)


def print_part(part: str, args: argparse.Namespace) -> None:
    if part == "samples":
        header = ["sample", "tokens", "crops", "collator, ms", "step, s", "TFLOP", "GFLOP/s"]
        report("Growth with a sample", header, sample_rows(args.size, args.steps), args.save, part)
    elif part == "rows":
        header = ["rows", "start, s", "MiB more"]
        report("Growth with a jsonl", header, jsonl_rows(args.rows), args.save, part)
    elif part == "shards":
        header = [
            *("rows", "write, s", "write, CPU s", "start, s", "MiB more", "MiB after reading"),
            *("ms a record, at random", "streaming"),
        ]
        report("Growth with shards", header, shard_rows(args.rows), args.save, part)
    elif part == "processes":
        header = ["processes", "step, s", "samples/s", "times one process"]
        rows = process_rows(args.processes, args.size, args.steps)
        report("Growth with processes", header, rows, args.save, part)
    else:
        header = [
            *("GPUs", "samples per GPU", "batch", "work, s", "weights' way, GB"),
            *("ZeRO-2, s", "ZeRO-3, s", "hybrid, s", "ZeRO-2, GB", "ZeRO-3, GB"),
            *("samples/s", "MB read/s"),
        ]
        report("Arithmetic of a cluster, not measured", header, cluster_rows(args), args.save, part)


if __name__ == "__main__":
    main()
