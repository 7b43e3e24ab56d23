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

from transformers import Trainer

from phi3v.data.bad_samples import UniqueIds, keep_good
from phi3v.data.collators import TrainingCollator
from phi3v.data.conversations import check_record
from phi3v.data.images import check_images
from phi3v.data.packing import fit_lengths
from phi3v.data.sources import (
    CAULDRON,
    CAULDRON_COLUMNS,
    Records,
    cauldron_records,
    load_rows,
)
from phi3v.errors import DataError
from phi3v.training.arguments import make_parser, parse_arguments
from phi3v.training.checkpoints import CheckpointCallback, find_checkpoint, run_settings
from phi3v.training.evaluation import EvaluateEvery, Result, evaluate
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
EXAMPLES_COLUMNS = {"image", "query", "answers"}


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


def load_dataset(args, name_or_path: str, split: str) -> Records:
    """Rows of either layout, told apart by their columns."""
    flag = "--dataset_name_or_path" if split == "train" else "--eval_dataset_name_or_path"
    rows = load_rows(name_or_path, [EXAMPLES_COLUMNS, CAULDRON_COLUMNS], "docvqa", split, flag)
    if "texts" in rows.column_names:
        return cauldron_records(rows, "docvqa", skip_bad=args.skip_bad_samples)
    return from_examples(rows, args.seed, args.skip_bad_samples)


def from_examples(rows, seed: int, skip_bad: bool) -> Records:
    """Columns image, query {"en"}, answers: one of the answers is the target, drawn by the seed."""

    texts = rows.remove_columns("image")
    ids = UniqueIds("row")

    def where(index: int) -> str:
        return f"{rows.origin}: docvqa, row {index}"

    def make(index: int, images: list) -> dict:
        row = texts[index]
        if row.get("id", index) in (None, ""):
            raise DataError(f"{where(index)}: id is empty. Give every row one of its own.")
        if not row["answers"] or not all(answer and answer.strip() for answer in row["answers"]):
            raise DataError(
                f"{where(index)}: answers must be texts, at least one and none empty. Correct it."
            )
        if not (row["query"] or {}).get("en"):
            raise DataError(f"{where(index)}: query has no text `en`. Remove the row.")
        identifier = f"docvqa-{row.get('id', index)}"
        turn = {
            "images": images,
            "user": f"{row['query']['en']}\nAnswer briefly.",
            "assistant": random.Random(f"{seed} {identifier}").choice(row["answers"]),
        }
        record = {"id": identifier, "source": "docvqa", "conversations": [turn]}
        return {**check_record(record, where(index)), "answers": row["answers"]}

    def check(index: int) -> None:
        ids.add(make(index, [])["id"], index, where(index))

    # All texts are checked before the work starts; images are read when their record is.
    good = keep_good(range(len(rows)), check, str(rows.origin), skip_bad)
    return Records(good, lambda index: make(index, [rows[index]["image"]]))


def metrics(results: list[Result]) -> dict[str, float]:
    return {"anls": anls([r.text for r in results], [r.answers for r in results])}


def main():
    args = get_arguments()
    training_args = make_training_arguments(args)

    # Data before the model: a mistake in it should not cost the loading.
    train_source = args.dataset_name_or_path or (CAULDRON if args.full_train else MINI)
    train_dataset = load_dataset(args, train_source, "train")
    eval_dataset = load_dataset(args, args.eval_dataset_name_or_path, "test")
    processor = load_processor(args)
    train_dataset = check_images(train_dataset, "training data", processor, args)
    eval_dataset = check_images(eval_dataset, "evaluation data", processor, args)
    train_dataset = fit_lengths(train_dataset, processor, args)
    settings = run_settings(args, train_dataset)
    checkpoint = find_checkpoint(args, settings)

    model = load_model(args, training_args)
    throughput = ThroughputCallback()
    checkpoints = CheckpointCallback(args, processor, settings)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=TrainingCollator(
            processor, blank_image=training_args.world_size > 1, for_trainer=True
        ),
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
