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
from pathlib import Path

from transformers import Trainer

from phi3v.data.bad_samples import keep_good
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
    read_fields,
    split_rows,
)
from phi3v.errors import DataError
from phi3v.training.arguments import make_parser, parse_arguments
from phi3v.training.checkpoints import CheckpointCallback, find_checkpoint, run_settings
from phi3v.training.evaluation import EvaluateEvery, Result, evaluate
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

# For the official files, which hold bare statements.
QUESTION = "{sentence} Is this true or false?"


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
    folder = Path(args.dataset_name_or_path)
    if os.path.isfile(folder / "train.json"):
        images = defaultdict(list)
        for path in sorted(folder.rglob("*-img[01].png")):
            images[path.name].append(str(path))
        names = ("train.json", args.eval_file)
        return tuple(official_records(folder / name, images, args) for name in names)
    rows = load_rows(args.dataset_name_or_path, [CAULDRON_COLUMNS], "nlvr2")
    train, evaluation = split_rows(rows, args.num_eval_rows)
    return tuple(
        cauldron_records(rows, "nlvr2", indices, args.skip_bad_samples, images=2)
        for indices in (train, evaluation)
    )


def official_records(path: Path, images: dict[str, list[str]], args) -> Records:
    """
    The official json lines: sentence, label ("True" or "False"), identifier.

    An identifier is <split>-<set>-<pair>-<sentence>; its images are <split>-<set>-<pair>-img0.png
    and -img1.png.
    """
    fields = {"sentence": str, "label": (str, bool), "identifier": str}
    keys = read_fields(path, fields, "identifier", args.skip_bad_samples)

    def image_names(identifier: str) -> list[str]:
        return [f"{identifier.rsplit('-', 1)[0]}-img{side}.png" for side in (0, 1)]

    def make(key: tuple[str, dict]) -> dict:
        where, row = key
        names = image_names(row["identifier"])
        for name in names:
            if len(found := images.get(name, [])) != 1:
                raise DataError(
                    f"{where}: needs one image {name} below {path.parent}, and there is "
                    f"{' and '.join(found) or 'none'}."
                )
        if str(row["label"]) not in ("True", "False"):
            raise DataError(f"{where}: label must be True or False. Correct it.")
        turn = {
            "images": [images[name][0] for name in names],
            "user": QUESTION.format(sentence=row["sentence"]),
            "assistant": str(row["label"]),
        }
        record = {"id": row["identifier"], "source": "nlvr2", "conversations": [turn]}
        return check_record(record, where)

    return Records(keep_good(keys, make, str(path), args.skip_bad_samples), make)


def metrics(results: list[Result]) -> dict[str, float]:
    return {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}


def main():
    args = get_arguments()
    training_args = make_training_arguments(args)

    # Data before the model: a mistake in it should not cost the loading.
    train_dataset, eval_dataset = load_datasets(args)
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
