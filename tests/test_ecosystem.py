"""Other people's tools: what TRL asks of the processor, and PEFT where this package is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from helpers.records import image, record, turn
from helpers.trainers import arguments, make_trainer
from phi3v.data.collators import TrainingCollator

from peft import PeftModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_prompts_and_completions_of_trl_are_ours(demo_processor):
    """
    TRL's collators tokenize prompt and completion apart, without special tokens. The ids are the
    recipe's, but for the <|endoftext|> that it trains too.
    """
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = demo_processor.apply_chat_template(messages, add_generation_prompt=True)
    prompts = demo_processor(
        images=[[image()], [image()]],
        text=[prompt, prompt.replace("What?", "What is this?")],
        padding_side="left",
        **options,
    )
    completions = demo_processor(text=["DigitOne<|end|>\n", "1"], padding_side="right", **options)
    assert prompts["attention_mask"][:, 0].tolist() == [0, 1]
    assert completions["attention_mask"][:, -1].tolist() == [1, 0]
    rows = [part["input_ids"][0][part["attention_mask"][0] == 1] for part in (prompts, completions)]
    ours = TrainingCollator(demo_processor)([record(turn("What?", "DigitOne", image()))])
    assert torch.cat(rows).tolist() == ours["input_ids"][0].tolist()[:-1]
    assert torch.equal(prompts["pixel_values"][:1], ours["pixel_values"])


def test_chats_with_images_become_a_padded_batch(demo_processor):
    """As TRL calls it for `messages`; the tokenizer's own padding side is left as it is."""
    content = [{"type": "image", "image": image()}, {"type": "text", "text": "What?"}]
    chats = [[{"role": "user", "content": content[:n]}] for n in (1, 2)]
    batch = demo_processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "pad_to_multiple_of": 8},
    )
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"][:, 0].tolist() == [0, 0] and len(batch["pixel_values"]) == 2
    assert demo_processor.tokenizer.padding_side == "right"


WITHOUT_PACKAGE = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

options = {"trust_remote_code": True, "dtype": torch.float32}
base = AutoModelForImageTextToText.from_pretrained("base", **options)
loaded = AutoModelForCausalLM.from_pretrained("base", **options)
loaded.load_adapter("adapter")
models = {
    "PeftModel": PeftModel.from_pretrained(base, "adapter"),
    "load_adapter": loaded,
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained("adapter", **options),
    "merged": AutoModelForCausalLM.from_pretrained("adapter/merged", **options),
}
assert "phi3v" not in sys.modules
batch = torch.load("batch.pt")
with torch.no_grad():
    torch.save({name: model.eval()(**batch).logits for name, model in models.items()}, "logits.pt")
"""


@pytest.mark.slow
def test_adapters_work_without_this_package(demo_checkpoint, tmp_path, monkeypatch):
    """PEFT in a process that has plain transformers, and the code that travels with the base."""
    (tmp_path / "base").symlink_to(demo_checkpoint)
    monkeypatch.chdir(tmp_path)
    args = arguments("base", "adapter", "--use_lora", "--lora_rank", "4", "--merge_lora")
    trainer = make_trainer(args)
    trainer.train()
    trainer.save_model()
    trainer.merge_adapter()
    batch = TrainingCollator(trainer.processor)([record(turn("What?", "1", image()))])
    torch.save(batch, "batch.pt")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(transformers.__file__).parents[1]),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    plain = base(**batch).logits
    expected = PeftModel.from_pretrained(base, "adapter").eval()(**batch).logits
    assert (expected - plain).abs().max() > 1e-3
    logits = torch.load("logits.pt")
    for name in ("PeftModel", "load_adapter", "AutoPeftModel"):
        assert torch.equal(logits[name], expected), name
    torch.testing.assert_close(logits["merged"], expected, rtol=0, atol=1e-4)
    config = json.loads(Path("base/config.json").read_text())
    assert config["auto_map"].keys() >= {"AutoModelForCausalLM", "AutoModelForImageTextToText"}
