"""The recipes' Trainer of the tiny model, in the test's own process."""

import argparse

from finetune_hf_trainer_ucf101 import lora_config
from helpers.records import RECORDS
from phi3v.training import Phi3VTrainer, RecipeParser, load_model, load_processor, trainer_arguments

# Those of the recipes, but that every step is logged and the rate is high from the first one on.
SETTINGS = {
    "optim": "adamw_torch_fused",
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "warmup_steps": 0,
    "logging_steps": 1,
    "report_to": "none",
}


def arguments(checkpoint, output_dir, *flags: str) -> argparse.Namespace:
    return RecipeParser("test").parse_args(
        [
            f"--model_name_or_path={checkpoint}",
            f"--output_dir={output_dir}",
            *("--batch_size", "2", "--num_crops", "1", "--no-tqdm", "--deepspeed", "none"),
            *flags,
        ],
    )


def loaded(args: argparse.Namespace):
    """The model, as a recipe loads it."""
    return load_model(args, trainer_arguments(args), lora_config(args))


def make_trainer(
    args: argparse.Namespace, records: list[dict] = RECORDS, **options: object
) -> Phi3VTrainer:
    training_args = trainer_arguments(args, **SETTINGS)
    return Phi3VTrainer(
        model=load_model(args, training_args, lora_config(args)),
        args=training_args,
        flags=args,
        processing_class=load_processor(args),
        train_dataset=records,
        eval_dataset=records,
        **{"compute_metrics": lambda results: {}, **options},
    )
