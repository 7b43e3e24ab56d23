"""
A training step at the widths of Phi-3.5-vision, ours and the baseline's: time and peak memory.

    python -m benchmarks.training_step                  # on a CPU in float32, on a GPU in bf16

The whole model is too large for a CPU. So a few layers of its real width are measured, with the
real embedding, head and projection: SLICES are decoder and CLIP layers. One more layer costs the
same wherever it stands, so time and memory are a + b x decoder layers + c x CLIP layers, and three
slices give a, b and c. The last row of a table, all 32 and 24 layers, is calculated with them.

A step is forward, backward, gradient clipping and AdamW, on a page with text, of whose tokens a few
are labelled. The default page of 2 x 2 crops is smaller than DocVQA's usual one of 5 x 3, for the
sake of time, and kinder to the baseline: its attention grows with the square of the tokens, and it
has no padded crops to compute.

Both sides take their steps in turns, in one process and on the same weights, which a learning rate
of 0 keeps: so loss and gradients have to agree too. CPU time is what to compare where other
programs run beside it. On a CPU the whole is calculated of it alone: slices are measured one after
the other, and the machine may be busier with one of them. Peak memory is that of a step: of a GPU
what PyTorch allocated, of a CPU what the process held on top of its libraries.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.baseline import use_side
from benchmarks.models import (
    CLIPS,
    SIZES,
    make_config,
    make_processor,
    quantise,
    random_model,
)
from benchmarks.preprocessing import make_file, read
from benchmarks.side_by_side import in_turns, make_parser, report, spread
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.collators import TrainingCollator
from phi3v.data.packing import count_tokens
from phi3v.training.attention import choose_attention
from phi3v.training.loading import add_adapters, quantization_config

from peft import LoraConfig, PeftModel

METHODS = ("full", "frozen", "lora", "qlora")
SWITCH = ("yes", "no")
SIDES = ("ours", "baseline")
SLICES = ((2, 3), (4, 3), (2, 5))
GRID, NUM_CROPS = (5, 3), 16  # of a letter page, as in DocVQA
TOKENS = 2443  # of a sample of the published table, on average
LABELS = 8

LORA = LoraConfig(
    r=64,
    lora_alpha=128,
    target_modules=[
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"),
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        *("img_projection.0", "img_projection.2"),
    ],
    init_lora_weights="gaussian",
    task_type="CAUSAL_LM",
)


# ---- One step ----


def page_records(
    processor: Phi3VProcessor,
    tokens: int = TOKENS,
    grid: tuple[int, int] = GRID,
    samples: int = 1,
    seed: int = 1,
) -> list[dict]:
    """
    Records of a page with `grid` (rows, columns) of crops, a question that fills it up to `tokens`
    tokens and an answer with LABELS labels.
    """
    rows, columns = grid
    # A page is a little narrower than its crops, which are filled up to their width.
    page = read(make_file(336 * columns - 20, 336 * rows, "PNG", seed))

    def record(words: int) -> dict:
        answer = " ".join(["True"] * (LABELS - 4))  # and four tokens that end it
        turn = {"images": [page], "user": " ".join(["True"] * words), "assistant": answer}
        return {"id": "0", "source": "random", "conversations": [turn]}

    return [record(1 + tokens - count_tokens(processor, record(1)))] * samples


def collate(
    tokens: int = TOKENS,
    grid: tuple[int, int] = GRID,
    num_crops: int = NUM_CROPS,
    seed: int = 1,
) -> dict:
    """One of `page_records`, as the collator gives it to the Trainer."""
    processor = make_processor(num_crops)
    records = page_records(processor, tokens, grid, seed=seed)
    return TrainingCollator(processor, for_trainer=True)(records)


def to_device(batch: dict, device: str, dtype: torch.dtype) -> dict:
    """The model's arguments, without what the Trainer alone needs."""
    inputs = {name: value for name, value in batch.items() if name not in ("ids", "lengths")}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def prepare(
    model: Phi3VForCausalLM, method: str, checkpointing: bool
) -> Phi3VForCausalLM | PeftModel:
    """`model` as the recipe trains it by `method`. 4-bit weights have to be in it already."""
    if method == "frozen":
        model.model.vision_embed_tokens.requires_grad_(False)
    if method in ("lora", "qlora"):
        model = add_adapters(model, LORA)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


# ---- Both sides ----


def run_child(args: argparse.Namespace) -> None:
    """Print as JSON what every round's step took of each side, see `step`."""
    libraries = process_memory("VmRSS")
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    attention = choose_attention(args)
    model = random_model(make_config(args.size, args.layers), dtype, device, attention)
    if args.method == "qlora":
        model = quantise(model, quantization_config(dtype))
    model = prepare(model, args.method, args.gradient_checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), eps=1e-7, fused=True)
    for parameter in trained:  # its state is there from the first round on
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    batch = to_device(collate(args.tokens, args.grid, args.num_crops), device, dtype)

    def step(side: str) -> dict[str, float]:
        """Seconds, CPU seconds, peak in GB, loss, and norm of the gradients."""
        use_side(model, side, attention)
        reset_peak(on_gpu)
        cpu, start = time.process_time(), time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = torch.cuda.max_memory_allocated() if on_gpu else process_memory("VmHWM") - libraries
        result = {"cpu": cpu, "seconds": seconds, "peak": peak / 1e9}
        result |= {"loss": loss.item(), "norm": norm.item()}
        print(side, result, file=sys.stderr, flush=True)
        return result

    turns = {side: lambda side=side: step(side) for side in SIDES}
    print(json.dumps(in_turns(turns, args.rounds, warm_up=int(on_gpu))))


def reset_peak(on_gpu: bool) -> None:
    """Let the peak of memory begin at what is in use now."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the other side has freed
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, see proc(5)


def process_memory(field: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    # Not getrusage: its number starts at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


def run(command: list[str], **environment: str) -> dict:
    """What a child prints as its last line, which is JSON."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed.")
    return json.loads(result.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, method: str, checkpointing: str, layers: tuple) -> dict:
    """Of each side lists of what the rounds' steps took, see `run_child`."""
    command = [
        *(sys.executable, "-m", "benchmarks.training_step", "--child", "--size", args.size),
        *("--method", method, "--rounds", args.rounds, "--layers", *layers),
        *("--grid", *args.grid, "--num_crops", args.num_crops, "--tokens", args.tokens),
        *(["--gradient_checkpointing"] if checkpointing == "yes" else []),
        *(["--use_flash_attention"] if args.use_flash_attention else []),
    ]
    # A thread that waits would count as one that works.
    rounds = run([str(part) for part in command], OMP_WAIT_POLICY="PASSIVE")
    print(f"{method}, checkpointing {checkpointing}, {layers}: {rounds}", file=sys.stderr)
    return {
        side: {key: [step[key] for step in rounds[side]] for key in rounds[side][0]}
        for side in SIDES
    }


def extrapolate(slices: list[float], layers: tuple[int, int]) -> float:
    """What `layers` take by what SLICES do: a + b x decoder layers + c x CLIP layers."""
    equations = torch.tensor([[1, *layers] for layers in SLICES], dtype=torch.float64)
    solution = torch.linalg.solve(equations, torch.tensor(slices, dtype=torch.float64))
    return float(solution @ torch.tensor([1, *layers], dtype=torch.float64))


def whole(measured: list[dict], layers: tuple[int, int]) -> dict:
    """`measure` of the whole model, calculated from medians of that of SLICES."""
    return {
        side: {
            key: [extrapolate([statistics.median(one[side][key]) for one in measured], layers)]
            for key in ("seconds" if torch.cuda.is_available() else "cpu", "peak")
        }
        for side in SIDES
    }


def row(name: list[str], measured: dict) -> list[str]:
    ours, theirs = (measured[side] for side in SIDES)
    calculated = "loss" not in ours  # one value each
    cells = list(name)
    for key in ("cpu", "seconds", "peak"):
        if key not in ours:
            cells += ["-"] * 3
            continue
        for values in (ours[key], theirs[key]):
            cells.append(f"{values[0]:.1f}" if calculated else spread(values, 1))
        cells.append(f"{statistics.median(theirs[key]) / statistics.median(ours[key]):.2f}x")
    for key in ("loss", "norm"):
        cells.append("-" if calculated else f"{difference(ours[key] + theirs[key]):.0e}")
    return cells


def difference(values: list[float]) -> float:
    """The largest one between any two, relative to their size."""
    return (max(values) - min(values)) / max(values)


HEADER = (
    *("method", "checkpointing", "decoder + CLIP layers"),
    *("ours, CPU s", "baseline, CPU s", "less CPU time"),
    *("ours, s", "baseline, s", "faster"),
    *("ours, peak GB", "baseline, peak GB", "less memory"),
    *("losses differ by", "gradients' norms by"),
)


def main():
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--size", choices=SIZES, default="full", help="whose widths (full)")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(2, 2), help="rows and columns of crops (2 2)"
    )
    parser.add_argument("--num_crops", type=int, default=4, help="to which they are padded (4)")
    parser.add_argument("--tokens", type=int, default=823, help="of the sample (823)")
    parser.add_argument("--methods", nargs="+", default=("full", "lora"), choices=METHODS)
    parser.add_argument("--checkpointing", nargs="+", default=SWITCH, choices=SWITCH)
    parser.add_argument("--use_flash_attention", action="store_true", help="ours, on a GPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--gradient_checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args)

    layers = (SIZES[args.size]["num_hidden_layers"], CLIPS[args.size]["num_hidden_layers"])
    rows = []
    for method in args.methods:
        for checkpointing in args.checkpointing:
            measured = [measure(args, method, checkpointing, layers) for layers in SLICES]
            for (decoder, clip), one in zip(SLICES, measured, strict=True):
                rows.append(row([method, checkpointing, f"{decoder} + {clip}"], one))
            name = [method, checkpointing, f"{layers[0]} + {layers[1]}, calculated from slices"]
            rows.append(row(name, whole(measured, layers)))
    name = f"Training step at the widths of the {args.size} model, {args.tokens:,} tokens"
    part = f"{'-'.join(args.methods)}-checkpointing-{'-'.join(args.checkpointing)}"
    report(name, HEADER, rows, args.save, part)


if __name__ == "__main__":
    main()
