"""
One recipe under every strategy and the others under one, on small data, one run after the other in
the same processes:

    PYTHONPATH=. torchrun --nproc_per_node=2 tests/strategy_runs.py <checkpoint> <data> <folder>

Writes <folder>/runs.json: "<recipe> <strategy>" -> what the run trained, see `run`.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from small_datasets import cauldron_row, examples_row, write_parquet, write_videos

REPO = Path(__file__).parent.parent
LORA = ("--use_lora", "--lora_rank", "2")
FROZEN = ("--freeze_vision_model",)
# Full finetuning is under ZeRO-2 and LoRA under DDP, where a strategy doesn't say otherwise.
STRATEGIES = {
    "full": (),
    "full-ddp": ("--deepspeed", "none"),
    "full-zero3": ("--deepspeed", str(REPO / "ds_configs" / "zero3.json")),
    "full-8bit": ("--optim", "adamw_bnb_8bit"),
    "full-offload": ("--deepspeed", str(REPO / "ds_configs" / "zero3_offload.json")),
    "frozen": FROZEN,
    "lora": LORA,
    "lora-frozen": (*LORA, *FROZEN),
    "qlora": (*LORA, "--use_qlora"),
    "qlora-frozen": (*LORA, "--use_qlora", *FROZEN),
}
# The recipes differ in their data and metrics alone.
RUNS = [("ucf101", strategy) for strategy in STRATEGIES]
RUNS += [(recipe, "full") for recipe in ("docvqa", "hateful_memes", "nlvr2")]


def write_datasets(folder: Path) -> None:
    """A small dataset for each recipe."""
    answers = ["Yes.", "No."]
    memes = [cauldron_row(i, 1, ("Hateful?", answers[i % 2])) for i in range(10)]
    pairs = [cauldron_row(i, 2, ("Same?", ["True.", "False."][i % 2])) for i in range(10)]
    write_parquet(folder / "docvqa", "train", [examples_row(i) for i in range(8)])
    write_parquet(folder / "docvqa", "test", [examples_row(i) for i in range(2)])
    write_parquet(folder / "hateful_memes", "train", memes)
    write_parquet(folder / "nlvr2", "train", pairs)
    write_videos(folder / "ucf101", "train", 8)
    write_videos(folder / "ucf101", "val", 2)


def data_flags(recipe: str, folder: Path) -> list[str]:
    """The flags that name the recipe's dataset in `folder`."""
    path = str(folder / recipe)
    if recipe == "ucf101":
        return ["--data_dir", path]
    flags = ["--dataset_name_or_path", path]
    if recipe == "docvqa":
        return [*flags, "--eval_dataset_name_or_path", path]
    return [*flags, "--num_eval_rows", "2"]


def run(recipe: str, strategy: str, checkpoint: Path, data: Path, folder: Path) -> dict:
    """
    Run the recipe's main() and tell what it trained.

    Weight decay is off, so that AdamW leaves a tensor as it is where its gradients are all zero:
    what changed had gradients.

    Returns:
        `changed`: names of the tensors that are others after training; `same`: of the rest;
        `losses`: of every step; `engine`: what accelerate calls it.
    """
    # Or the run would have the engine of the one before it.
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    output_dir = folder / f"{recipe}-{strategy}"
    module = importlib.import_module(f"finetune_hf_trainer_{recipe}")
    load_model, trainer = module.load_model, module.Phi3VTrainer
    adapters, engines = {}, []

    def load_and_keep(*args):
        model = load_model(*args)
        adapters.update(
            (n, p.detach().clone()) for n, p in model.named_parameters() if "lora_" in n
        )
        return model

    class NotingTrainer(trainer):
        def save_model(self, *args, **kwargs):
            engines.append(self.accelerator.distributed_type.value)
            super().save_model(*args, **kwargs)

    module.load_model, module.Phi3VTrainer = load_and_keep, NotingTrainer
    sys.argv = [
        *(module.__file__, *data_flags(recipe, data), *STRATEGIES[strategy], "--no-tqdm"),
        *("--model_name_or_path", str(checkpoint), "--output_dir", str(output_dir)),
        *("--batch_size", "4", "--num_crops", "1", "--wd", "0", "--max_new_tokens", "2"),
        *("--num_train_epochs", "2", "--learning_rate", "1e-2", "--logging_steps", "1"),
    ]
    try:
        module.main()
    finally:
        module.load_model, module.Phi3VTrainer = load_model, trainer
    if adapters:
        # PEFT's files leave the adapter's name out.
        before = {name.replace(".default.", "."): tensor for name, tensor in adapters.items()}
        after = load_file(output_dir / "adapter_model.safetensors")
    else:
        before = load_file(checkpoint / "model.safetensors")
        after = load_file(output_dir / "model.safetensors")
    assert before.keys() == after.keys()
    same = sorted(name for name in before if torch.equal(before[name], after[name]))
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {
        "changed": sorted(before.keys() - set(same)),
        "same": same,
        "engine": engines[0],
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def main() -> None:
    checkpoint, data, folder = map(Path, sys.argv[1:])
    runs = {}
    for recipe, strategy in RUNS:
        runs[f"{recipe} {strategy}"] = run(recipe, strategy, checkpoint, data, folder)
    if os.environ["RANK"] == "0":
        (folder / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
