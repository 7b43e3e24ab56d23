"""What only a GPU shows: half precision, 4 bits and the kernels that CPUs lack, in the recipe."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from helpers.recipes import recipe
from helpers.records import MORE
from phi3v.data.collators import GenerationCollator, TrainingCollator
from phi3v.training.attention import (
    FLASH,
    FLASH_ATTN,
    SDPA,
    add_packed_mask,
    attending_to_padding,
)
from small_datasets import cauldron_row, write_parquet

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
needs_liger = pytest.mark.skipif(not is_liger_kernel_available(), reason="needs liger-kernel")
with_the_package = pytest.param(
    FLASH_ATTN,
    marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn"),
)
DEVICE = "cuda"
METHODS = {
    "full": ("--deepspeed", "none", "--learning_rate", "1e-3"),
    "frozen": ("--deepspeed", "none", "--learning_rate", "1e-3", "--freeze_vision_model"),
    "lora": ("--use_lora", "--lora_rank", "4", "--learning_rate", "1e-2"),
    "qlora": ("--use_lora", "--use_qlora", "--lora_rank", "4", "--learning_rate", "1e-2"),
}
PRECISIONS = {"fp16": (), "bf16": ("--bf16",), "flash attention": ("--use_flash_attention",)}


@pytest.fixture
def train(demo_checkpoint, tmp_path, monkeypatch):
    """Runs NLVR2's recipe with the flags, and gives the losses; the weights have to be finite."""
    rows = [cauldron_row(i, 2, ("Same?", "True" if i % 2 else "False")) for i in range(34)]
    data = write_parquet(tmp_path / "nlvr2", "train", rows)

    def run(*flags: str) -> list[float]:
        output_dir = tmp_path / "output"
        argv = ["nlvr2", f"--model_name_or_path={demo_checkpoint}", f"--output_dir={output_dir}"]
        argv += [f"--dataset_name_or_path={data}", "--num_eval_rows=2", "--num_train_epochs=4"]
        argv += ["--batch_size=2", "--num_crops=2", "--max_new_tokens=3", "--no-tqdm"]
        monkeypatch.setattr("sys.argv", [*argv, "--overwrite_output_dir", *flags])
        recipe("nlvr2").main()
        assert all(tensor.isfinite().all() for tensor in saved(output_dir).values())
        history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    return run


def saved(output_dir: Path) -> dict[str, torch.Tensor]:
    [weights] = output_dir.glob("*model.safetensors")  # of a whole model or of an adapter
    return load_file(weights)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_in_every_precision(train, method, precision):
    """Losses fall, and answers are generated before and after; 4 bits included."""
    losses = train(*METHODS[method], *PRECISIONS[precision])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", [(), ("--deepspeed", "none")], ids=["ZeRO-2", "DDP"])
def test_8_bit_adamw(train, engine):
    """The optimizer with 8-bit state learns, under DeepSpeed and without it."""
    losses = train("--optim", "adamw_bnb_8bit", "--learning_rate", "1e-3", "--bf16", *engine)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "flag", ["--torch_compile", pytest.param("--use_liger", marks=needs_liger)]
)
def test_other_kernels_compute_the_same(train, method, flag):
    """Compiled layers and liger's kernels go through the losses of a run without them."""
    plain, other = train(*METHODS[method], "--bf16"), train(*METHODS[method], "--bf16", flag)
    assert other == pytest.approx(plain, rel=5e-2)


@pytest.mark.parametrize("attention", [SDPA, FLASH, with_the_package])
def test_packed_rows_are_padded_rows(demo_checkpoint, demo_processor, attention):
    """A packed row has the loss and gradients of its samples in padded rows, as bf16 has them."""
    model = load(demo_checkpoint, torch.bfloat16, attention).train()
    collator = TrainingCollator(demo_processor, for_trainer=True)
    losses, norms = [], []
    for rows in ([MORE[:2] + MORE[2:]], MORE):
        batch = to_gpu(collator(rows))
        del batch["ids"], batch["lengths"]
        if attention == SDPA and "cu_seq_lens_q" in batch:
            add_packed_mask(batch, SimpleNamespace(use_flash_attention=False))
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.stack([p.grad.norm() for p in model.model.layers.parameters()]).cpu())
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-1, atol=1e-2)


@pytest.mark.parametrize("attention", [SDPA, FLASH, with_the_package])
def test_a_padded_batch_answers_as_one_by_one(demo_checkpoint, demo_processor, attention):
    """Prompts of other lengths beside it do not change what follows a prompt."""
    exact = attention == SDPA  # flash kernels take 16 bits alone
    model = load(demo_checkpoint, torch.float32 if exact else torch.bfloat16, attention).eval()
    collator = GenerationCollator(demo_processor)
    with torch.no_grad(), attending_to_padding(model):
        together, *alone = (
            model(**to_gpu(collator(records)), logits_to_keep=1).logits[:, -1].float()
            for records in (MORE, *([record] for record in MORE))
        )
    tolerance = 1e-4 if exact else 5e-2
    torch.testing.assert_close(together, torch.cat(alone), rtol=tolerance, atol=tolerance)


def load(checkpoint: Path, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation=attention
    ).to(DEVICE)


def to_gpu(batch: dict) -> dict:
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
