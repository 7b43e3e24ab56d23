"""
Finetune Phi-3.5-vision on Hateful Memes: a meme in, whether it is hateful out.

Full finetuning on A100 / H100, on several machines too; on V100s without the last two flags:

    torchrun --nproc_per_node=8 --nnodes=<num_nodes> --master_addr=$MASTER_ADDR \\
        --master_port=$MASTER_PORT --node_rank=$NODE_RANK finetune_hf_trainer_hateful_memes.py \\
        --output_dir <output_dir> --batch_size 64 --use_flash_attention --bf16

A consumer GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --batch_size 64 --use_qlora

Evaluated before and after, by accuracy and AUROC, into eval_before.json and eval_after.json.
"""

import os
from collections.abc import Iterator
from functools import partial

from datasets import Image

import phi3v.training.metrics as scores
from phi3v.data import Mixture, Records, load_rows, mix, prepare
from phi3v.training import Phi3VTrainer, RecipeParser, load_model, load_processor, trainer_arguments
from phi3v.training.plan import plan_run

from peft import LoraConfig

YES, NO = "Yes", "No"
CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}
CHALLENGE_COLUMNS = {"id": (int, str), "img": str, "text": str, "label": int}


def get_arguments():
    parser = RecipeParser(__doc__)
    add = parser.add_argument_group("data").add_argument
    own = "hub id, or a folder of the challenge's files: train.jsonl, dev_seen.jsonl, img/"
    add("--dataset_name_or_path", action="datasets", default=CAULDRON, help=own)
    add("--num_eval_rows", type=int, default=500, help="first rows, to evaluate on")
    add("--eval_file", default="dev_seen.jsonl", help="challenge file to evaluate on")
    return parser.parse_args()


def load_datasets(args) -> tuple[Records | Mixture, Records | Mixture]:
    """Records for training and for evaluation."""
    names, n = args.dataset_name_or_path, args.num_eval_rows
    train = partial(load, file="train.jsonl", split=f"train[{n}:]", streaming=args.streaming)
    return mix(names, train), mix(names, partial(train, file=args.eval_file, split=f"train[:{n}]"))


def load(name: str, file: str, **part: object) -> Records:
    """A file of the challenge's; of any other dataset, a part of its rows."""
    if os.path.isfile(f"{name}/train.jsonl"):
        rows = load_rows(f"{name}/{file}", CHALLENGE_COLUMNS)
        return Records(rows, challenge_record, image_dir=name)
    rows = load_rows(name, CAULDRON_COLUMNS, config="hateful_memes", **part)
    return Records(rows, cauldron_records)


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
    """Of results with `text` and `answers`, all lower-cased, and `probability`, that of YES."""
    texts, answers = [r.text for r in results], [r.answers[0] for r in results]
    hateful = [answer == YES.lower() for answer in answers]
    numbers = {"accuracy": scores.accuracy(texts, answers)}
    if len(set(hateful)) == 2:
        numbers["auroc"] = scores.auroc([r.probability for r in results], hateful)
    return numbers


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
        choices=(YES, NO),
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
