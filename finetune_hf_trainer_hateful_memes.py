"""
Finetune Phi-3.5-vision on Hateful Memes: a meme in, whether it is hateful out.

Full finetuning on A100 / H100, on one or several machines, with flash attention and bf16:

    torchrun --nproc_per_node=8 --nnodes=<num_nodes> --master_addr=$MASTER_ADDR \\
        --master_port=$MASTER_PORT --node_rank=$NODE_RANK finetune_hf_trainer_hateful_memes.py \\
        --output_dir <output_dir> --batch_size 64 --use_flash_attention --bf16

8x V100-32GB: the same without --use_flash_attention --bf16 (fp16 mixed precision).

No data-centre GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> \\
        --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> \\
        --batch_size 64 --use_lora --use_qlora

Evaluated by accuracy, and by AUROC, the challenge's own metric, from the probability that the model
gives to "yes". The output folder then holds the model (of LoRA: the adapter), the processor,
trainer_state.json with the losses, and eval_before.json and eval_after.json with the metrics, every
answer, every generated text and its probability.
"""

import os
from pathlib import Path

from transformers import Trainer

from phi3v.data.bad_samples import keep_good
from phi3v.data.collators import TrainingCollator
from phi3v.data.conversations import ImageFolder, check_record
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
from phi3v.errors import DataError, quoted
from phi3v.training.arguments import make_parser, parse_arguments
from phi3v.training.checkpoints import CheckpointCallback, find_checkpoint, run_settings
from phi3v.training.evaluation import EvaluateEvery, Result, evaluate
from phi3v.training.loading import load_model, load_processor
from phi3v.training.loss_watch import LossWatch
from phi3v.training.metrics import accuracy, auroc, normalise
from phi3v.training.throughput import ThroughputCallback
from phi3v.training.training import (
    finish_run,
    make_training_arguments,
    save_model,
    set_learning_rates,
)

YES, NO = "Yes", "No"
# For the challenge's own files, which come without a question.
QUESTION = 'Is a meme with this image and the text "{text}" hateful? Answer yes or no.'


def get_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name_or_path",
        default=CAULDRON,
        help="hub id or local folder with the_cauldron's columns, or a folder of the challenge's "
        "own files: train.jsonl, dev_seen.jsonl, img/",
    )
    group.add_argument(
        "--num_eval_rows", type=int, default=500, help="first rows, kept out of training"
    )
    group.add_argument(
        "--eval_file", default="dev_seen.jsonl", help="of the challenge's files, to evaluate on"
    )
    return parse_arguments(parser)


def load_datasets(args) -> tuple[Records, Records]:
    """Records for training and for evaluation."""
    folder = Path(args.dataset_name_or_path)
    if os.path.isfile(folder / "train.jsonl"):
        names = ("train.jsonl", args.eval_file)
        return tuple(challenge_records(folder, name, args.skip_bad_samples) for name in names)
    rows = load_rows(args.dataset_name_or_path, [CAULDRON_COLUMNS], "hateful_memes")
    train, evaluation = split_rows(rows, args.num_eval_rows)
    return tuple(
        cauldron_records(
            rows, "hateful_memes", indices, args.skip_bad_samples, check_more=check_answer
        )
        for indices in (train, evaluation)
    )


def check_answer(record: dict, where: str):
    """The metrics know two answers."""
    answer = record["conversations"][0]["assistant"]
    if normalise(answer) not in (normalise(YES), normalise(NO)):
        raise DataError(f"{where}: assistant is {quoted(answer)}, not {YES} or {NO}. Correct it.")


def challenge_records(folder: Path, name: str, skip_bad: bool) -> Records:
    """The challenge's json lines: id, img (a path in the folder), text, label (1 is hateful)."""
    fields = {"id": (int, str), "img": str, "text": str, "label": int}
    keys = read_fields(folder / name, fields, "id", skip_bad)
    images = ImageFolder(folder)

    def make(key: tuple[str, dict]) -> dict:
        where, meme = key
        if meme["label"] not in (0, 1):
            raise DataError(f"{where}: label is {meme['label']}, not 0 or 1. Correct it.")
        turn = {
            "images": [images.find(meme["img"], f"{where}: img")],
            "user": QUESTION.format(text=meme["text"]),
            "assistant": YES if meme["label"] else NO,
        }
        record = {"id": str(meme["id"]), "source": "hateful_memes", "conversations": [turn]}
        return check_record(record, where)

    return Records(keep_good(keys, make, str(folder / name), skip_bad), make)


def metrics(results: list[Result]) -> dict[str, float]:
    hateful = [result.answers[0] == normalise(YES) for result in results]
    numbers = {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}
    if len(set(hateful)) == 2:
        numbers["auroc"] = auroc([result.probability for result in results], hateful)
    return numbers


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
        evaluate(trainer, processor, eval_dataset, metrics, file_name, args, (YES, NO))

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
