"""
Finetune Phi-3.5-vision on NLVR2: two images and a statement in, whether it is true out.

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py

A100 / H100, with flash attention and bf16:

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py --use_flash_attention --bf16 \\
        --batch_size 64 --output_dir <output_dir> --learning_rate <lr> --num_train_epochs <epochs>

No data-centre GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_nlvr2.py --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_nlvr2.py --batch_size 64 --use_lora --use_qlora

The output folder then holds the model (of LoRA: the adapter), the processor, trainer_state.json
with the losses, and eval_before.json and eval_after.json with the accuracy, every answer and every
generated text.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

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
from phi3v.training.metrics import accuracy
from phi3v.training.throughput import ThroughputCallback
from phi3v.training.training import (
    finish_run,
    make_training_arguments,
    save_model,
    set_learning_rates,
)

CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}
OFFICIAL_COLUMNS = {"sentence": str, "label": (str, bool), "identifier": str}


def get_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name_or_path",
        default=CAULDRON,
        help="hub id or local folder with the_cauldron's columns, or a folder of the official "
        "files: train.json, dev.json (json lines), and the images in any folders below it",
    )
    group.add_argument(
        "--num_eval_rows", type=int, default=500, help="first rows, kept out of training"
    )
    group.add_argument(
        "--eval_file", default="dev.json", help="of the official files, to evaluate on"
    )
    return parse_arguments(parser)


def load_datasets(args) -> tuple[Records, Records]:
    """Records for training and for evaluation."""
    name, n = args.dataset_name_or_path, args.num_eval_rows
    if os.path.isfile(f"{name}/train.json"):
        train = load_rows(f"{name}/train.json", OFFICIAL_COLUMNS)
        evaluation = load_rows(f"{name}/{args.eval_file}", OFFICIAL_COLUMNS)
        to_record = partial(official_record, paths=find_images(name))
    else:
        train = load_rows(name, CAULDRON_COLUMNS, config="nlvr2", split=f"train[{n}:]")
        evaluation = load_rows(name, CAULDRON_COLUMNS, config="nlvr2", split=f"train[:{n}]")
        to_record = cauldron_records
    return Records(train, to_record), Records(evaluation, to_record)


def cauldron_records(row: dict) -> Iterator[dict]:
    """A record for every question of a row, with its texts as they are."""
    if len(row["images"] or []) != 2:
        raise ValueError(f"it has {len(row['images'] or [])} images, not 2")
    for text in row["texts"] or []:
        turn = {"images": row["images"], "user": text["user"], "assistant": text["assistant"]}
        yield {"source": "nlvr2", "conversations": [turn]}


def find_images(folder: str) -> dict[str, list[str]]:
    """The paths of all images of the official files, by name."""
    paths = defaultdict(list)
    for path in sorted(Path(folder).rglob("*-img[01].png")):
        paths[path.name].append(str(path))
    return paths


def official_record(row: dict, paths: dict[str, list[str]]) -> dict:
    """
    The record of a line of the official files.

    An identifier is <split>-<set>-<pair>-<sentence>; its images are <split>-<set>-<pair>-img0.png
    and -img1.png, in any folder below.
    """
    pair = row["identifier"].rsplit("-", 1)[0]
    images = [paths.get(f"{pair}-img{side}.png", []) for side in (0, 1)]
    if any(len(found) != 1 for found in images):
        raise ValueError(f"needs one {pair}-img0.png and one -img1.png, and there is {images}")
    if str(row["label"]) not in ("True", "False"):
        raise ValueError("label must be True or False")
    turn = {
        "images": [path for [path] in images],
        "user": f"{row['sentence']} Is this true or false?",
        "assistant": str(row["label"]),
    }
    return {"id": row["identifier"], "source": "nlvr2", "conversations": [turn]}


def metrics(results) -> dict[str, float]:
    """Of results with `text`, what was generated, and `answers`, all lower-cased."""
    return {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}


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
