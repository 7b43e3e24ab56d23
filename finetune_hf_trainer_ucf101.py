"""
Finetune Phi-3.5-vision on UCF-101: eight frames of a video in, the name of its class out.

Convert the dataset first:

    python convert_ucf101.py --out_dir /path/to/converted_ucf101

Full finetuning on one machine with 4 GPUs:

    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101

A100 / H100, with flash attention and bf16:

    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101 --use_flash_attention --bf16 --output_dir ./ucf101_full

A consumer GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py \\
        --data_dir /path/to/converted_ucf101 --use_lora --use_qlora

Conversations of your own, in the form of LLaVA, TRL or ms-swift:

    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py \\
        --train_file train.json --eval_file eval.json --image_dir images --num_crops 16

Several files, with weights if wanted; loss and metric are those of each file as well:

    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --image_dir images \\
        --train_file a.jsonl:0.7 b.jsonl:0.3 --eval_file a_val.jsonl b_val.jsonl

Evaluated before and after, by accuracy: it and every generated text go to eval_before.json and
eval_after.json, beside the model.
"""

from functools import partial
from pathlib import Path

from phi3v.data import Mixture, Records, load_records, mix, prepare
from phi3v.training import Phi3VTrainer, RecipeParser, load_model, load_processor, trainer_arguments
from phi3v.training.metrics import accuracy
from phi3v.training.plan import plan_run

from peft import LoraConfig


def get_arguments():
    # Eight images per sample: fewer crops each than for a page of text.
    parser = RecipeParser(__doc__, num_crops=4)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", help="the converter's --out_dir")
    data.add_argument("--eval_split", choices=["val", "test"], default="val", help="to evaluate on")
    own = "conversations to train on, in place of --data_dir's"
    data.add_argument("--train_file", action="datasets", help=own)
    data.add_argument("--eval_file", action="datasets", weights=False, help="and to evaluate on")
    data.add_argument("--image_dir", help="that image paths are relative to; shards need none")
    args = parser.parse_args()
    if args.data_dir is None and None in (args.train_file, args.eval_file):
        parser.error("give --data_dir, or --train_file, --eval_file and --image_dir.")
    return args


def load_datasets(args) -> tuple[Records | Mixture, Records | Mixture]:
    """Records for training and for evaluation: a video's frames, a question, its class."""
    folder = Path(args.data_dir or ".")
    train_file = args.train_file or folder / "ucf101_train.jsonl"
    eval_file = args.eval_file or folder / f"ucf101_{args.eval_split}.jsonl"
    image_dir = args.image_dir or (args.data_dir and folder / "images")
    load = partial(load_records, image_dir=image_dir)
    return mix(train_file, partial(load, streaming=args.streaming)), mix(eval_file, load)


def metrics(results) -> dict[str, float]:
    """Of results with `text`, what was generated, and `answers`, all lower-cased."""
    return {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}


def lora_config(args) -> LoraConfig:
    """Adapters on all linear layers; on those of the vision model unless it is frozen."""
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
    vision = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank * args.lora_alpha_ratio,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        target_modules=[*targets, *vision, "img_projection.0", "img_projection.2"],
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )


def main():
    args = get_arguments()
    training_args = trainer_arguments(
        args,  # its flags win: --optim adamw_bnb_8bit, --report_to wandb, ...
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        lr_scheduler_type="linear",
        warmup_steps=50,
        logging_steps=10,
    )
    processor = load_processor(args)
    train_dataset, eval_dataset = prepare(*load_datasets(args), processor, args)
    plan_run(args, training_args, processor, train_dataset, eval_dataset, lora_config(args))
    trainer = Phi3VTrainer(
        model=load_model(args, training_args, lora_config(args)),
        args=training_args,
        flags=args,
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=metrics,
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None:
        trainer.evaluate(file_name="eval_before.json")
    if not args.eval_only:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.evaluate(file_name="eval_after.json")
        if args.merge_lora:
            trainer.merge_adapter()


if __name__ == "__main__":
    main()
