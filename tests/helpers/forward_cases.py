"""The golden cases of the forward pass: what goes in, and what has to come out."""

import json

import numpy as np
import torch

from conftest import GOLDEN
from golden_util import make_image, unrle
from phi3v import Phi3VForCausalLM, Phi3VImageProcessor

CASES = list(json.loads((GOLDEN / "forward.json").read_text())["cases"])
WITH_LOSS = [name for name in CASES if not name.startswith(("batch2", "generate"))]


def rows(coded: list) -> torch.Tensor:
    return torch.tensor([unrle(row) for row in coded])


def case_inputs(case: dict, key: str = "input_ids_rle") -> dict:
    """The inputs of a golden case, with the official negative placeholder ids."""
    inputs = {"input_ids": rows(case.get("generate", {}).get(key) or case[key])}
    specs = case.get("images") or [
        spec for row in case.get("conversations", []) for turn in row for spec in turn[1]
    ]
    if specs:
        processor = Phi3VImageProcessor(num_crops=case["num_crops"])
        images = processor([make_image(spec) for spec in specs], return_tensors="pt")
        del images["num_img_tokens"]
        inputs.update(images)
    if case.get("attention_mask_rle"):
        inputs["attention_mask"] = rows(case["attention_mask_rle"]).bool()
    return inputs


def at_labels(labels: torch.Tensor) -> dict:
    """What asks for logits and loss at (b, s) labels alone, as `TrainingCollator` does."""
    rows, positions = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    kept = torch.stack([rows, positions])
    return {"labels": labels, "logits_to_keep": kept, "shift_labels": labels[rows, positions + 1]}


def check_outputs(model: Phi3VForCausalLM, inputs: dict, case: dict, name: str) -> None:
    """Hidden states and logits of a golden case, at its sampled positions."""
    arrays = np.load(GOLDEN / "forward.npz")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    positions = torch.from_numpy(arrays[f"{name}.pos"]).long()
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, positions].bool()
    logits = outputs.logits[:, positions]
    for ours, golden in [
        (logits[..., torch.from_numpy(arrays["cols"]).long()], arrays[f"{name}.logits_cols"]),
        (outputs.hidden_states[-1][:, positions], arrays[f"{name}.hidden"]),
        (logits.double().logsumexp(-1), arrays[f"{name}.logsumexp"]),
    ]:
        torch.testing.assert_close(ours[real], torch.from_numpy(golden)[real], rtol=0, atol=1e-3)
    assert outputs.logits.shape == (case["batch"], case["seq_len"], 32064)
