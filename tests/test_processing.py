"""The processors against pixels and ids of the official code, and what goes beyond it."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import ByteLevel
from transformers import AutoImageProcessor, AutoProcessor, pipeline

from conftest import GOLDEN
from demo.make_checkpoint import CHAT_TEMPLATE
from golden_util import make_image, unrle
from phi3v import Phi3VImageProcessor, Phi3VProcessor

IMAGE = 32044
PIXELS = json.loads((GOLDEN / "processor.json").read_text())
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())


def pixel_case_id(case: dict) -> str:
    spec = case["spec"]
    return f"{spec['w']}x{spec['h']}-{spec.get('mode', 'RGB')}-{case['num_crops']}"


@pytest.mark.parametrize(
    "case", [c for c in PIXELS["cases"] if "error" not in c], ids=pixel_case_id
)
def test_pixels(case):
    """Sizes, token counts, the resized image and every crop are the official ones, bit for bit."""
    processor = Phi3VImageProcessor(num_crops=case["num_crops"])
    image = make_image(case["spec"])
    encoded = processor(image, return_tensors="pt")
    assert list(encoded["pixel_values"].shape) == case["pixel_values_shape"]
    assert encoded["pixel_values"].dtype == torch.float32
    assert encoded["image_sizes"].tolist() == case["image_sizes"]
    assert encoded["num_img_tokens"].tolist() == case["num_img_tokens"]
    assert processor.calc_num_image_tokens_from_image_size(*image.size) == case["calc_from_size"]
    assert processor.calc_num_image_tokens(image) == case["num_img_tokens"]
    assert list(processor.calc_hd_size(*image.size)) == case["hd_size_wh"]
    levels = np.asarray(processor._hd_transform(image.convert("RGB"), case["num_crops"]))
    assert levels.sum(dtype=int) == case["hd_u8_sum"]
    channel, row, column = np.array(PIXELS["sample_idx"]).T
    crops = encoded["pixel_values"][0]
    for crop, golden in zip(crops, case["crops"], strict=False):
        values = crop.double()
        ours = [values.mean(), values.std(correction=0), values.min(), values.max()]
        assert [v.item() for v in ours] == pytest.approx(golden[:4], rel=1e-7, abs=1e-7)
        # The golden samples are written with nine digits, which name a float32 exactly.
        assert np.array_equal(crop[channel, row, column].numpy(), np.float32(golden[4:]))
    assert not crops[case["n_real_crops"] :].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 4, 16]))
def test_a_portrait_image_is_one_on_its_side(width, height, num_crops):
    """The official code turns it before and after all else. PIL rounds so in no other order."""
    short, long = sorted((width, height))
    assume(short < long < 50 * short)
    levels = np.random.default_rng(width * height).integers(0, 256, (long, short, 3))
    portrait = Image.fromarray(levels.astype(np.uint8))
    processor = Phi3VImageProcessor(num_crops=num_crops, crop_size={"height": 56, "width": 56})
    turned = portrait.transpose(Image.Transpose.TRANSPOSE)
    expected = processor._hd_transform(turned, num_crops).transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(processor._hd_transform(portrait, num_crops), expected)


@pytest.mark.parametrize("case", [c for c in PIXELS["cases"] if "error" in c], ids=pixel_case_id)
def test_too_long_and_thin(case):
    """An aspect ratio that the HD transform cannot hold is an error that says so."""
    processor = Phi3VImageProcessor(num_crops=case["num_crops"])
    with pytest.raises(ValueError, match=f"too long and thin for num_crops={case['num_crops']}"):
        processor(make_image(case["spec"]))
    with pytest.raises(ValueError, match="too long and thin"):
        processor.calc_num_image_tokens_from_image_size(case["spec"]["w"], case["spec"]["h"])


def test_images_that_cannot_be_used():
    """No pixels or no way to RGB: each is an error that says so."""
    with pytest.raises(ValueError, match="5 x 0 pixels is empty"):
        Phi3VImageProcessor().calc_hd_size(0, 5)
    with pytest.raises(ValueError, match="mode La cannot be converted to RGB .*Save it as RGB"):
        Phi3VImageProcessor()(Image.new("La", (4, 3)))


def test_arrays_and_tensors_are_images_too():
    """A numpy array or a tensor gives what the same PIL image gives."""
    image = make_image({"gen": "photo", "seed": 3, "w": 60, "h": 40})
    processor = Phi3VImageProcessor(num_crops=2)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    array = np.array(image)
    for other in (array, torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(processor(other, return_tensors="pt")["pixel_values"], expected)


def test_small_crops_follow_the_crop_size():
    """A tiny vision tower has small crops; everything scales with them."""
    processor = Phi3VImageProcessor(num_crops=2, crop_size={"height": 56, "width": 56})
    encoded = processor(Image.new("RGB", (100, 40)), return_tensors="pt")
    assert encoded["pixel_values"].shape == (1, 3, 3, 56, 56)
    assert encoded["image_sizes"].tolist() == [[56, 112]]
    assert encoded["num_img_tokens"].tolist() == [(2 + 1) * 4 + 1 + 2 * 2]


@pytest.fixture(scope="module")
def real_processor(tokenizer_folder):
    return AutoProcessor.from_pretrained(tokenizer_folder)


@pytest.fixture
def processor(demo_processor):
    """With the demo's tokenizer, where order, counts and tags are looked at, not ids."""
    return demo_processor


def test_auto_classes_load_the_official_folder(tokenizer_folder):
    """The hub's folder, with its auto_map, loads as our classes with num_crops as asked for."""
    processor = AutoProcessor.from_pretrained(tokenizer_folder, num_crops=16)
    assert type(processor) is Phi3VProcessor
    assert processor.image_processor.num_crops == 16
    assert type(AutoImageProcessor.from_pretrained(tokenizer_folder)) is Phi3VImageProcessor


@pytest.mark.parametrize("case", TOKENS["cases"], ids=lambda case: case["name"])
def test_prompt_ids(real_processor, case):
    """Template and ids are the official ones, with <|image|> for the negative ids."""
    if case["messages"]:
        text = real_processor.apply_chat_template(
            case["messages"], add_generation_prompt=case["add_generation_prompt"]
        )
        assert text == case["text"]
    images = [make_image(spec) for spec in case.get("image_specs") or []]
    encoded = real_processor(case["text"], images or None, num_crops=case["num_crops"])
    golden = [IMAGE if token < 0 else token for token in unrle(case["input_ids_rle"])]
    assert encoded["input_ids"].tolist() == [golden]
    assert encoded["attention_mask"].all()


@pytest.mark.parametrize("case", TOKENS["responses"], ids=lambda case: repr(case["text"]))
def test_response_ids(real_processor, case):
    """Answers tokenize and decode as in the official code."""
    ids = real_processor.tokenizer(case["text"], add_special_tokens=False).input_ids
    assert ids == case["input_ids"]
    assert real_processor.decode(ids, skip_special_tokens=True) == case["decode_skip_special"]


def test_several_texts_with_their_own_images(processor):
    """Nested and flat images give each text its own; rows equal what each text gives alone."""
    images = [make_image({"gen": "photo", "seed": i, "w": 40 + i, "h": 30}) for i in range(3)]
    texts = ["<|image_1|> and <|image_2|>", "none", "<|image_1|>"]
    nested = processor(texts, [images[:2], [], images[2:]], padding=True)
    flat = processor(texts, images, padding=True)
    assert all(torch.equal(nested[name], flat[name]) for name in nested)
    for row, own in enumerate([images[:2], None, images[2:]]):
        alone = processor(texts[row], own)["input_ids"][0].tolist()
        length = nested["attention_mask"][row].sum()
        assert length == len(alone) and nested["input_ids"][row, :length].tolist() == alone
    assert len(nested["pixel_values"]) == 3


def test_messages_of_parts(processor):
    """Transformers' messages, several turns and images, give what official strings with tags do."""
    images = [make_image({"gen": "photo", "seed": i, "w": 40, "h": 30}) for i in range(2)]
    parts = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, text("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text("And "), {"type": "image", "image": images[1]}]},
    ]
    official = ["<|image_1|>\nWhat?", "A cat.", "And <|image_2|>\n"]
    strings = [{**message, "content": c} for message, c in zip(parts, official, strict=True)]
    prompts = [
        processor.apply_chat_template(messages, add_generation_prompt=True)
        for messages in (parts, strings)
    ]
    expected = processor.tokenizer.apply_chat_template(
        strings, tokenize=False, add_generation_prompt=True
    )
    assert prompts == [expected, expected]
    inputs = processor.apply_chat_template(
        parts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    wanted = processor(expected, images)
    assert inputs.keys() == wanted.keys()
    assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def test_the_image_text_to_text_pipeline(demo_checkpoint):
    """Transformers' pipeline finds model and processor, and answers what `generate` does."""
    pipe = pipeline("image-text-to-text", model=str(demo_checkpoint), dtype=torch.float32)
    image = make_image({"gen": "photo", "seed": 0, "w": 40, "h": 30})
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, text("What?")]}]
    [answer] = pipe(text=messages, max_new_tokens=4, return_full_text=False)
    prompt = pipe.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = pipe.processor(prompt, [image])
    tokens = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == pipe.processor.decode(new, skip_special_tokens=True)


def test_tags_out_of_order_get_their_own_image(processor):
    """<|image_2|> before <|image_1|> puts the second image first."""
    images = [make_image({"gen": "photo", "seed": i, "w": 40, "h": 30}) for i in range(2)]
    swapped = processor("<|image_2|> <|image_1|>", images)["pixel_values"]
    assert torch.equal(swapped, processor("<|image_1|> <|image_2|>", images[::-1])["pixel_values"])


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("no tag", 1, "Text 0 has tags for 0 images, but 1 images"),
        ("<|image_1|><|image_2|>", 1, "Text 0 has tags for 2 images, but 1 images"),
        ("<|image_1|><|image_3|>", 2, r"numbered 1, 2, 3.*found \[1, 3\]"),
        ("<|image_0|>", 1, r"numbered 1, 2, 3.*found \[0\]"),
    ],
)
def test_tags_that_do_not_match(processor, text, count, message):
    """Tags and images that do not belong together are an error that says what was found."""
    with pytest.raises(ValueError, match=message):
        processor(text, [Image.new("RGB", (30, 30))] * count)


def test_texts_and_images_that_do_not_match(processor):
    """So are texts and lists of images of different numbers."""
    image = Image.new("RGB", (30, 30))
    with pytest.raises(ValueError, match="2 texts and images for 1"):
        processor(["<|image_1|>", "<|image_1|>"], [[image]])
    with pytest.raises(ValueError, match="tags for 2 images, but there are 1"):
        processor(["<|image_1|>", "<|image_1|>"], [image])


def test_image_tags_are_not_held_in_memory(processor):
    """img_tokens answers like the official list of a million strings, without being one."""
    tags = processor.img_tokens
    assert len(tags) == 1_000_000 and tags[:2] == ["<|image_1|>", "<|image_2|>"]
    assert tags[-1] == "<|image_1000000|>" and not isinstance(tags, list)
    with pytest.raises(IndexError):
        tags[1_000_000]


def test_saved_processor(demo_checkpoint, tmp_path):
    """A saved folder has what older code and other engines read, and loads as it was."""
    processor = AutoProcessor.from_pretrained(demo_checkpoint, num_crops=7)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["num_crops"] == 7 and saved["num_img_tokens"] == 4
    assert saved["processor_class"] == "Phi3VProcessor"
    assert saved["auto_map"] == {
        "AutoImageProcessor": "image_processing_phi3_v.Phi3VImageProcessor",
        "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
    }
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.image_processor.num_crops == 7
    assert again.chat_template == processor.chat_template == CHAT_TEMPLATE
    assert again.stop_token_ids == processor.stop_token_ids
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_tokenizer_files_are_those_of_the_base(tokenizer_folder, tmp_path):
    """
    Transformers 4, and engines on it, read the official files and not those that transformers 5
    writes. Beside an adapter, which has no config.json, the official ones would give other ids.
    """
    text = "<|user|>\n<|image_1|>\nÄ<|end|>\n"
    base = Phi3VProcessor.from_pretrained(tokenizer_folder, num_crops=4, local_files_only=True)
    ids = base.tokenizer(text).input_ids
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for kind in ("model", "adapter"):
        (tmp_path / kind).mkdir()
        if kind == "model":
            shutil.copy(tokenizer_folder / "config.json", tmp_path / kind)
        base.save_pretrained(tmp_path / kind)
        same = [
            (tmp_path / kind / n).read_bytes() == (tokenizer_folder / n).read_bytes()
            for n in names[:2]
        ]
        assert all(same) == any(same) == (kind == "model")
        written = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert not {"is_local", "local_files_only", "num_crops"} & written.keys()
        assert Phi3VProcessor.from_pretrained(tmp_path / kind).tokenizer(text).input_ids == ids
    base.tokenizer.add_tokens(["<new>"])
    base.save_pretrained(tmp_path / "model")
    saved = Phi3VProcessor.from_pretrained(tmp_path / "model").tokenizer
    assert saved.convert_tokens_to_ids("<new>") == base.tokenizer.convert_tokens_to_ids("<new>")


def change_nothing(processor, base):
    processor(["a", "b c"], padding=True, truncation=True, max_length=2)


def replace_the_template(processor, base):
    processor.chat_template = "changed"


def add_a_token(processor, base):
    processor.tokenizer.add_tokens(["<box>"])


def drop_bos(processor, base):
    processor.tokenizer.backend_tokenizer.post_processor = ByteLevel()


def shorten(processor, base):
    processor.tokenizer.model_max_length = 99


def remove_the_base(processor, base):
    shutil.rmtree(base)


@pytest.mark.parametrize("place", ["elsewhere", "over itself"])
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (change_nothing, True),
        (replace_the_template, True),
        (add_a_token, False),
        (drop_bos, False),
        (shorten, False),
        (remove_the_base, False),
    ],
)
def test_what_a_save_keeps(demo_checkpoint, tmp_path, change, kept, place):
    """
    The base's files, byte for byte, unless they no longer make the tokenizer that is saved; and no
    setting of the processor twice, for transformers 4.
    """
    base = shutil.copytree(demo_checkpoint, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as no library writes them
        content = json.loads((base / name).read_text())
        content |= {"chat_template": CHAT_TEMPLATE} if name == "tokenizer_config.json" else {}
        (base / name).write_text(json.dumps(content, indent=7))
    (base / "chat_template.jinja").unlink()
    names = ("tokenizer.json", "tokenizer_config.json")
    files = [(base / name).read_bytes() for name in names]
    processor = AutoProcessor.from_pretrained(base, num_crops=7)
    change(processor, base)
    saved = base if place == "over itself" else tmp_path / "saved"
    saved.mkdir(exist_ok=True)
    shutil.copy(demo_checkpoint / "config.json", saved)
    processor.save_pretrained(saved)
    assert ([(saved / name).read_bytes() for name in names] == files) == kept
    again = AutoProcessor.from_pretrained(saved)
    assert again.chat_template == processor.chat_template and again.image_processor.num_crops == 7
    own = processor.tokenizer
    assert again.tokenizer.get_vocab() == own.get_vocab()
    assert again.tokenizer("a b").input_ids == own("a b").input_ids
    assert again.tokenizer.model_max_length == own.model_max_length
    assert (saved / "chat_template.jinja").exists() != (kept and change is not replace_the_template)
    assert "image_processor" not in json.loads((saved / "processor_config.json").read_text())
