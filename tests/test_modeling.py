"""The model against numbers computed with the official code, and what goes beyond it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, DynamicCache

import plain_flash_attention
from conftest import GOLDEN
from golden_util import make_image
from helpers.forward_cases import (
    CASES,
    WITH_LOSS,
    at_labels,
    case_inputs,
    check_outputs,
    rows,
)
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import CACHE, assign_images, token_order

IMAGE = 32044
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_(en|dis)able:FutureWarning"
)

UNUSED = ("encoder.layers.2.", "post_layernorm")


def load(folder, **kwargs) -> Phi3VForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def flash_model(tiny_checkpoint):
    """The model that hands its attention to flash-attn's functions; here in plain PyTorch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain_flash_attention.install(monkeypatch)
        yield load(tiny_checkpoint, attn_implementation="flash_attention_2")


GENERATED = [name for name in CASES if not name.startswith(("multi_turn", "text_4"))]
# Where the long factors begin, attention has no part in it.
SHORT = [name for name in CASES if "_409" not in name]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_image_features(model, forward_cases, name):
    """Pixels, projected image rows, hidden states and logits are the official ones."""
    case, arrays = forward_cases[name], np.load(GOLDEN / "forward.npz")
    inputs = case_inputs(case)
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].double()
        assert list(pixels.shape) == case["pixel_values_shape"]
        assert inputs["image_sizes"].tolist() == case["image_sizes"]
        assert pixels.sum().item() == pytest.approx(case["pixel_values_sum_f64"], rel=1e-12)
        assert pixels.square().sum().item() == pytest.approx(
            case["pixel_values_sumsq_f64"], rel=1e-12
        )
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        assert list(features.shape) == case["proj_shape"]
        sampled = features[torch.from_numpy(arrays[f"{name}.proj_rows"]).long()]
        torch.testing.assert_close(
            sampled.detach(), torch.from_numpy(arrays[f"{name}.proj"]), rtol=0, atol=1e-3
        )
    check_outputs(model, inputs, case, name)


@pytest.mark.parametrize("name", ["single_small", "batch2_left_padded_generate"])
def test_logits_with_eager_attention(tiny_checkpoint, forward_cases, name):
    """Eager attention takes a mask where the others do without: the same numbers."""
    model = load(tiny_checkpoint, attn_implementation="eager")
    case = forward_cases[name]
    check_outputs(model, case_inputs(case), case, name)


@pytest.mark.parametrize("name", SHORT)
def test_logits_with_flash_attention(flash_model, forward_cases, name):
    """What flash attention is called with gives the official numbers, padded batches included."""
    case = forward_cases[name]
    check_outputs(flash_model, case_inputs(case), case, name)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(name, False) for name in WITH_LOSS] + [("single_small", True), ("multi_turn_train", True)],
)
def test_loss_and_gradients(model, forward_cases, name, checkpointing):
    """
    Loss and the gradient norm of every parameter are the official ones, with logits of labelled
    positions alone, as the collator asks for.
    """
    case = forward_cases[name]
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        labels = rows(case["labels_rle"])
        outputs = model(**case_inputs(case), **at_labels(labels), use_cache=False)
        outputs.loss.backward()
        norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        embedding_grad = model.model.embed_tokens.weight.grad
    finally:
        model.gradient_checkpointing_disable()
        model.zero_grad()
        model.eval()
    assert outputs.logits.shape == ((labels[:, 1:] != -100).sum(), 32064)
    assert outputs.loss.item() == pytest.approx(case["loss"], abs=1e-4)
    golden = {n: norm for n, norm in case["grad_norms"].items() if norm is not None}
    assert norms.keys() == golden.keys()
    for parameter, norm in golden.items():
        # k_proj's bias cancels in the softmax: its gradient is rounding noise.
        if not parameter.endswith("k_proj.bias"):
            assert norms[parameter] == pytest.approx(norm, rel=1e-4, abs=1e-6), parameter
    assert embedding_grad[32000].norm() == case["embed_pad_row_grad_norm"]
    assert embedding_grad[0].norm() == case["embed_row0_grad_norm"]


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_generation(model, forward_cases, name):
    """
    Greedy tokens with the cache: left-padded batches, and across the 4,096-token switch of the RoPE
    factors.
    """
    case = forward_cases[name]
    inputs = case_inputs(case, key="prompt_ids_rle")
    prompt_length = case["generate"]["prompt_len"]
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, prompt_length:]
    assert tokens.tolist() == case["generate"]["new_tokens"]


def test_a_frozen_tower_keeps_no_graph(tiny_checkpoint, forward_cases):
    """Nothing of the tower is kept for a backward pass where nothing of it learns."""
    model = load(tiny_checkpoint)
    model.model.vision_embed_tokens.requires_grad_(False)
    inputs = case_inputs(forward_cases["single_small"])
    kept = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        hook = model.model.vision_embed_tokens.register_forward_hook(
            lambda module, given, output: kept.append(output.requires_grad)
        )
        model(**inputs, labels=inputs["input_ids"].clamp(min=0), use_cache=False).loss.backward()
        hook.remove()
    assert kept == [False, False]


def test_tensor_names_of_the_real_model():
    """
    On the meta device, the official config gives the official names and shapes, the alias wte
    excepted.
    """
    keys = json.loads((GOLDEN / "keys_full.json").read_text())
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(
            Phi3VConfig.from_pretrained(GOLDEN / "config_full.json")
        )
    expected = {name: shape for name, shape in keys["keys"].items() if name not in keys["aliases"]}
    assert {name: list(tensor.shape) for name, tensor in full.state_dict().items()} == expected
    assert sum(p.numel() for p in full.parameters()) == keys["total_unique_params"]
    assert {n for n, p in full.named_parameters() if not p.requires_grad} == set(
        keys["unused_in_forward"]
    )


def test_unused_clip_tensors_are_never_run(tiny_checkpoint):
    """What CLIP computes and nobody reads costs nothing: poisoned, it changes nothing."""
    model = load(tiny_checkpoint)
    pixels = torch.randn(1, 2, 3, 336, 336)
    before = model.model.get_image_features(pixels, [[336, 336]])
    unused = [p for n, p in model.named_parameters() if any(part in n for part in UNUSED)]
    assert unused and not any(p.requires_grad for p in unused)
    with torch.no_grad():
        for parameter in unused:
            parameter.fill_(float("nan"))
    assert torch.equal(model.model.get_image_features(pixels, [[336, 336]]), before)


def test_load_and_save_keep_every_bit(tiny_checkpoint, tmp_path):
    """
    Load, save, load: all tensors bit for bit, unused ones included, official names, alias dropped.
    """
    original = load_file(tiny_checkpoint / "model.safetensors")
    del original["model.vision_embed_tokens.wte.weight"]
    load(tiny_checkpoint).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    again = load(tmp_path).state_dict()
    assert all(torch.equal(again[name], original[name]) for name in original)


def test_saved_config_is_official(tiny_checkpoint, tmp_path):
    """
    Older stacks and other engines read rope_scaling, auto_map and the stop tokens from what we
    save.
    """
    load(tiny_checkpoint).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    official = json.loads((GOLDEN / "config.json").read_text())
    for key in (
        "rope_scaling",
        "rope_theta",
        "img_processor",
        "embd_layer",
        "model_type",
        "architectures",
    ):
        assert saved[key] == official[key], key
    assert "rope_parameters" not in saved and "vision_config" not in saved
    more = {"AutoModelForImageTextToText": official["auto_map"]["AutoModelForCausalLM"]}
    assert saved["auto_map"] == official["auto_map"] | more
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [32000, 32001, 32007]
    assert (tmp_path / "modeling_phi3_v.py").is_file() and (
        tmp_path / "configuration_phi3_v.py"
    ).is_file()


def test_config_leaves_the_callers_dict_alone():
    """A config built twice from one dict is the same config; official code failed there."""
    official = json.loads((GOLDEN / "config_full.json").read_text())
    copy = json.loads(json.dumps(official))
    first, second = Phi3VConfig(**official), Phi3VConfig(**official)
    assert official == copy and first.to_dict() == second.to_dict()
    assert first._attn_implementation is None, (
        "the checkpoint must not choose how attention is computed"
    )


def test_embedding_under_its_alias_alone(tiny_checkpoint, tmp_path):
    """Some saved checkpoints hold the token embedding only as wte."""
    weights = load_file(tiny_checkpoint / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert "model.embed_tokens.weight" in saved and not any("wte" in name for name in saved)


def test_no_code_from_the_folder_runs(tiny_checkpoint, tmp_path):
    """The folder's auto_map is ignored, whatever trust_remote_code says."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    for name in ("configuration_phi3_v.py", "modeling_phi3_v.py"):
        (tmp_path / name).write_text("raise SystemExit('code from the model folder ran')")
    for trust in (None, False, True):
        kwargs = {} if trust is None else {"trust_remote_code": trust}
        assert type(AutoConfig.from_pretrained(tmp_path, **kwargs)) is Phi3VConfig
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)) is Phi3VForCausalLM


WITHOUT_PACKAGE = """
import json, sys
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

kwargs = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained("saved", **kwargs)
processor = AutoProcessor.from_pretrained("saved", num_crops=4, **kwargs)
assert "phi3v" not in sys.modules
for part in (model, processor, processor.image_processor):
    assert type(part).__module__.startswith("transformers_modules."), part
inputs = processor("<|image_1|> " + "x" * 40, [Image.new("RGB", (60, 40))])
shapes = {name: list(value.shape) for name, value in inputs.items()}
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
print(json.dumps([shapes, tokens.tolist()]))
"""


@pytest.mark.slow
def test_saved_folder_works_without_this_package(demo_checkpoint, tmp_path):
    """
    The code files that travel with a checkpoint are enough for plain transformers, whichever
    version it is, up to where RoPE takes its long factors.
    """
    folder = shutil.copytree(demo_checkpoint, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "original_max_position_embeddings": 90})
    )
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(transformers.__file__).parents[1]),  # of the version that is tested
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shapes, tokens = json.loads(result.stdout)
    assert shapes["pixel_values"] == [1, 5, 3, 56, 56]
    model = AutoModelForCausalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, num_crops=4)
    inputs = processor("<|image_1|> " + "x" * 40, [Image.new("RGB", (60, 40))])
    assert inputs["input_ids"].shape[1] < 90 < len(tokens[0])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    assert model.generate(**inputs, **options, use_cache=False).tolist() == tokens


# ---------------------------------------------------------------- beyond the official code


def sample(
    *images: tuple[int, int], text: tuple[int, ...] = (5, 6, 7), num_crops: int = 4, seed: int = 0
):
    """A prompt of some ids, then images of (width, height), each followed by an id."""
    processor = Phi3VImageProcessor(num_crops=num_crops)
    ids = list(text)
    specs = [
        {"gen": "photo", "seed": seed + i, "w": w, "h": h, "mode": "RGB"}
        for i, (w, h) in enumerate(images)
    ]
    encoded = processor([make_image(spec) for spec in specs], return_tensors="pt") if specs else {}
    for length in encoded.get("num_img_tokens", []):
        ids += [IMAGE] * int(length) + [1]
    return ids + [9, 10, 11], encoded


def batch(*samples, side: str) -> dict:
    """Samples of `sample` padded to one batch on the given side."""
    length = max(len(ids) for ids, _ in samples)
    input_ids, mask = [], []
    for ids, _ in samples:
        padding = length - len(ids)
        input_ids.append([32000] * padding + ids if side == "left" else ids + [32000] * padding)
        mask.append(
            [0] * padding + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * padding
        )
    inputs = {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}
    images = [encoded for _, encoded in samples if encoded]
    if images:
        for key in ("pixel_values", "image_sizes"):
            inputs[key] = torch.cat([encoded[key] for encoded in images])
    return inputs


MIXED = [
    sample((300, 200), (200, 300), seed=1),
    sample(),
    sample((500, 100), text=(8, 4), seed=7),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(model, side):
    """
    Rows with two, no and one image give in a batch, padded on either side, what they give alone.
    """
    with torch.no_grad():
        inputs = batch(*MIXED, side=side)
        # As `generate` counts, from a row's first token on.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = model(**inputs, position_ids=positions).logits
        for row, one in enumerate(MIXED):
            alone = model(**batch(one, side=side)).logits[0]
            length = len(alone)
            ours = together[row, -length:] if side == "left" else together[row, :length]
            torch.testing.assert_close(ours, alone, rtol=0, atol=1e-3)


def test_mixed_batch_generates_what_each_row_does(model):
    """Batched generation of rows with different numbers of images equals one at a time."""
    together = generate(model, *MIXED)
    assert together == [generate(model, one)[0] for one in MIXED]


def test_mixed_batch_with_flash_attention(model, flash_model):
    """Generation with padding and a cache gives sdpa's tokens."""
    assert generate(flash_model, *MIXED) == generate(model, *MIXED)


def generate(model: Phi3VForCausalLM, *samples) -> list[list[int]]:
    """Eight greedy tokens for each sample, generated in one batch."""
    inputs = batch(*samples, side="left")
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:].tolist()


def test_left_padding_across_the_switch_with_images(tiny_checkpoint):
    """
    The switch to the long factors hands the images in again and counts real tokens, not padding.
    """
    model = load(tiny_checkpoint)
    long = sample((336, 336), text=tuple(range(3, 3 + 3330)), num_crops=4)
    long = sample((336, 336), text=tuple(range(3, 3 + 3330 + 4094 - len(long[0]))), num_crops=4)
    short = sample((300, 200))
    inputs = batch(long, short, side="left")
    cached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    naive = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.shape[1] == 4099
    assert cached[0].tolist() == naive[0].tolist()
    padded = batch(short, short, side="left")
    missing = 4090 - padded["input_ids"].shape[1]
    padded["input_ids"] = torch.nn.functional.pad(padded["input_ids"], (missing, 0), value=32000)
    padded["attention_mask"] = torch.nn.functional.pad(padded["attention_mask"], (missing, 0))
    plain = model.generate(**batch(short, side="left"), max_new_tokens=12, do_sample=False)
    assert (
        model.generate(**padded, max_new_tokens=12, do_sample=False)[0, -12:].tolist()
        == plain[0, -12:].tolist()
    )


def test_padded_rows_keep_their_positions_at_the_switch(tiny_checkpoint):
    """Where the longest row of a batch outgrows the short factors, the others are not moved."""
    model = load(tiny_checkpoint, original_max_position_embeddings=12)
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, naive = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    for step, expected in zip(cached.logits, naive.logits, strict=True):
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(tiny_checkpoint, name):
    """
    Under either name, whatever transformers calls it, the cache is used up to the switch to the
    long factors and dropped there.
    """
    model = load(tiny_checkpoint, original_max_position_embeddings=8)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        full = model(ids).logits
        past = DynamicCache(config=model.config)
        first = model(ids[:, :7], use_cache=True, **{name: past})
        assert first[CACHE] is past and past.get_seq_length() == 7

        def prepare(length):
            mask = torch.ones(1, length)
            return model.prepare_inputs_for_generation(
                ids[:, :length], attention_mask=mask, next_sequence_length=1, **{name: past}
            )

        kept = prepare(8)
        assert kept[CACHE] is past and kept["input_ids"].tolist() == [[10]]
        model(ids[:, 7:8], **{name: past})
        dropped = prepare(9)
        assert dropped.get(CACHE) is None and dropped["input_ids"].tolist() == ids.tolist()
        torch.testing.assert_close(model(**dropped).logits, full, rtol=0, atol=1e-4)


def test_beams_keep_the_images_of_their_row(tiny_checkpoint):
    """Beam search repeats rows; all images of a row must move with it."""
    model = load(tiny_checkpoint)
    together = model.generate(
        **batch(*MIXED, side="left"), max_new_tokens=5, num_beams=3, do_sample=False
    )
    for row, one in enumerate(MIXED):
        alone = model.generate(
            **batch(one, side="left"), max_new_tokens=5, num_beams=3, do_sample=False
        )
        assert together[row, -5:].tolist() == alone[0, -5:].tolist()


def test_padded_crops_are_not_encoded(tiny_checkpoint):
    """Only real crops go through CLIP, and what stands in the padding does not matter."""
    model = load(tiny_checkpoint)
    seen = []
    tower = model.model.vision_embed_tokens.img_processor
    tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    inputs = batch(sample((640, 480), num_crops=16), side="right")
    real = int((inputs["image_sizes"] // 336).prod(-1)) + 1
    assert real < inputs["pixel_values"].shape[1]
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs["pixel_values"][:, real:] = float("nan")
        assert torch.equal(model(**inputs).logits, expected)
    assert seen == [real, real]


def test_logits_where_they_are_asked_for(tiny_checkpoint):
    """
    With labels, training and evaluation give all logits; of given positions, the same logits,
    loss and gradients, and the head computes no others.
    """
    model = load(tiny_checkpoint).train()
    inputs = {**batch(*MIXED, side="right"), "use_cache": False}
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 5:9], labels[2, -3:] = torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8, 9])
    seen, found = [], []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for given in ({"labels": labels}, at_labels(labels)):
        outputs = model(**inputs, **given)
        outputs.loss.backward()
        found.append((outputs, model.model.layers[0].mlp.down_proj.weight.grad.clone()))
        model.zero_grad()
    (full, grad), (kept, kept_grad) = found
    assert seen == [3, 7] and full.logits.shape[:2] == labels.shape
    expected = full.logits[tuple(at_labels(labels)["logits_to_keep"])]
    torch.testing.assert_close(kept.logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(kept.loss, full.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept_grad, grad, rtol=0, atol=1e-5)
    scaled = model(**inputs, **at_labels(labels), num_items_in_batch=torch.tensor(14)).loss
    torch.testing.assert_close(scaled, kept.loss / 2, rtol=0, atol=1e-5)


def test_batch_without_labels_does_not_poison_training(tiny_checkpoint):
    """Where a step's other micro-batches have labels, one without has loss 0, gradients of 0."""
    model = load(tiny_checkpoint).train()
    ids = torch.arange(3, 13)[None]
    given = at_labels(torch.full_like(ids, -100))
    loss = model(ids, **given, use_cache=False, num_items_in_batch=5).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_an_image_of_no_size(tiny_checkpoint):
    """
    An image of size 0 x 0 changes nothing, but what sees pixels gets gradients, of 0: DDP and ZeRO
    would wait for ones that are missing.
    """
    model = load(tiny_checkpoint).train()
    text = {"input_ids": torch.arange(3, 13)[None], "use_cache": False}
    text["labels"] = text["input_ids"]
    blank = {
        "pixel_values": torch.zeros(1, 1, 3, 336, 336),
        "image_sizes": torch.zeros(1, 2, dtype=torch.long),
    }
    found = []
    for given in ({}, blank):
        loss = model(**text, **given).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss, grads))
        model.zero_grad()
    (loss, grads), (blank_loss, blank_grads) = found
    assert torch.equal(blank_loss, loss)
    for name, grad in blank_grads.items():
        if "vision_embed_tokens" in name:
            assert grads[name] is None and grad is not None and not grad.any(), name
        else:
            assert torch.equal(grad, grads[name]), name
    model.eval()
    plain, with_blank = (
        model.generate(text["input_ids"], **given, max_new_tokens=4, do_sample=False, num_beams=2)
        for given in ({}, blank)
    )
    assert torch.equal(plain, with_blank)
    # Beside real images, it takes no place of theirs.
    inputs = batch(*MIXED, side="left")
    with torch.no_grad():
        expected = model(**inputs).logits
        padding = inputs["pixel_values"].new_zeros(1, *inputs["pixel_values"].shape[1:])
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"], padding])
        inputs["image_sizes"] = torch.cat([inputs["image_sizes"], blank["image_sizes"]])
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
        inputs["image_sizes"][-1] = torch.tensor([0, 336])
        with pytest.raises(ValueError, match="image_sizes holds 0 x 336"):
            model(**inputs)


def test_attention_reaches_the_tower(tiny_checkpoint):
    """Set for the whole model or for a part, at loading or later, as transformers' own models."""
    model = load(tiny_checkpoint, attn_implementation="eager")
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    attention = tower.encoder.layers[0].self_attn
    assert model.config.vision_config._attn_implementation == "eager"
    assert attention.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert attention.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"": "eager", "vision_config": "sdpa"})
    assert model.config._attn_implementation == "eager"
    assert attention.config._attn_implementation == "sdpa"
    model = load(tiny_checkpoint, attn_implementation={"": "sdpa", "vision_config": "eager"})
    assert model.config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


def test_standard_forward_arguments(tiny_checkpoint):
    """
    logits_to_keep, inputs_embeds, position_ids and a cache carried by hand behave as in
    transformers.
    """
    model = load(tiny_checkpoint)
    inputs = batch(MIXED[0], side="right")
    with torch.no_grad():
        full = model(**inputs).logits
        kept = model(**inputs, logits_to_keep=2).logits
        torch.testing.assert_close(kept, full[:, -2:], rtol=0, atol=1e-4)
        embeds = model.model.embed(
            inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"]
        )
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, full, rtol=0, atol=1e-4)
        positions = torch.arange(full.shape[1])[None]
        torch.testing.assert_close(
            model(**inputs, position_ids=positions).logits, full, rtol=0, atol=1e-4
        )
        first = model(
            input_ids=inputs["input_ids"][:, :-4],
            pixel_values=inputs["pixel_values"],
            image_sizes=inputs["image_sizes"],
            use_cache=True,
        )
        rest = model(input_ids=inputs["input_ids"][:, -4:], past_key_values=first[CACHE])
        torch.testing.assert_close(rest.logits, full[:, -4:], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=inputs["input_ids"], inputs_embeds=embeds)


def test_placeholders_that_do_not_fit(tiny_checkpoint):
    """
    Too few or too many placeholders are an error with both numbers and the sample, in any row.
    """
    model = load(tiny_checkpoint)
    good = batch(MIXED[0], MIXED[2], side="left")
    placeholders = (good["input_ids"] == IMAGE).sum(-1).tolist()
    for row in (0, 1):
        short = {k: v.clone() for k, v in good.items()}
        position = (short["input_ids"][row] == IMAGE).nonzero()[0]
        short["input_ids"][row, position] = 5
        wanted = placeholders[row]
        message = f"Sample {row} .* {wanted - 1} image placeholders.*give {wanted} features"
        with pytest.raises(ValueError, match=message):
            model(**short)
    with pytest.raises(ValueError, match=f"Sample 0 .* {placeholders[0]} .*give 0 features"):
        model(input_ids=good["input_ids"])
    for missing in ("input_ids", "image_sizes"):
        given = {name: value for name, value in good.items() if name != missing}
        if missing == "input_ids":
            given["inputs_embeds"] = torch.zeros(*good["input_ids"].shape, 64)
        with pytest.raises(ValueError, match="pixel_values need input_ids"):
            model(**given)
    with pytest.raises(ValueError, match="Sample 1 .*has 0 .*give 144 features"):
        assign_images([144, 0], [144, 144])
    assert assign_images([0, 300, 0, 144], [144, 156, 144]) == [0, 2, 0, 1]


def test_frequencies_stay_exact(tiny_checkpoint):
    """
    In bf16, RoPE's fastest angle at position 4,000 could be off by more than a full turn: neither
    loading in low precision nor DeepSpeed, which casts parameters, rounds the frequencies.
    """
    exact = load(tiny_checkpoint).model.rotary_emb.inv_freq
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(getattr(model.model.rotary_emb, name), exact)


def test_low_precision_loss(tiny_checkpoint, forward_cases):
    """
    bf16 weights give the loss that they gave in the official code (14.129), within bf16 noise.
    """
    case = forward_cases["single_small"]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        loss = model(**case_inputs(case), labels=rows(case["labels_rle"])).loss
    assert loss.item() == pytest.approx(14.129274, abs=0.1)


def test_autocast_with_images(tiny_checkpoint, forward_cases):
    """
    Mixed precision over fp32 weights runs with images, which the official code could not do on CPU.
    """
    case = forward_cases["single_small"]
    model = load(tiny_checkpoint).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**case_inputs(case), labels=rows(case["labels_rle"]), use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=0.1)


def test_token_order_covers_an_image():
    """
    Every feature of every crop appears once, each line ends in a separator, and one stands between
    the views.
    """
    order = token_order(2, 3, 4)
    assert sorted(order[order >= 0].tolist()) == list(range(7 * 16))
    assert (order == -2).sum() == 1 and (order == -1).sum() == 2 * 4 + 4
    local, view = order[: 8 * 13], order[8 * 13 + 1 :]
    assert order[8 * 13] == -2 and (local.view(8, 13)[:, -1] == -1).all()
    # First line: line 0 of crops 1, 2 and 3, side by side.
    assert local[:12].tolist() == [*range(16, 20), *range(32, 36), *range(48, 52)]
    assert view.view(4, 5)[:, :-1].flatten().tolist() == list(range(16))
