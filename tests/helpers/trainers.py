"""A Trainer of the tiny model, in the test's own process."""

import argparse
from collections.abc import Sequence

from transformers import Trainer

from helpers.records import RECORDS
from phi3v.data.collators import TrainingCollator
from phi3v.training.arguments import make_parser, parse_arguments
from phi3v.training.loading import load_model, load_processor
from phi3v.training.throughput import ThroughputCallback
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


def make_trainer(
    args: argparse.Namespace, records: list[dict] = RECORDS, callbacks: Sequence = ()
) -> Trainer:
    training_args = make_training_arguments(args)
    training_args.logging_steps = 1
    training_args.warmup_steps = 0
    throughput = ThroughputCallback()
    trainer = Trainer(
        model=load_model(args, training_args),
        args=training_args,
        data_collator=TrainingCollator(load_processor(args), for_trainer=True),
        train_dataset=records,
        callbacks=[throughput, *callbacks],
    )
    throughput.time_batches(trainer)
    return trainer
