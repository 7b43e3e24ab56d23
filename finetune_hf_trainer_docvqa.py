"""
Finetune Phi-3.5-vision on DocVQA: a scanned page and a question in, a short answer out.

The minimal run, on the mini-train split (1,000 pages):

    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py

The full training set, on A100 / H100 with flash attention and bf16:

    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --full_train --bf16 \\
        --use_flash_attention --batch_size 64 --output_dir <output_dir> \\
        --learning_rate <lr> --num_train_epochs <epochs>

No data-centre GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --batch_size 64 --use_lora --use_qlora

Evaluated by ANLS on the 200 test pages of nielsr/docvqa_1200_examples. The output folder then holds
the model (of LoRA: the adapter), the processor, trainer_state.json with the losses, and
eval_before.json and eval_after.json with the ANLS, every answer and every generated text.
"""

import random
from collections.abc import Iterator
from functools import partial

from datasets import Image
from transformers import Trainer

from phi3v.data.collators import TrainingCollator
from phi3v.data.prepare import prepare
from phi3v.data.records import Records
from phi3v.data.sources import load_rows
from phi3v.training.arguments import make_parser, parse_arguments
from phi3v.training.checkpoints import CheckpointCallback, find_checkpoint, run_settings
from phi3v.training.evaluation import EvaluateEvery, evaluate
from phi3v.training.loading import load_model, load_processor
from phi3v.training.loss_watch import LossWatch
from phi3v.training.metrics import anls
from phi3v.training.throughput import ThroughputCallback
from phi3v.training.training import (
    finish_run,
    make_training_arguments,
    save_model,
    set_learning_rates,
)

MINI = "nielsr/docvqa_1200_examples"
MINI_COLUMNS = {"id": object, "image": Image, "query": {"en": str}, "answers": [str]}
CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}


def get_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--full_train", action="store_true", help=f"train on all of DocVQA ({CAULDRON}, docvqa)"
    )
    group.add_argument(
        "--dataset_name_or_path",
        help=f"train on this hub id or local folder, with the columns of {MINI} or of {CAULDRON}",
    )
    group.add_argument(
        "--eval_dataset_name_or_path",
        default=MINI,
        help="evaluate on the test split of this hub id or local folder",
    )
    return parse_arguments(parser)


def load_datasets(args) -> tuple[Records, Records]:
    """Records for training and for evaluation."""
    train_name = args.dataset_name_or_path or (CAULDRON if args.full_train else MINI)
    train = load_rows(train_name, MINI_COLUMNS, CAULDRON_COLUMNS, config="docvqa")
    evaluation = load_rows(
        args.eval_dataset_name_or_path,
        MINI_COLUMNS,
        CAULDRON_COLUMNS,
        config="docvqa",
        split="test",
        flag="--eval_dataset_name_or_path",
    )
    to_record = partial(to_records, seed=args.seed)
    return Records(train, to_record), Records(evaluation, to_record)


def to_records(row: dict, seed: int) -> dict | Iterator[dict]:
    """The record or records of a row of either layout."""
    return cauldron_records(row) if "texts" in row else mini_record(row, seed)


def mini_record(row: dict, seed: int) -> dict:
    """One of the accepted answers is the one to learn, drawn by the seed."""
    identifier, question = f"docvqa-{row['id']}", (row["query"] or {}).get("en")
    if row["id"] in (None, "") or not question or not row["answers"]:
        raise ValueError("it needs an id, a text `en` in `query`, and `answers`")
    turn = {
        "images": [row["image"]],
        "user": f"{question}\nAnswer briefly.",
        "assistant": random.Random(f"{seed} {identifier}").choice(row["answers"]),
    }
    return {
        "id": identifier,
        "source": "docvqa",
        "conversations": [turn],
        "answers": row["answers"],
    }


def cauldron_records(row: dict) -> Iterator[dict]:
    """A record for every question of a row, with its texts as they are."""
    if not row["images"]:
        raise ValueError("images is empty")
    for text in row["texts"] or []:
        turn = {"images": row["images"], "user": text["user"], "assistant": text["assistant"]}
        yield {"source": "docvqa", "conversations": [turn]}


def metrics(results) -> dict[str, float]:
    """Of results with `text`, what was generated, and `answers`, all lower-cased."""
    return {"anls": anls([r.text for r in results], [r.answers for r in results])}


def main():
    args = get_arguments()
    training_args = make_training_arguments(args)

    # Data before the model: a mistake in it should not cost the loading.
    processor = load_processor(args)
    train_dataset, eval_dataset = prepare(*load_datasets(args), processor, args)
    settings = run_settings(args, train_dataset)
    checkpoint = find_checkpoint(args, settings)

    model = load_model(args, training_args)
    throughput = ThroughputCallback()
    checkpoints = CheckpointCallback(args, processor, settings)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=TrainingCollator(processor, with_ids=True),
        train_dataset=train_dataset,
        callbacks=[LossWatch(), throughput, checkpoints],
    )
    throughput.time_batches(trainer)
    set_learning_rates(trainer, args)

    def run_evaluation(file_name: str):
        evaluate(trainer, processor, eval_dataset, metrics, file_name, args)

    trainer.add_callback(EvaluateEvery(args.eval_steps, run_evaluation, checkpoints))

    if checkpoint is None:
        run_evaluation("eval_before.json")
    if args.eval_only:
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    save_model(trainer, processor, args)
    run_evaluation("eval_after.json")
    finish_run(args)


if __name__ == "__main__":
    main()
