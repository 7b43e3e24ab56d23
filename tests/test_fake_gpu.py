"""
A micro-batch on a GPU that is not there: every device and dtype fits, nothing waits for the device,
and attention takes the kernel that it should.
"""

from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from transformers import AttentionMaskInterface

from helpers.fake_gpu import CUDA, Watch, backward, fake_gpu, move, to_gpu
from helpers.records import RECORDS
from helpers.trainers import arguments, make_trainer
from phi3v import Phi3VForCausalLM
from phi3v.data.collators import GenerationCollator, TrainingCollator
from phi3v.training.attention import (
    FLASH,
    PADDED,
    SDPA,
    PaddedRows,
    add_packed_mask,
    attending_to_padding,
)
from phi3v.training.generation import KeyCache
from phi3v.training.loading import add_adapters
from test_throughput import lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXT, IMAGES = RECORDS[1], RECORDS[0]
BATCHES = {
    "text only": [TEXT, TEXT],
    "padded": RECORDS,
    "packed": [RECORDS],
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Weights and the precision of autocast. Under DeepSpeed all is in the low precision.
PRECISIONS = {
    "DeepSpeed bf16": (BF16, None),
    "DeepSpeed fp16": (FP16, None),
    "DDP bf16": (FP32, BF16),
    "DDP fp16": (FP32, FP16),
    "LoRA bf16": (BF16, BF16),
    "LoRA fp16": (FP16, FP16),
}


def make_model(checkpoint, precision: str, attention: str, frozen: bool = False):
    dtype, _ = PRECISIONS[precision]
    model = Phi3VForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
    model.model.vision_embed_tokens.requires_grad_(not frozen)
    model.model.vision_embed_tokens.img_processor.freeze_unused()
    if "LoRA" in precision:
        model = add_adapters(model, lora(frozen))
    with fake_gpu():
        return move(model)


def autocast(precision: str):
    _, low = PRECISIONS[precision]
    return torch.autocast("cuda", low) if low else nullcontext()


def make_batch(processor, records: list, precision: str, attention: str, blank=False) -> dict:
    """As the trainer hands it to the model."""
    batch = TrainingCollator(processor, blank_image=blank, for_trainer=True)(records)
    del batch["ids"], batch["lengths"]
    with fake_gpu():
        batch = to_gpu(batch)
        if "DeepSpeed" in precision and "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(PRECISIONS[precision][0])
        if "cu_seq_lens_q" in batch and attention == SDPA:
            add_packed_mask(batch, SimpleNamespace(use_flash_attention=False))
    return batch


def step(model, batch: dict, precision: str) -> Watch:
    """Forward and backward."""
    model.train()
    with fake_gpu(), Watch() as watch:
        with autocast(precision):
            loss = model(**batch, use_cache=False).loss
        backward(loss)
    return watch


CASES = [
    *((precision, FLASH, False) for precision in PRECISIONS),
    *((precision, SDPA, False) for precision in ("DeepSpeed fp16", "DDP bf16")),
    *((precision, FLASH, True) for precision in ("DeepSpeed bf16", "LoRA bf16")),
]


@pytest.mark.parametrize(("precision", "attention", "checkpointing"), CASES)
def test_micro_batch(demo_checkpoint, demo_processor, precision, attention, checkpointing):
    """
    Whatever is in it, nothing is asked of the device, all that is trained gets a gradient of its
    kind, and each layer takes the flash kernel once; sdpa needs a mask for packed rows alone.
    """
    model = make_model(demo_checkpoint, precision, attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = model.config
    decoder, tower = config.num_hidden_layers, config.vision_config.num_hidden_layers - 1
    for name, records in BATCHES.items():
        batch = make_batch(demo_processor, records, precision, attention, blank="text" in name)
        watch = step(model, batch, precision)
        if name != "text only":  # a run's first batch makes RoPE's long factors
            assert watch.reads == [], name
        for parameter, values in model.named_parameters():
            if values.requires_grad:
                assert values.grad.dtype == values.dtype and values.grad.device == CUDA, parameter
        model.zero_grad()
        kernels = {"flash": decoder + tower}
        if name == "packed":
            kernels = {"flash": tower, "efficient" if attention == SDPA else "varlen": decoder}
        times = 2 if checkpointing else 1
        assert watch.attention() == {kernel: times * n for kernel, n in kernels.items()}, name


@pytest.mark.parametrize("precision", ["DeepSpeed fp16", "DDP bf16", "LoRA bf16"])
def test_micro_batch_under_a_frozen_vision_model(demo_checkpoint, demo_processor, precision):
    """The same where what sees pixels is frozen, without images too."""
    model = make_model(demo_checkpoint, precision, SDPA, frozen=True)
    for records in ([TEXT], [IMAGES]):
        watch = step(model, make_batch(demo_processor, records, precision, SDPA), precision)
    assert watch.reads == []
    for name, values in model.named_parameters():
        assert (values.grad is not None) == values.requires_grad, name


@pytest.mark.parametrize("packed", [False, True])
def test_the_trainer_asks_nothing(demo_checkpoint, tmp_path, packed):
    """
    On real tensors of a CPU, where transformers asks what it does not ask of fake ones, and
    operators refuse dtypes that they let pass there. After the first, a micro-batch has no question
    in it, whatever its shape; with transformers' own sdpa it would have one.
    """
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path, "--bf16"), RECORDS)
    trainer.create_optimizer_and_scheduler(1)
    found = []
    for attention in (SDPA, SDPA, "sdpa"):
        trainer.model.set_attn_implementation(attention)
        batch = trainer.data_collator([RECORDS] if packed else RECORDS)
        with Watch("cpu") as watch:
            trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(7))
        found.append(watch.reads)
    assert found[1] == [] and (packed or found[2] == ["aten._local_scalar_dense.default"])


def test_questions_are_seen():
    """Each way to ask a fake GPU is counted."""
    with fake_gpu():
        there, here = torch.ones(3), torch.ones(3, device="cpu")
        for ask in (
            lambda: there.sum().item(),
            lambda: there.tolist(),
            lambda: there.nonzero(),
            lambda: there[there > 0],
            lambda: there.cpu(),
            lambda: here.cuda(),
        ):
            with Watch() as watch, suppress(DynamicOutputShapeException):
                ask()
            assert watch.reads


@pytest.mark.parametrize("attention", [SDPA, FLASH])
@pytest.mark.parametrize("precision", ["DeepSpeed fp16", "DDP bf16", "LoRA bf16"])
def test_generation(demo_checkpoint, demo_processor, precision, attention, monkeypatch):
    """
    Prompts of three lengths, and a token after them: only that token has a mask, and the cache
    holds keys of 16 bits.
    """
    model = make_model(demo_checkpoint, precision, attention).eval()
    batch = GenerationCollator(demo_processor)(RECORDS)
    lengths = batch["attention_mask"].sum(-1).tolist()

    def known_rows(batch_size, q_length, kv_length, **kwargs):
        if q_length != kv_length:
            return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
        starts = torch.zeros(batch_size + 1, dtype=torch.int32)
        return PaddedRows(lengths, torch.zeros(sum(lengths), dtype=torch.long), starts)

    # What it reads from the mask has no value here.
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention + PADDED, known_rows)
    sizes = batch.pop("image_sizes").tolist()
    positions = (batch["input_ids"].flatten() == demo_processor.image_token_id).nonzero()[:, 0]
    low = PRECISIONS[precision][1] or PRECISIONS[precision][0]
    decoder = model.config.num_hidden_layers
    tower = model.config.vision_config.num_hidden_layers - 1
    with fake_gpu(), torch.no_grad(), autocast(precision), attending_to_padding(model):
        batch, cache = to_gpu(batch), KeyCache()
        batch["pixel_values"] = batch["pixel_values"].to(PRECISIONS[precision][0])
        with Watch() as prefill:
            model(
                **batch,
                image_sizes=sizes,
                image_positions=to_gpu(positions),
                past_key_values=cache,
                use_cache=True,
            )
        mask = torch.ones(len(lengths), max(lengths) + 1, dtype=torch.long)
        ids = batch["input_ids"][:, -1:]
        with Watch() as token:
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    rows = {"flash": tower + decoder * len(lengths)}
    assert prefill.attention() == (
        rows if attention == SDPA else {"flash": tower, "varlen": decoder}
    )
    assert token.attention() == {"efficient": decoder}
    assert {layer.keys.dtype for layer in cache.layers} == {low}
