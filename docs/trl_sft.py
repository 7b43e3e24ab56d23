"""TRL's own SFTTrainer on this model, with a LoRA adapter. See trl.md.

python docs/trl_sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT
"""

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

import phi3v  # noqa: F401  registers the classes

from peft import LoraConfig

script, args, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()
args.max_length = None  # cut, a prompt would lose places of its images


def to_trl(row: dict) -> dict:
    """A row of the DocVQA recipe's dataset."""
    return {
        "images": [row["image"]],
        "prompt": [{"role": "user", "content": row["query"]["en"]}],
        "completion": [{"role": "assistant", "content": row["answers"][0]}],
    }


rows = load_dataset(script.dataset_name, split=script.dataset_train_split)
trainer = SFTTrainer(
    model=AutoModelForImageTextToText.from_pretrained(model.model_name_or_path),
    args=args,
    train_dataset=rows.map(to_trl, remove_columns=rows.column_names),
    processing_class=AutoProcessor.from_pretrained(model.model_name_or_path),
    peft_config=LoraConfig(
        r=64, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    ),
)
trainer.train()
trainer.save_model()
