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
from collections.abc import Iterator

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
from phi3v.training.metrics import accuracy, auroc
from phi3v.training.throughput import ThroughputCallback
from phi3v.training.training import (
    finish_run,
    make_training_arguments,
    save_model,
    set_learning_rates,
)

YES, NO = "Yes", "No"
CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}
CHALLENGE_COLUMNS = {"id": (int, str), "img": str, "text": str, "label": int}


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
    name, n = args.dataset_name_or_path, args.num_eval_rows
    if os.path.isfile(f"{name}/train.jsonl"):
        train = load_rows(f"{name}/train.jsonl", CHALLENGE_COLUMNS)
        evaluation = load_rows(f"{name}/{args.eval_file}", CHALLENGE_COLUMNS)
        return (
            Records(train, challenge_record, image_dir=name),
            Records(evaluation, challenge_record, image_dir=name),
        )
    train = load_rows(name, CAULDRON_COLUMNS, config="hateful_memes", split=f"train[{n}:]")
    evaluation = load_rows(name, CAULDRON_COLUMNS, config="hateful_memes", split=f"train[:{n}]")
    return Records(train, cauldron_records), Records(evaluation, cauldron_records)


def cauldron_records(row: dict) -> Iterator[dict]:
    """A record for every question of a row, with its texts as they are."""
    if not row["images"]:
        raise ValueError("images is empty")
    for text in row["texts"] or []:
        if str(text["assistant"]).strip(" .\n").lower() not in (YES.lower(), NO.lower()):
            raise ValueError(f"an answer is {text['assistant']!r}, not {YES} or {NO}")
        turn = {"images": row["images"], "user": text["user"], "assistant": text["assistant"]}
        yield {"source": "hateful_memes", "conversations": [turn]}


def challenge_record(meme: dict) -> dict:
    """The challenge's json lines: id, img (a path in the folder), text, label (1 is hateful)."""
    if meme["label"] not in (0, 1):
        raise ValueError(f"label is {meme['label']}, not 0 or 1")
    turn = {
        "images": [meme["img"]],
        "user": f'Is a meme with this image and the text "{meme["text"]}" hateful? '
        "Answer yes or no.",
        "assistant": YES if meme["label"] else NO,
    }
    return {"id": str(meme["id"]), "source": "hateful_memes", "conversations": [turn]}


def metrics(results) -> dict[str, float]:
    """
    Of results with `text`, what was generated, `answers`, all lower-cased, and `probability`, that
    of YES.
    """
    hateful = [result.answers[0] == YES.lower() for result in results]
    numbers = {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}
    if len(set(hateful)) == 2:
        numbers["auroc"] = auroc([result.probability for result in results], hateful)
    return numbers


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
