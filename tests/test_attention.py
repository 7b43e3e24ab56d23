"""Which attention a run takes, and that every one gives the same numbers."""

import sys
from types import ModuleType

import pytest
import torch

import plain_flash_attention
from helpers.records import MORE, RECORDS
from helpers.trainers import arguments, loaded
from phi3v.training import RecipeParser, load_processor, trainer_arguments
from phi3v.training.attention import FLASH, FLASH_ATTN, SDPA, choose_attention
from phi3v.training.generation import generate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("package", ["none", "broken", "works"])
def test_the_package_is_taken_where_it_works(package, monkeypatch):
    """A flash-attn that was built for another torch is no reason to stop: PyTorch has kernels."""
    args = RecipeParser("").parse_args([])
    assert choose_attention(args) == SDPA
    args.use_flash_attention = True
    module = ModuleType("flash_attn")  # without flash_attn_varlen_func: importing it fails
    if package == "works":
        module.flash_attn_varlen_func = plain_flash_attention.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", None if package == "none" else module)
    assert choose_attention(args) == (FLASH_ATTN if package == "works" else FLASH)


@pytest.mark.parametrize("attention", [SDPA, FLASH, FLASH_ATTN])
def test_padded_prompts_get_the_answers_that_each_gets_alone(
    demo_checkpoint, tmp_path, attention, monkeypatch
):
    """Prompts of several lengths in one batch, and answers with a cache."""
    plain_flash_attention.install(monkeypatch)
    plain_flash_attention.install_varlen(monkeypatch)
    monkeypatch.setattr("phi3v.training.loading.choose_attention", lambda args: attention)
    args = arguments(demo_checkpoint, tmp_path)
    model, processor, training_args = loaded(args), load_processor(args), trainer_arguments(args)
    found = []
    for size in (1, len(MORE)):
        training_args.per_device_eval_batch_size = size
        choices = ("DigitTwo", "DigitOne")
        found.append(generate(model, processor, MORE, training_args, 9, choices))
    assert [text for text, _ in found[0]] == [text for text, _ in found[1]]
    assert [p for _, p in found[0]] == pytest.approx([p for _, p in found[1]], abs=1e-5)
    assert model.config._attn_implementation == attention


def test_attention_is_not_saved(demo_checkpoint, tmp_path):
    """A saved model has the official config: others know no attention of this name."""
    model = loaded(arguments(demo_checkpoint, tmp_path))
    assert model.config._attn_implementation == SDPA
    model.save_pretrained(tmp_path / "saved")
    assert SDPA not in (tmp_path / "saved" / "config.json").read_text()


def test_evaluation_goes_on_with_less_when_memory_runs_out(
    demo_checkpoint, tmp_path, monkeypatch, capsys
):
    """Batches halve until they fit, answers stay the same and in order, and it is said."""
    args = arguments(demo_checkpoint, tmp_path, "--eval_batch_size_per_gpu", "4")
    model, processor, training_args = loaded(args), load_processor(args), trainer_arguments(args)
    records = [*MORE, *RECORDS]
    expected = generate(model, processor, records, training_args, 5)
    whole, sizes = model.generate, []

    def small(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", small)
    limit = 1
    assert generate(model, processor, records, training_args, 5) == expected
    assert sizes == [4, 2, *[1] * len(records)]
    assert training_args.per_device_eval_batch_size == 1
    assert "goes on with --eval_batch_size_per_gpu 1." in capsys.readouterr().out
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, processor, records, training_args, 5)
