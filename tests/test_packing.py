"""Lengths, samples that are too long, and samples that share a row."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import plain_flash_attention
from helpers.records import MORE
from helpers.trainers import arguments, make_trainer
from phi3v.data.collators import TrainingCollator
from phi3v.data.packing import count_tokens, fit_lengths, pack
from phi3v.data.records import Records
from phi3v.errors import DataError
from phi3v.training.attention import FLASH, FLASH_ATTN, SDPA, add_packed_mask
from phi3v.training.loading import load_processor

# With ids of their own.
NAMED = Records([{**record, "id": str(number)} for number, record in enumerate(MORE)])

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_counted_tokens_are_those_of_the_batch(demo_processor):
    """The length known in advance is the length of the encoded sample, whatever its images."""
    for one in MORE:
        batch = TrainingCollator(demo_processor)([one])
        assert count_tokens(demo_processor, one) == batch["input_ids"].shape[1]


def test_rows_hold_every_sample_once():
    """No sample is lost or doubled, no row is too long, and rows are well filled."""
    rng = random.Random(0)
    lengths = [rng.randint(5, 120) for _ in range(200)]
    rows = pack(lengths, 128)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 1.06 * sum(lengths) / 128
    assert pack(lengths, 128) == rows
    assert pack([300, 10], 128) == [[0], [1]], "a longer sample has a row of its own"


def test_packing_is_fast():
    """Hundreds of thousands of samples are packed in seconds, not in hours."""
    rng = random.Random(0)
    lengths = [rng.randint(50, 5000) for _ in range(100_000)]
    start = time.process_time()
    rows = pack(lengths, 8192)
    assert time.process_time() - start < 10
    assert len(rows) <= 1.01 * sum(lengths) / 8192


@pytest.mark.parametrize(
    "attention", ["eager", "sdpa", "flash_attention_2", SDPA, FLASH, FLASH_ATTN]
)
def test_packed_loss_and_gradients_are_the_unpacked_ones(
    demo_checkpoint, demo_processor, attention, monkeypatch
):
    """Samples in one row do not see each other: same loss, same gradients as padded rows."""
    plain_flash_attention.install(monkeypatch)
    plain_flash_attention.install_varlen(monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(
        demo_checkpoint, dtype=torch.float32, attn_implementation=attention
    ).train()
    collator = TrainingCollator(demo_processor)
    packed = collator([MORE[:2], MORE[2:]])
    assert packed["input_ids"].shape[0] == 1 and "attention_mask" not in packed
    assert (packed["position_ids"] == 0).sum() == len(MORE)
    if attention == SDPA:  # as the trainer does
        add_packed_mask(packed, SimpleNamespace(use_flash_attention=False))
    losses, gradients = [], []
    for batch in (packed, collator(MORE)):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_packed_sample_does_not_see_its_neighbours(demo_checkpoint, demo_processor):
    """Changing one sample of a row leaves the logits of the others alone."""
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    collator = TrainingCollator(demo_processor)
    with torch.no_grad():
        first = model(**collator([[MORE[0], MORE[1]]]), use_cache=False).logits
        second = model(**collator([[MORE[2], MORE[1]]]), use_cache=False).logits
    labels = len(collator([MORE[1]])["shift_labels"])
    torch.testing.assert_close(first[-labels:], second[-labels:], rtol=0, atol=1e-5)


def test_the_trainer_packs_what_it_would_pad(demo_checkpoint, tmp_path):
    """A packed row has the loss of its samples in padded rows, with the mask that sdpa needs."""
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path), NAMED)
    trainer.create_optimizer_and_scheduler(1)
    losses = []
    for records in (MORE, [MORE]):
        batch = trainer.data_collator(records)
        losses.append(trainer.training_step(trainer.model, batch, torch.tensor(50)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_on_packed_rows(demo_checkpoint, tmp_path, capsys):
    """The Trainer runs on packed rows, and the printed samples and tokens are the real ones."""
    args = arguments(demo_checkpoint, tmp_path, "--pack_length", "64")
    processor = load_processor(args)
    rows = fit_lengths(NAMED, processor, args)
    assert 1 < len(rows) < len(MORE)
    trainer = make_trainer(args, rows)
    trainer.train()
    assert trainer.meter.total["samples"] == len(MORE)
    assert trainer.meter.total["tokens"] == sum(count_tokens(processor, one) for one in MORE)
    assert f"5 samples in {len(rows)} rows" in capsys.readouterr().out


def test_samples_that_are_too_long(demo_checkpoint, tmp_path, capsys):
    """They are left out and counted, never cut; nothing left is an error that says what to do."""
    args = arguments(demo_checkpoint, tmp_path)
    processor = load_processor(args)
    assert fit_lengths(NAMED, processor, args) is NAMED
    lengths = [count_tokens(processor, one) for one in MORE]
    args.max_length = sorted(lengths)[2]
    kept = fit_lengths(NAMED, processor, args)
    assert len(kept) == 3 and "2 of 5 samples are longer" in capsys.readouterr().out
    collator = TrainingCollator(processor)
    for batch in DataLoader(kept, batch_size=1, collate_fn=collator):
        assert batch["input_ids"].shape[1] <= args.max_length
    args.max_length = min(lengths) - 1
    with pytest.raises(DataError, match=f"the shortest has {min(lengths)}. Raise it"):
        fit_lengths(NAMED, processor, args)
