"""
Finetune Phi-3.5-vision on NLVR2: two images and a statement in, whether it is true out.

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py

A100 / H100, with flash attention and bf16:

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py --use_flash_attention --bf16 \\
        --batch_size 64 --output_dir <output_dir> --learning_rate <lr> --num_train_epochs <epochs>

A consumer GPU: LoRA, or QLoRA with a 4-bit model:

    torchrun --nproc_per_node=2 finetune_hf_trainer_nlvr2.py --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_nlvr2.py --batch_size 64 --use_lora --use_qlora

Evaluated before and after, by accuracy, into eval_before.json and eval_after.json, texts included.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from datasets import Image

from phi3v.data import Mixture, Records, load_rows, mix, prepare
from phi3v.training import Phi3VTrainer, RecipeParser, load_model, load_processor, trainer_arguments
from phi3v.training.metrics import accuracy
from phi3v.training.plan import plan_run

from peft import LoraConfig

CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}
OFFICIAL_COLUMNS = {"sentence": str, "label": (str, bool), "identifier": str}


def get_arguments():
    parser = RecipeParser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name_or_path", action="datasets", default=CAULDRON, help="hub id or a folder")
    add("--num_eval_rows", type=int, default=500, help="first rows, to evaluate on")
    add("--eval_file", default="dev.json", help="official file to evaluate on")
    return parser.parse_args()


def load_datasets(args) -> tuple[Records | Mixture, Records | Mixture]:
    """Records for training and for evaluation."""
    names, n = args.dataset_name_or_path, args.num_eval_rows
    train = partial(load, file="train.json", split=f"train[{n}:]", streaming=args.streaming)
    return mix(names, train), mix(names, partial(train, file=args.eval_file, split=f"train[:{n}]"))


def load(name: str, file: str, **part: object) -> Records:
    """An official file; of any other dataset, a part of its rows."""
    if Path(name, "train.json").is_file():
        rows = load_rows(f"{name}/{file}", OFFICIAL_COLUMNS)
        return Records(rows, partial(official_record, paths=find_images(name)))
    return Records(load_rows(name, CAULDRON_COLUMNS, config="nlvr2", **part), cauldron_records)


def cauldron_records(row: dict) -> Iterator[dict]:
    """A record for every question of a row, with its texts as they are."""
    if len(row["images"] or []) != 2:
        raise ValueError(f"it has {len(row['images'] or [])} images, not 2")
    for text in row["texts"] or []:
        turn = {"images": row["images"], "user": text["user"], "assistant": text["assistant"]}
        yield {"source": "nlvr2", "conversations": [turn]}


@cache
def find_images(folder: str) -> dict[str, list[str]]:
    """The paths of all images of the official files, by name."""
    paths = defaultdict(list)
    for path in sorted(Path(folder).rglob("*-img[01].png")):
        paths[path.name].append(str(path))
    return paths


def official_record(row: dict, paths: dict[str, list[str]]) -> dict:
    """An identifier is <pair>-<sentence>; its images are <pair>-img0.png and <pair>-img1.png."""
    pair = row["identifier"].rsplit("-", 1)[0]
    images = [paths.get(f"{pair}-img{side}.png", []) for side in (0, 1)]
    if any(len(found) != 1 for found in images):
        raise ValueError(f"needs one {pair}-img0.png and one -img1.png, and there is {images}")
    if str(row["label"]) not in ("True", "False"):
        raise ValueError("label must be True or False")
    question = f"{row['sentence']} Is this true or false?"
    turn = {"images": [path for [path] in images], "user": question, "assistant": str(row["label"])}
    return {"id": row["identifier"], "source": "nlvr2", "conversations": [turn]}


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
