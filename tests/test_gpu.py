"""What only a GPU shows: half precision, 4 bits and the real flash attention, in the recipe."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from helpers.recipes import recipe, run
from helpers.records import MORE
from phi3v.data.collators import TrainingCollator
from small_datasets import cauldron_row, write_parquet

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
needs_flash_attention = pytest.mark.skipif(
    not is_flash_attn_2_available(), reason="needs the package flash-attn"
)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--bf16",),
        pytest.param(("--use_flash_attention",), marks=needs_flash_attention),
    ],
    ids=["fp16", "bf16", "flash attention"],
)
def test_full_finetuning(demo_checkpoint, tmp_path, monkeypatch, flags):
    """The recipe trains in each precision: the loss is finite and falls, the weights are finite."""
    rows = [cauldron_row(i, 2, ("Same?", "True" if i % 2 else "False")) for i in range(34)]
    folder = write_parquet(tmp_path / "nlvr2", "train", rows)
    data = ("--dataset_name_or_path", folder, "--num_eval_rows", "2", "--num_train_epochs", "4")
    run("nlvr2", demo_checkpoint, tmp_path, monkeypatch, *data, "--learning_rate", "1e-3", *flags)
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    weights = load_file(tmp_path / "output" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_qlora(demo_checkpoint, tmp_path, monkeypatch):
    """Four bits on the GPU: adapters are trained and saved, and generation works around it."""
    rows = [cauldron_row(i, 2, ("Same?", "True")) for i in range(6)]
    folder = write_parquet(tmp_path / "nlvr2", "train", rows)
    argv = ["nlvr2", f"--model_name_or_path={demo_checkpoint}", "--use_qlora", "--bf16"]
    argv += [f"--dataset_name_or_path={folder}", "--num_eval_rows=2", "--lora_rank=4"]
    argv += [f"--output_dir={tmp_path / 'output'}", "--batch_size=2", "--num_crops=1", "--no-tqdm"]
    monkeypatch.setattr("sys.argv", argv)
    recipe("nlvr2").main()
    adapter = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and t.any() for name, t in adapter.items())


@needs_flash_attention
def test_packed_rows_with_flash_attention(demo_checkpoint, demo_processor):
    """A packed row has the loss of its samples in padded rows, in bf16's precision."""
    model = AutoModelForCausalLM.from_pretrained(
        demo_checkpoint, dtype=torch.bfloat16, attn_implementation="flash_attention_2"
    )
    model = model.cuda().train()
    collator = TrainingCollator(demo_processor)
    losses = [
        model(**{name: tensor.cuda() for name, tensor in batch.items()}, use_cache=False).loss
        for batch in (collator([MORE[:2], MORE[2:]]), collator(MORE))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-2)
