"""
A training step on one device: time and peak memory, ours and the baseline's.

    python -m benchmarks.training_step                  # a scaled-down model on a CPU
    python -m benchmarks.training_step --size full      # Phi-3.5-vision's size on a GPU, in bf16

A step is forward, backward, gradient clipping and AdamW, on one DocVQA-like sample: a page of 5 x 3
crops and 66 tokens of text are 2,443 tokens, the published average, 8 of them labelled. Each side
runs in processes of its own, in turns, so that its peak memory is its own: of a GPU what PyTorch
allocated, of a CPU process what was in use on top of its libraries.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig

from benchmarks.baseline import BaselineForCausalLM
from benchmarks.models import SIZES, make_config, save_random
from benchmarks.side_by_side import in_turns, make_parser, ratios, report, spread
from phi3v import Phi3VForCausalLM
from phi3v.training.loading import add_adapters, quantization_config

METHODS = ("full", "frozen", "lora", "qlora")
SWITCH = ("yes", "no")
ROWS, COLUMNS, NUM_CROPS = 5, 3, 16
LABELS = 8


def make_batch(
    config, tokens: int, device: str, dtype: torch.dtype, seed: int = 1
) -> dict[str, torch.Tensor]:
    """One sample of random pixels, as the collator gives it."""
    torch.manual_seed(seed)
    side = 336
    image_tokens = (ROWS * COLUMNS + 1) * 144 + 1 + (ROWS + 1) * 12
    input_ids = torch.randint(10, 30000, (1, tokens))
    input_ids[0, 4 : 4 + image_tokens] = config.image_token_id
    labels = torch.full_like(input_ids, -100)
    labels[0, -LABELS:] = input_ids[0, -LABELS:]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    pixel_values = torch.zeros(1, NUM_CROPS + 1, 3, side, side)
    pixel_values[:, : ROWS * COLUMNS + 1] = torch.randn(1, ROWS * COLUMNS + 1, 3, side, side)
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "logits_to_keep": shifted != -100,
        "shift_labels": shifted[shifted != -100],
        "pixel_values": pixel_values.to(dtype),
        "image_sizes": torch.tensor([[ROWS * side, COLUMNS * side]]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


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


def load(args: argparse.Namespace, device: str, dtype: torch.dtype) -> torch.nn.Module:
    kind = Phi3VForCausalLM if args.child == "ours" else BaselineForCausalLM
    attention = args.attention if args.child == "ours" else "eager"
    model = kind.from_pretrained(
        args.folder,
        dtype=dtype,
        attn_implementation=attention,
        device_map={"": device},
        quantization_config=quantization_config(dtype) if args.method == "qlora" else None,
    )
    if args.method == "frozen":
        model.model.vision_embed_tokens.requires_grad_(False)
    if args.method in ("lora", "qlora"):
        model = add_adapters(model, LORA)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def run_child(args: argparse.Namespace) -> None:
    """One side in this process: print the seconds per step and the peak memory as JSON."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    libraries = process_memory("VmRSS")
    model = load(args, device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), eps=1e-7, fused=on_gpu)
    batch = make_batch(model.config, args.tokens, device, dtype)

    def step() -> tuple[float, float]:
        """Seconds and loss."""
        start = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, loss.item()

    step()  # allocates the optimizer's state, and on a GPU chooses kernels
    seconds, losses = zip(*(step() for _ in range(args.steps)), strict=True)
    peak = torch.cuda.max_memory_allocated() if on_gpu else process_memory("VmHWM") - libraries
    result = {"seconds": statistics.median(seconds), "peak": peak, "loss": losses[-1]}
    print(json.dumps(result))


def process_memory(field: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    # Not getrusage: its number starts at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


def measure(args: argparse.Namespace, side: str, method: str, checkpointing: str) -> dict:
    """Seconds a step, peak memory and loss of one side, from a process of its own."""
    command = [
        *(sys.executable, "-m", "benchmarks.training_step", "--child", side),
        *("--folder", args.folder, "--method", method, "--steps", str(args.steps)),
        *("--tokens", str(args.tokens), "--attention", args.attention),
        *(["--gradient_checkpointing"] if checkpointing == "yes" else []),
    ]
    measured = run(command)
    if not torch.cuda.is_available():
        # What is in use at once, as PyTorch counts it on a GPU: glibc keeps freed blocks, unless it
        # is told not to, which takes time. So this has a process of its own.
        measured["peak"] = run([*command, "--steps", "1"], MALLOC_MMAP_THRESHOLD_="1000000")["peak"]
    print(f"{method}, checkpointing {checkpointing}, {side}: {measured}", file=sys.stderr)
    return measured


def run(command: list[str], **environment: str) -> dict:
    """What a child prints; not a number where the device has too little memory."""
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if result.returncode:
        if "OutOfMemoryError" in result.stderr:
            return {"seconds": float("nan"), "peak": float("nan"), "loss": float("nan")}
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--steps", type=int, default=4, help="measured in every process (4)")
    parser.add_argument("--tokens", type=int, default=2443, help="of the sample (2443)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--checkpointing", nargs="+", default=SWITCH, choices=SWITCH)
    parser.add_argument(
        "--attention", default="sdpa", help="ours: sdpa (default) or flash_attention_2"
    )
    for name in ("child", "folder", "method"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--gradient_checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args)

    on_gpu = torch.cuda.is_available()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        dtype = torch.bfloat16 if on_gpu else torch.float32
        save_random(args.size, Path(folder), dtype, "cuda" if on_gpu else "cpu")
        for method in args.methods:
            for checkpointing in args.checkpointing:
                rows.append(compare(args, method, checkpointing))
    header = [
        *("method", "checkpointing", "ours, s", "baseline, s", "faster"),
        *("ours, tokens/s", "ours, peak GB", "baseline, peak GB", "memory"),
    ]
    parameters = sum(p.numel() for p in _meta(args.size).parameters())
    name = f"Training step, {parameters / 1e6:,.0f} M parameters, {args.tokens:,} tokens"
    report(name, header, rows, args.save)


def compare(args: argparse.Namespace, method: str, checkpointing: str) -> list[str]:
    sides = ("ours", "baseline")
    measured = in_turns(
        {side: lambda side=side: measure(args, side, method, checkpointing) for side in sides},
        args.rounds,
        warm_up=0,
    )
    seconds, peaks = (
        {side: [result[key] for result in measured[side]] for side in sides}
        for key in ("seconds", "peak")
    )
    return [
        *(method, checkpointing),
        *(spread(seconds["ours"], 3), spread(seconds["baseline"], 3)),
        f"{ratios(seconds['baseline'], seconds['ours'])}x",
        f"{args.tokens / statistics.median(seconds['ours']):,.0f}",
        *(f"{statistics.median(peaks[side]) / 1e9:.2f}" for side in sides),
        f"{statistics.median(peaks['ours']) / statistics.median(peaks['baseline']):.2f}",
    ]


def _meta(size: str) -> Phi3VForCausalLM:
    with torch.device("meta"):
        return Phi3VForCausalLM(make_config(size))


if __name__ == "__main__":
    main()
