"""
Samples per second of generation: ours in batches, the baseline one sample at a time.

    python -m benchmarks.evaluation                     # a scaled-down model on a CPU
    python -m benchmarks.evaluation --size full         # Phi-3.5-vision's size on a GPU, in bf16

Both answer the same DocVQA-like prompts (pages of 5 x 3 crops, about 2,440 tokens each), greedily,
with as many new tokens, and their tokens are compared: with random weights, close calls may fall
differently in another order of additions, so the share that agrees is printed.
"""

import contextlib
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.baseline import BaselineForCausalLM
from benchmarks.models import SIZES, save_random
from benchmarks.side_by_side import in_turns, make_parser, ratios, report, spread
from benchmarks.training_step import LABELS, TOKENS, collate, to_device
from phi3v import Phi3VForCausalLM
from phi3v.training.attention import attending_to_padding


def make_prompts(count: int, device: str, dtype: torch.dtype) -> list[dict]:
    """Prompts that end where the answer begins, each of its own length and pixels."""
    prompts = []
    for number in range(count):
        batch = to_device(collate(TOKENS - 4 * number, seed=number), device, dtype)
        input_ids = batch["input_ids"][:, :-LABELS]
        prompts.append(
            {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "pixel_values": batch["pixel_values"],
                "image_sizes": torch.as_tensor(batch["image_sizes"]),
            }
        )
    return prompts


def join(prompts: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the left."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def pad(name: str, value: int) -> torch.Tensor:
        rows = [prompt[name] for prompt in prompts]
        return torch.cat(
            [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows]
        )

    return {
        "input_ids": pad("input_ids", pad_token_id),
        "attention_mask": pad("attention_mask", 0),
        "pixel_values": torch.cat([prompt["pixel_values"] for prompt in prompts]),
        "image_sizes": torch.cat([prompt["image_sizes"] for prompt in prompts]),
    }


@torch.no_grad()
def generate(model, batches: list[dict], new_tokens: int) -> tuple[float, torch.Tensor]:
    """Seconds, and the new tokens of all rows."""
    start = time.perf_counter()
    answers = []
    for batch in batches:
        output = model.generate(
            **batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        answers.append(output[:, batch["input_ids"].shape[1] :].cpu())
    return time.perf_counter() - start, torch.cat(answers)


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--samples", type=int, default=8, help="prompts per round (8)")
    parser.add_argument("--batch_size", type=int, default=8, help="ours (8)")
    parser.add_argument("--new_tokens", type=int, default=8, help="of every answer (8)")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_random(args.size, Path(folder), dtype, device)
        kinds = {"ours": (Phi3VForCausalLM, "sdpa"), "baseline": (BaselineForCausalLM, "eager")}
        models = {
            name: kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
            .to(device)
            .eval()
            for name, (kind, attention) in kinds.items()
        }
    config = models["ours"].config
    prompts = make_prompts(args.samples, device, dtype)
    batches = [
        join(prompts[first : first + args.batch_size], config.pad_token_id)
        for first in range(0, len(prompts), args.batch_size)
    ]
    given = {"ours": batches, "baseline": prompts}
    answers = {}

    def measure(name: str) -> float:
        # As the recipes evaluate.
        with attending_to_padding(models[name]) if name == "ours" else contextlib.nullcontext():
            seconds, answers[name] = generate(models[name], given[name], args.new_tokens)
        return seconds

    sides = {name: lambda name=name: measure(name) for name in models}
    seconds = in_turns(sides, args.rounds)
    agree = (answers["ours"] == answers["baseline"]).float().mean().item()
    rows = [
        [
            *(str(args.batch_size), f"{args.samples} x {args.new_tokens}"),
            *(
                spread([args.samples / value for value in seconds[name]], 3)
                for name in ("ours", "baseline")
            ),
            f"{ratios(seconds['baseline'], seconds['ours'])}x",
            f"{agree:.1%}",
        ]
    ]
    header = ["batch", "samples x new tokens", "ours, samples/s", "baseline, samples/s"]
    report("Evaluation", [*header, "faster", "tokens that agree"], rows, args.save)


if __name__ == "__main__":
    main()
