"""
Finetune Phi-3.5-vision on DocVQA: a scanned page and a question in, a short answer out.

The minimal run, on the mini-train split (1,000 pages):

    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py

The full training set, on A100 / H100 with flash attention and bf16:

    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --full_train --bf16 \\
        --use_flash_attention --batch_size 64 --output_dir <output_dir> \\
        --learning_rate <lr> --num_train_epochs <epochs>

A consumer GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --batch_size 64 --use_lora --use_qlora

Evaluated before and after, by ANLS on the 200 test pages of nielsr/docvqa_1200_examples: the metric
and every generated text go to eval_before.json and eval_after.json, beside the model.
"""

import random
from collections.abc import Iterator
from functools import partial

from datasets import Image

from phi3v.data import Mixture, Records, load_rows, mix, prepare
from phi3v.training import Phi3VTrainer, RecipeParser, load_model, load_processor, trainer_arguments
from phi3v.training.metrics import anls
from phi3v.training.plan import plan_run

from peft import LoraConfig

MINI = "nielsr/docvqa_1200_examples"
MINI_COLUMNS = {"id": object, "image": Image, "query": {"en": str}, "answers": [str]}
CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}


def get_arguments():
    parser = RecipeParser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--full_train", action="store_true", help=f"train on {CAULDRON}, docvqa")
    add("--dataset_name_or_path", action="datasets", help="train on this hub id or local folder")
    test = "evaluate on its test split"
    add("--eval_dataset_name_or_path", action="datasets", weights=False, default=MINI, help=test)
    return parser.parse_args()


def load_datasets(args) -> tuple[Records | Mixture, Records | Mixture]:
    """Records for training and for evaluation."""

    def load(name: str, **part: object) -> Records:
        rows = load_rows(name, MINI_COLUMNS, CAULDRON_COLUMNS, config="docvqa", **part)
        return Records(rows, partial(to_records, seed=args.seed))

    train = args.dataset_name_or_path or (CAULDRON if args.full_train else MINI)
    test = partial(load, split="test", flag="--eval_dataset_name_or_path")
    train_dataset = mix(train, partial(load, streaming=args.streaming))
    return train_dataset, mix(args.eval_dataset_name_or_path, test)


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
    record = {"id": identifier, "source": "docvqa", "conversations": [turn]}
    return {**record, "answers": row["answers"]}


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
