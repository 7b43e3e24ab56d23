"""A Trainer of the tiny model, in the test's own process."""

import argparse
from collections.abc import Sequence

from peft import LoraConfig
from transformers import Trainer

from helpers.records import RECORDS
from phi3v.data.collators import TrainingCollator
from phi3v.training.arguments import make_parser, parse_arguments
from phi3v.training.loading import load_model, load_processor
from phi3v.training.training import make_training_arguments


def arguments(checkpoint, output_dir, *flags: str) -> argparse.Namespace:
    return parse_arguments(
        make_parser("test"),
        [
            f"--model_name_or_path={checkpoint}",
            f"--output_dir={output_dir}",
            *("--batch_size", "2", "--num_crops", "1", "--no-tqdm", "--deepspeed", "none"),
            *flags,
        ],
    )


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """As the recipes have it: all linear layers."""
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank * args.lora_alpha_ratio,
        lora_dropout=args.lora_dropout,
        target_modules=[
            *("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"),
            *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
            *("img_projection.0", "img_projection.2"),
        ],
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )


def make_trainer(
    args: argparse.Namespace, records: list[dict] = RECORDS, callbacks: Sequence = ()
) -> Trainer:
    training_args = make_training_arguments(args)
    training_args.logging_steps = 1
    training_args.warmup_steps = 0
    return Trainer(
        model=load_model(args, training_args, lora_config(args)),
        args=training_args,
        data_collator=TrainingCollator(load_processor(args)),
        train_dataset=records,
        callbacks=list(callbacks),
    )
