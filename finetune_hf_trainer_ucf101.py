"""
Finetune Phi-3.5-vision on UCF-101: eight frames of a video in, the name of its class out.

Convert the dataset first, or bring your own frames and jsonl in the same format:

    python convert_ucf101.py --out_dir /path/to/converted_ucf101

Full finetuning on one machine with 4 GPUs:

    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101

A100 / H100, with flash attention and bf16:

    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101 --use_flash_attention --bf16 --output_dir ./ucf101_full

No data-centre GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101 --use_lora --use_qlora

The output folder then holds the model (of LoRA: the adapter), the processor, trainer_state.json
with the losses, and eval_before.json and eval_after.json with the accuracy, every answer and every
generated text.
"""

from pathlib import Path

from transformers import Trainer

from phi3v.data.collators import TrainingCollator
from phi3v.data.conversations import load_conversations
from phi3v.data.images import check_images
from phi3v.data.packing import fit_lengths
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


def get_arguments():
    # Eight images a sample: fewer crops each than for a page of text.
    parser = make_parser(__doc__, num_crops=4)
    group = parser.add_argument_group("data")
    group.add_argument("--data_dir", required=True, help="the converter's --out_dir")
    group.add_argument(
        "--eval_split", choices=["val", "test"], default="val", help="split to evaluate on"
    )
    return parse_arguments(parser)


def load_split(args, split: str):
    """
    A split of the converted dataset: conversations of one turn, a video's frames and its class.
    """
    folder = Path(args.data_dir)
    return load_conversations(
        folder / f"ucf101_{split}.jsonl", folder / "images", args.skip_bad_samples
    )


def metrics(results: list[Result]) -> dict[str, float]:
    return {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}


def main():
    args = get_arguments()
    training_args = make_training_arguments(args)

    # Data before the model: a mistake in it should not cost the loading.
    train_dataset = load_split(args, "train")
    eval_dataset = load_split(args, args.eval_split)
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
