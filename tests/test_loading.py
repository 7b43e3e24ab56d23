"""Model folders: whole ones load, others are refused with one line, and none runs code."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.phi3 import modeling_phi3

from conftest import GOLDEN
from finetune_hf_trainer_ucf101 import lora_config
from helpers.records import RECORDS
from helpers.trainers import arguments, loaded
from phi3v import Phi3VProcessor
from phi3v.errors import RunError
from phi3v.training import load_model, trainer_arguments
from phi3v.training.generation import generate
from phi3v.training.loading import (
    add_adapters,
    load_processor,
    load_weights,
    quantization_config,
    use_fused_kernels,
)

from peft import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

NORM = "model.norm.weight"


def edit(path: Path, **fields) -> None:
    """Set fields of a JSON file; those inside another are named with two underscores."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(content))


def config(**fields) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **fields)


def image_processor(**fields) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "preprocessor_config.json", **fields)


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(content)


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)] and None


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def norm(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({NORM: change(tensors[NORM])}))


def one(value: float) -> Callable[[Path], None]:
    """One value of a tensor."""
    return norm(lambda tensor: torch.cat([tensor[:-1], tensor.new_tensor([value])]))


def third_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()


def in_shards(folder: Path) -> dict[str, str]:
    """Move the weights to two files with an index; its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:30], names[30:]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
    return weight_map


def moved_shard(place: Callable[[Path, Path], str]) -> Callable[[Path], None]:
    """A shard is moved out of the folder; `place` makes what the index says of it."""

    def move(folder):
        weight_map = in_shards(folder)
        file = weight_map[NORM]
        outside = Path(shutil.move(folder / file, folder.parent / "outside.safetensors"))
        named = place(folder, outside)
        weight_map = {name: named if old == file else old for name, old in weight_map.items()}
        edit(folder / "model.safetensors.index.json", weight_map=weight_map)

    return move


def linked(folder: Path, outside: Path) -> str:
    (folder / "linked.safetensors").symlink_to(outside)
    return "linked.safetensors"


def pickled(folder: Path, outside: Path) -> str:
    torch.save(load_file(outside), folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def index(**fields) -> Callable[[Path], None]:
    return lambda folder: (
        in_shards(folder) and edit(folder / "model.safetensors.index.json", **fields)
    )


def without_token(token: str) -> Callable[[Path], None]:
    def change(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != token]
        path.write_text(json.dumps(content))

    return change


def template(text: str) -> Callable[[Path], object]:
    return write("chat_template.jinja", text)


LLAMA = "{% for m in messages %}<|start_header_id|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CLIP, FACTORS = "img_processor__clip_config", "rope_scaling__long_factor"
GENERATION, INDEX = "generation_config.json", "model.safetensors.index.json"

WRONG = {
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "it holds an adapter. Give the folder that --merge_lora wrote",
    ),
    "adapter beside a model": (write("adapter_config.json", "{}"), "it holds an adapter"),
    "no config": (remove("config.json"), "no config.json: it is not a model's folder"),
    "broken config": (write("config.json", "{"), "config.json: Expecting property name"),
    "config in another encoding": (
        write("config.json", b"\xff\xfe{"),
        "config.json: .utf-8. codec",
    ),
    "other model": (
        config(model_type="llama"),
        "config.json: it is of a model of type 'llama', not 'phi3_v'",
    ),
    "hidden size a string": (config(hidden_size="128"), "'hidden_size' expected int, got str"),
    "hidden size null": (config(hidden_size=None), "'hidden_size' expected int, got None"),
    "0 heads": (config(num_attention_heads=0), "config.json"),
    "0 positions": (config(max_position_embeddings=0), "max_position_embeddings has to be above 0"),
    "use_cache a string": (config(use_cache="no"), "'use_cache' expected bool"),
    "dropout NaN": (config(attention_dropout=float("nan")), "a dropout of nan"),
    "factors too few": (config(**{FACTORS: [1.0]}), "long_factor field must have length 16, got 1"),
    "no rope scaling": (config(rope_scaling=None), "rope_scaling has to be su"),
    "tied embeddings": (config(tie_word_embeddings=True), "tie_word_embeddings has to be false"),
    "quantised": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "config.json: it is quantised",
    ),
    "image token of another id": (
        config(image_token_id=5),
        r"in config.json image_token_id 5",
    ),
    "img_processor a string": (config(img_processor="clip"), "config.json: TypeError: .*"),
    "clip a list": (config(**{CLIP: [1]}), "config.json: TypeError"),
    "clip field of no such name": (
        config(**{f"{CLIP}__layers": 3}),
        r"clip_config has no field \['layers'\]",
    ),
    "clip patch 0": (
        config(**{f"{CLIP}__patch_size": 0}),
        "the image processor: ZeroDivisionError",
    ),
    "clip hidden size 0": (config(**{f"{CLIP}__hidden_size": 0}), "config.json"),
    "field that shadows a method": (
        config(to_dict=5),
        "config.json: TypeError: .int. object is not callable",
    ),
    "3 tokens a crop": (config(img_processor__num_img_tokens=3), "a crop makes 4 tokens"),
    "no tokenizer": (remove("*token*"), "the tokenizer's and processor's files: "),
    "no <|image|>": (without_token("<|image|>"), r"the tokenizer: it lacks <\|image\|>"),
    "no <|user|>": (without_token("<|user|>"), r"the tokenizer: it lacks <\|user\|>"),
    "bos of its own": (
        lambda folder: edit(folder / "tokenizer_config.json", bos_token="my own"),
        "the tokenizer: it has ids up to .* vocab_size",
    ),
    "no padding token": (
        lambda folder: edit(folder / "tokenizer_config.json", pad_token=None),
        "it has no pad_token",
    ),
    "template of Llama": (template(LLAMA), "the chat template: it makes .* the model knows"),
    "template without end": (template(ENDLESS), "the chat template: it is not done"),
    "template that raises": (template("{{ raise_exception('no') }}"), "the chat template: no\\.$"),
    "template that calls Python": (template("{{ ''.__class__() }}"), "the chat template: .*unsafe"),
    "template without content": (
        template("<|user|>"),
        "the chat template: it makes .* the model knows",
    ),
    "processor a list": (
        write("processor_config.json", "[1]"),
        "processor_config.json: it has to hold an object",
    ),
    "mean NaN": (image_processor(image_mean=[float("nan")] * 3), "pixels are not finite"),
    "std 0": (image_processor(image_std=[0.0] * 3), "the image processor: "),
    "mean of two": (image_processor(image_mean=[0.5] * 2), "processor"),
    "crop 57": (
        image_processor(crop_size={"height": 57, "width": 57}),
        "crop_size is .*57.* image_size 56",
    ),
    "crop 112": (
        image_processor(crop_size={"height": 112, "width": 112}),
        "crop_size is .*112.* image_size 56",
    ),
    "crop null": (image_processor(crop_size=None), "processor"),
    "patch size 1": (image_processor(patch_size=1), "num_img_tokens is .*784.* a crop makes 4"),
    "generation a list": (
        write(GENERATION, "[1]"),
        "generation_config.json: it has to hold an object",
    ),
    "generation null": (
        write(GENERATION, "null"),
        "generation_config.json: it has to hold an object",
    ),
    "generation of no such cache": (
        write(GENERATION, '{"cache_implementation": "mine"}'),
        "generation_config.json: ",
    ),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "it holds no weights as .safetensors",
    ),
    "cut weights": (
        lambda folder: write(
            "model.safetensors", (folder / "model.safetensors").read_bytes()[:-100]
        )(folder),
        "model.safetensors: ",
    ),
    "missing tensor": (
        weights(lambda tensors: tensors.pop(NORM)),
        f"{NORM} is missing. The checkpoint is incomplete",
    ),
    "misshapen tensor": (norm(lambda tensor: tensor[:-1].clone()), rf"{NORM} is of shape \[127\]"),
    "extra tensor": (
        weights(lambda tensors: tensors.update(extra=torch.ones(2))),
        "this model does not have extra",
    ),
    "extra layer": (weights(third_layer), r"num_hidden_layers is 2, model.layers.\* has 3"),
    "a billion layers": (config(num_hidden_layers=10**9), r"is 1000000000, model.layers.\* has 2"),
    "a billion layers of clip": (
        config(**{f"{CLIP}__num_hidden_layers": 10**9}),
        r"num_hidden_layers is 1000000000, .*encoder.layers.\* has 3",
    ),
    "whole numbers": (norm(torch.Tensor.long), f"{NORM} is I64"),
    "bytes": (norm(torch.Tensor.byte), f"{NORM} is U8"),
    "booleans": (norm(torch.Tensor.bool), f"{NORM} is BOOL"),
    "complex numbers": (norm(lambda tensor: tensor.to(torch.complex64)), f"{NORM} is C64"),
    "not a number": (one(float("nan")), f"{NORM} holds values from nan"),
    "infinite": (one(float("-inf")), f"{NORM} holds values from -inf"),
    "shard at an absolute path": (
        moved_shard(lambda folder, outside: str(outside)),
        "it names a file outside the folder: /",
    ),
    "shard in the folder above": (
        moved_shard(lambda folder, outside: f"../{outside.name}"),
        r"it names a file outside the folder: .*/\.\./",
    ),
    "shard behind a link": (moved_shard(linked), "names a file outside the folder"),
    "shard that is a pickle": (moved_shard(pickled), "no such .safetensors file"),
    "shard missing": (moved_shard(lambda folder, outside: "gone.safetensors"), "no such .safetens"),
    "tensor in two shards": (
        lambda folder: (
            in_shards(folder)
            and shutil.copy(
                folder / "model-00002-of-00002.safetensors",
                folder / "model-00003-of-00002.safetensors",
            )
            and edit(folder / INDEX, weight_map__more="model-00003-of-00002.safetensors")
        ),
        "model-00003-of-00002.safetensors: .* is in another file as well",
    ),
    "index a list": (
        lambda folder: in_shards(folder) and write(INDEX, "[]")(folder),
        "it has to hold an",
    ),
    "index of numbers": (index(weight_map={NORM: 5}), f"{INDEX}: TypeError"),
    "index without a map": (index(weight_map=[1]), f"{INDEX}: AttributeError"),
}


@pytest.fixture
def folder(demo_checkpoint, tmp_path):
    return shutil.copytree(demo_checkpoint, tmp_path / "model")


def load(name: str | Path) -> tuple[Phi3VProcessor, torch.nn.Module]:
    processor = load_processor(arguments(name, "unused"))
    return processor, load_weights(str(name), torch.float32)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_model_folders(folder, monkeypatch, what):
    """
    What is not a whole checkpoint of this model is refused in one line that names the folder, the
    file and what is wrong with it.
    """
    monkeypatch.setattr("phi3v.training.loading.RENDERING_LIMIT", 1)
    change, message = WRONG[what]
    change(folder)
    with pytest.raises(RunError, match=message) as refused:
        load(folder)
    text = str(refused.value)
    assert text.startswith(f"--model_name_or_path {folder}") and "\n" not in text
    assert len(text) < 1000


def test_no_such_folder(tmp_path, monkeypatch):
    """Neither a folder nor a hub id, or a file: said in the user's words."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    for name, message in [
        ("./gone", "there is no such folder"),
        (tmp_path / "file", "is a file. Give the folder"),
    ]:
        with pytest.raises(RunError, match=f"--model_name_or_path {name}.*{message}"):
            load_processor(arguments(name, "unused"))


def test_values_beyond_fp16(folder):
    """What float32 holds and fp16 does not is found where the model is computed in fp16."""
    one(1e5)(folder)
    load_weights(str(folder), torch.float32)
    for precision in (
        {"dtype": torch.float16},
        {"dtype": torch.float32, "computed_in": torch.half},
    ):
        with pytest.raises(RunError, match=f"{NORM} holds values from .* beyond torch.float16"):
            load_weights(str(folder), **precision)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_become_4_bits(folder, value):
    """A weight that is not finite is found, though 4 bits would hide it."""
    name = "model.layers.0.mlp.down_proj.weight"
    weights(lambda tensors: tensors[name].view(-1)[70].fill_(value))(folder)
    with pytest.raises(RunError, match=f"{name} holds values from"):
        load_weights(
            str(folder),
            torch.float32,
            quantization_config=quantization_config(torch.float32),
            device_map={"": "cpu"},
        )


def test_folders_that_load(folder, demo_checkpoint):
    """Shards, a system prompt in the template, and an index's link inside the folder are fine."""
    _, whole = load(folder)
    weight_map = in_shards(folder)
    file = weight_map[NORM]
    (folder / file).rename(folder / "blob")
    (folder / file).symlink_to(folder / "blob")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("<|system|>\nBe brief.<|end|>\n" + text)
    _, sharded = load(folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor), name


def test_hub_cache(folder, tmp_path, monkeypatch):
    """A hub id loads from the cache, whose files are links, under the same checks and its name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    in_shards(folder)
    repository = tmp_path / "hub" / "models--someone--model"
    for part in ("refs", "blobs", "snapshots/abc"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    for path in list(folder.iterdir()):
        shutil.move(path, repository / "blobs" / path.name)
        (repository / "snapshots/abc" / path.name).symlink_to(repository / "blobs" / path.name)
    processor, model = load("someone/model")
    assert type(processor) is Phi3VProcessor and model.name_or_path == "someone/model"
    edit(repository / "blobs" / "config.json", num_hidden_layers=3)
    with pytest.raises(RunError, match="--model_name_or_path someone/model: config.json"):
        load("someone/model")


def test_official_folder(tokenizer_folder, tmp_path):
    """The hub's files, auto_map included, load as our classes; without weights, it says so."""
    shutil.copytree(tokenizer_folder, tmp_path / "official")
    shutil.copy(GOLDEN / "config_full.json", tmp_path / "official" / "config.json")
    processor = load_processor(arguments(tmp_path / "official", "unused", "--num_crops", "16"))
    assert type(processor) is Phi3VProcessor and processor.image_processor.num_crops == 16
    with pytest.raises(RunError, match="it holds no weights as .safetensors"):
        load_weights(str(tmp_path / "official"), torch.float32)


LORA = LoraConfig(r=4, target_modules=["qkv_proj", "lm_head", "q_proj", "img_projection.0"])


@pytest.mark.parametrize("frozen", [False, True])
def test_adapters_are_where_they_learn(folder, frozen):
    """What is never run gets none, nor what is frozen; the recipe's config stays as it is."""
    model = load_weights(str(folder), torch.float32)
    model.model.vision_embed_tokens.requires_grad_(not frozen)
    names = [n for n, p in add_adapters(model, LORA).named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names) and LORA.exclude_modules is None
    places = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in names}
    layer = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.{}.self_attn"
    language = {"lm_head", *(f"model.layers.{i}.self_attn.qkv_proj" for i in range(2))}
    vision = {layer.format(i) + ".q_proj" for i in range(2)}
    vision.add("model.vision_embed_tokens.img_projection.0")
    assert places == (language if frozen else language | vision)


def test_fused_kernels_take_the_place_of_the_decoders_own(folder, monkeypatch):
    """Of every norm, MLP and RoPE of the decoder, and not of the head and loss."""
    from liger_kernel import transformers

    for name in ("apply_rotary_pos_emb", "Phi3RMSNorm", "Phi3MLP"):  # put back at the end
        monkeypatch.setattr(modeling_phi3, name, getattr(modeling_phi3, name))
    model = load_weights(str(folder), torch.float32)
    use_fused_kernels(model)
    forwards = [module.forward.__func__ for module in model.modules()]
    assert forwards.count(transformers.LigerRMSNorm.forward) == 2 * 2 + 1
    assert forwards.count(transformers.LigerPhi3SwiGLUMLP.forward) == 2
    assert modeling_phi3.apply_rotary_pos_emb is transformers.liger_rotary_pos_emb
    assert model.forward.__func__ is type(model).forward


CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "named_in", ["tokenizer", "tokenizer alone", "processor", "image processor", "config"]
)
def test_no_code_of_a_folder_runs(folder, tmp_path, monkeypatch, named_in):
    """
    A folder that names classes of its own never runs them, whatever is answered to the question
    that transformers would ask.
    """
    asked = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / "pwned")))
    if named_in.startswith("tokenizer"):
        edit(
            folder / "tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        )
        if named_in == "tokenizer alone":
            remove("*processor_config.json")(folder)
    else:
        auto_map = {
            kind: "evil.Evil"
            for kind in (
                "AutoConfig",
                "AutoModelForCausalLM",
                "AutoProcessor",
                "AutoImageProcessor",
            )
        }
        names = {"processor": "processor_config", "image processor": "preprocessor_config"}
        edit(
            folder / f"{names.get(named_in, 'config')}.json",
            processor_class="Evil",
            image_processor_type="Evil",
            auto_map=auto_map,
        )
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    try:
        processor, _ = load(folder)
    except RunError as refused:
        assert f"--model_name_or_path {folder}" in str(refused) and "trust" not in str(refused)
    else:
        assert type(processor) is Phi3VProcessor
    assert not asked and not (tmp_path / "pwned").exists()


NOT_GREEDY = {
    "beams": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 7},
    "lengths": {"min_length": 900, "max_length": 1, "max_time": 1e-9},
    "tokens": {"suppress_tokens": list(range(300)), "forced_eos_token_id": 400, "eos_token_id": 7},
    "words": {"bad_words_ids": [[i] for i in range(300)], "begin_suppress_tokens": [2, 3]},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 2, "guidance_scale": 3.0},
    "lookup": {"prompt_lookup_num_tokens": 3, "assistant_early_exit": 1},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "strings": {"stop_strings": ["a", "e", "1"]},
    "cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def greedy_answers(demo_checkpoint, tmp_path_factory):
    return answers(demo_checkpoint, tmp_path_factory.mktemp("greedy"))


def answers(checkpoint, output_dir, *flags) -> list[tuple[str, float]]:
    args = arguments(checkpoint, output_dir, "--max_new_tokens", "5", *flags)
    model, processor, training_args = loaded(args), load_processor(args), trainer_arguments(args)
    own = model.generation_config.to_dict()
    found = generate(model, processor, RECORDS, training_args, 5, ("DigitTwo", "DigitOne"))
    assert model.generation_config.to_dict() == own, "the checkpoint's was not put back"
    return found


@pytest.mark.parametrize("what", NOT_GREEDY)
def test_evaluation_is_greedy(folder, tmp_path, greedy_answers, what):
    """Whatever generation_config.json says, every prompt gets its one greedy answer, in order."""
    edit(folder / GENERATION, **NOT_GREEDY[what])
    assert answers(folder, tmp_path / "out") == greedy_answers


def test_evaluation_with_adapters_is_greedy(folder, tmp_path):
    """Nor where PEFT stands between, which hands the base model a config of its own."""
    plain = answers(folder, tmp_path / "a", "--use_lora", "--lora_rank", "4")
    edit(folder / GENERATION, **NOT_GREEDY["beams"], **NOT_GREEDY["penalties"])
    assert answers(folder, tmp_path / "b", "--use_lora", "--lora_rank", "4") == plain


@pytest.mark.parametrize(
    ("flags", "deepspeed", "dtype"),
    [
        ((), True, torch.float16),
        (("--bf16",), True, torch.bfloat16),
        ((), False, torch.float32),
        (("--use_lora",), False, torch.float16),
    ],
)
def test_precision_of_weights_on_a_gpu(demo_checkpoint, tmp_path, flags, deepspeed, dtype):
    """
    16 bits where DeepSpeed keeps float32 copies, or adapters are trained; float32 where the
    optimizer updates the weights themselves.
    """
    args = arguments(demo_checkpoint, tmp_path, *flags)
    on_gpu = SimpleNamespace(
        bf16=args.bf16,
        fp16=not args.bf16,
        deepspeed={} if deepspeed else None,
        device=torch.device("cpu"),
    )
    weights = load_model(args, on_gpu, lora_config(args)).state_dict()
    assert {v.dtype for name, v in weights.items() if "lora" not in name} == {dtype}
    assert {v.dtype for name, v in weights.items() if "lora" in name} <= {torch.float32}
