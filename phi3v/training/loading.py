"""
The model folder, from --model_name_or_path to a processor and a model.

A folder may be broken, of another model, or made to do harm. It is checked from the cheap to the
dear, so that what is wrong is said before anything large is read: JSON files, config, processor,
names and shapes of the weights, their values. No code of a folder is ever run.
"""

import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType, MethodType

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import BitsAndBytesConfig, CLIPVisionConfig, GenerationConfig, TrainingArguments
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3DecoderLayer,
    Phi3MLP,
    Phi3RMSNorm,
)

from ..distributed import print_first
from ..errors import RunError
from ..model.configuration_phi3_v import Phi3VConfig
from ..model.image_processing_phi3_v import Phi3VImageProcessor
from ..model.modeling_phi3_v import Phi3VForCausalLM
from ..model.processing_phi3_v import Phi3VProcessor

LANGUAGE_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
VISION_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PROJECTION_TARGETS = ["img_projection.0", "img_projection.2"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read of a folder, and of which class the fields become attributes.
JSON_FILES = {
    "config.json": Phi3VConfig,
    "generation_config.json": GenerationConfig,
    "preprocessor_config.json": Phi3VImageProcessor,
    "processor_config.json": Phi3VProcessor,
    **dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")),
    **dict.fromkeys(("added_tokens.json", "chat_template.json", INDEX)),
}
CONTROL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|image|>")
RENDERING_LIMIT = 10  # seconds that a chat template may take
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors calls them
EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"
LAYERS = {
    "num_hidden_layers": re.compile(r"model\.layers\.(\d+)\."),
    "img_processor's num_hidden_layers": re.compile(r".*\.vision_model\.encoder\.layers\.(\d+)\."),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def load_processor(args: argparse.Namespace) -> Phi3VProcessor:
    """
    The processor of --model_name_or_path, with --num_crops; the folder's config is checked as well.

    Raises:
        RunError: there is none, or the folder is not one of this model.
    """
    flag = f"--model_name_or_path {args.model_name_or_path}"
    folder = _model_folder(args.model_name_or_path, ["*.json", "*.jinja", "*.model"])
    _check_json_files(flag, folder)
    config = _load_config(flag, folder)
    with _reading(flag, "the tokenizer's and processor's files"):
        processor = Phi3VProcessor.from_pretrained(
            folder, num_crops=args.num_crops, trust_remote_code=False
        )
        _check_tokenizer(flag, processor, config)
        _check_image_processor(flag, processor.image_processor, config)
        _try_out(flag, processor)
    return processor


def _model_folder(name: str, patterns: list[str]) -> Path:
    """The local folder `name`; of a hub id, its copy in the cache, with files like `patterns`."""
    flag = f"--model_name_or_path {name}"
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise RunError(f"{flag} is a file. Give the folder that it is in.")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, of a name that cannot be a hub id
        raise RunError(
            f"{flag}: there is no such folder, and the hub has no such model, or cannot be "
            f"reached: {_one_line(error)}"
        ) from error


@contextlib.contextmanager
def _reading(flag: str, what: str) -> Iterator[None]:
    """Turn whatever libraries raise over a folder's content into one line that names the file."""
    try:
        yield
    except (RunError, torch.OutOfMemoryError):
        raise
    except (TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise RunError(
            f"{flag}: {what} cannot be used: a value is missing or of the wrong kind. Compare with "
            "microsoft/Phi-3.5-vision-instruct's."
        ) from error
    except Exception as error:
        raise RunError(f"{flag}: {what} cannot be used: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _check_json_files(flag: str, folder: Path) -> None:
    """Raise RunError unless `folder` can be a checkpoint of this model."""
    if (folder / "adapter_config.json").is_file():
        # With a model beside it, transformers would load the model that this file names.
        raise RunError(
            f"{flag} holds an adapter, not a model. Give the folder that --merge_lora wrote."
        )
    if not (folder / "config.json").is_file():
        raise RunError(f"{flag} holds no config.json: it is not a model's folder.")
    for name, kind in JSON_FILES.items():
        path = folder / name
        if not path.exists():
            continue
        if not path.is_file():
            raise RunError(f"{flag}: {name} is not a file.")
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{flag}: {name} is broken: {_one_line(error)}") from None
        if not isinstance(content, dict):
            raise RunError(f"{flag}: {name} is broken: it has to hold an object, {{...}}.")
        if shadowing := [field for field in content if callable(getattr(kind, field, None))]:
            raise RunError(f"{flag}: {name} has a field that does not belong there: {shadowing[0]}")
        if name == "config.json" and content.get("model_type") != "phi3_v":
            raise RunError(
                f"{flag} is a model of type {content.get('model_type')!r}, not Phi-3.5-vision's "
                "'phi3_v'."
            )


def _load_config(flag: str, folder: Path) -> Phi3VConfig:
    """The folder's config, whose numbers make sense."""
    with _reading(flag, "config.json"):
        config = Phi3VConfig.from_pretrained(folder)
        clip = config.img_processor.get("clip_config") or {}
        if unknown := sorted(clip.keys() - CLIPVisionConfig().to_dict().keys()):
            raise RunError(f"{flag}: config.json: clip_config has no field {unknown[0]!r}.")
        if getattr(config, "quantization_config", None) is not None:
            raise RunError(
                f"{flag}: config.json has a quantization_config. Give the model from before, whose "
                "weights can be trained. --use_qlora makes 4 bits of them."
            )
        if config.tie_word_embeddings:
            raise RunError(f"{flag}: config.json: tie_word_embeddings has to be false.")
        vision, rope = config.vision_config, config.rope_parameters
        if rope["rope_type"] != "longrope":
            raise RunError(f"{flag}: config.json: rope_scaling has to be of type su.")
        positive = {name: getattr(config, name) for name in (*SIZES, "num_key_value_heads")}
        for name in ("vocab_size", "max_position_embeddings", "original_max_position_embeddings"):
            positive[name] = getattr(config, name)
        for name in (*SIZES, "image_size", "patch_size", "layer_norm_eps"):
            positive[f"img_processor's {name}"] = getattr(vision, name)
        for name in ("short_factor", "long_factor"):
            positive |= {f"{name}[{i}]": factor for i, factor in enumerate(rope[name])}
        positive |= {"rope_theta": rope["rope_theta"], "rms_norm_eps": config.rms_norm_eps}
        for name, value in positive.items():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise RunError(f"{flag}: config.json: {name} is {value!r}, and has to be above 0.")
        config.validate()  # transformers does so on saving alone: too few factors would be repeated
        for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
            if not 0 <= getattr(config, name) < 1:
                raise RunError(f"{flag}: config.json: {name} has to be 0 or more, and below 1.")
    return config


def _check_tokenizer(flag: str, processor: Phi3VProcessor, config: Phi3VConfig) -> None:
    tokenizer = processor.tokenizer
    for token in CONTROL_TOKENS:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise RunError(f"{flag}: the tokenizer lacks the token {token}.")
    if (largest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise RunError(
            f"{flag}: the tokenizer has ids up to {largest}, the model a vocab_size of "
            f"{config.vocab_size} (config.json). Do they belong together?"
        )
    if config.image_token_id != processor.image_token_id:
        raise RunError(
            f"{flag}: config.json: image_token_id is {config.image_token_id}, and <|image|> is "
            f"{processor.image_token_id} in the tokenizer."
        )
    if tokenizer("a").input_ids[0] != tokenizer.convert_tokens_to_ids("<s>"):
        raise RunError(f"{flag}: the tokenizer does not begin texts with <s>.")
    if tokenizer.pad_token_id is None:
        raise RunError(f"{flag}: tokenizer_config.json names no pad_token.")


def _check_image_processor(flag: str, processor: Phi3VImageProcessor, config: Phi3VConfig) -> None:
    if not isinstance(processor, Phi3VImageProcessor):
        raise RunError(
            f"{flag}: its image processor is a {type(processor).__name__}, not a "
            "Phi3VImageProcessor. Take preprocessor_config.json of Phi-3.5-vision."
        )
    vision = config.vision_config
    crop, size = processor.crop_size, vision.image_size
    if (crop["height"], crop["width"]) != (size, size):
        raise RunError(
            f"{flag}: the image processor's crop_size is {crop['height']} x {crop['width']}, the "
            f"vision tower's image_size {size}."
        )
    if size % (2 * vision.patch_size):
        raise RunError(
            f"{flag}: config.json: an image_size of {size} has no even number of patches of "
            f"{vision.patch_size} pixels."
        )
    tokens = (size // vision.patch_size // 2) ** 2
    given = {
        "the image processor's num_img_tokens": processor.num_img_tokens,
        "config.json: img_processor's num_img_tokens": config.img_processor["num_img_tokens"],
    }
    for name, value in given.items():
        if value != tokens:
            raise RunError(f"{flag}: {name} is {value}; the vision tower makes {tokens} of a crop.")


def _try_out(flag: str, processor: Phi3VProcessor) -> None:
    """Take a conversation of two turns and two images the way of the data."""
    question = "<|image_1|>\n<|image_2|>\nA?"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C?"},
    ]
    expected = (
        f"<|user|>\n{question}<|end|>\n<|assistant|>\nB<|end|>\n"
        "<|user|>\nC?<|end|>\n<|assistant|>\n"
    )
    with _reading(flag, "the chat template"), _time_limit(RENDERING_LIMIT):
        text = processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    if not text.endswith(expected):
        raise RunError(
            f"{flag}: the chat template is not Phi-3.5-vision's: it makes {text[-200:]!r} where "
            f"the model knows {expected!r}."
        )
    images = [Image.new("RGB", (64, 48)), Image.new("RGB", (40, 90))]
    encoded = processor(text, images)
    placeholders = (encoded["input_ids"] == processor.image_token_id).sum().item()
    tokens = sum(processor.calc_num_image_tokens(images))
    if placeholders != tokens:
        raise RunError(f"{flag}: {tokens} image tokens become {placeholders} in the tokenizer.")
    if not encoded["pixel_values"].isfinite().all():
        raise RunError(
            f"{flag}: with image_mean {processor.image_processor.image_mean} and image_std "
            f"{processor.image_processor.image_std}, pixels are not finite."
        )


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where Python code goes on for longer. Only the main thread can have it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_):
        raise TimeoutError(f"it is not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def load_model(
    args: argparse.Namespace, training_args: TrainingArguments
) -> Phi3VForCausalLM | PeftModel:
    """
    The model as the flags ask for it: its precision and attention, 4-bit, frozen parts, adapters.

    Weights are float32 where the optimizer updates them directly, and in the low precision where
    DeepSpeed keeps a float32 copy or where they are frozen under adapters.
    """
    # Before anything random: the adapters' initialisation has to be the same on every rank and in
    # every run.
    transformers.set_seed(args.seed)
    low = torch.bfloat16 if training_args.bf16 else torch.float16
    low_precision = training_args.bf16 or training_args.fp16
    mastered = training_args.deepspeed is not None
    quantization = {}
    if args.use_qlora:
        compute_dtype = low if low_precision else torch.float32
        quantization["quantization_config"] = quantization_config(compute_dtype)
        quantization["device_map"] = {"": training_args.device}
    model = load_weights(
        args.model_name_or_path,
        dtype=low if low_precision and (mastered or args.use_lora) else torch.float32,
        computed_in=low if low_precision else torch.float32,
        attn_implementation="flash_attention_2" if args.use_flash_attention else "sdpa",
        **quantization,
    )
    if args.use_qlora and training_args.device.type == "cpu":
        # An evaluation would repack the weights for an inference kernel without gradients, and the
        # training after it would go on with that kernel.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if args.use_liger:
        use_fused_kernels(model)
    if args.freeze_vision_model:
        # All that sees pixels: CLIP, the projection and the separators. Not the token embedding.
        model.model.vision_embed_tokens.requires_grad_(False)
    if args.use_lora:
        model = get_peft_model(model, lora_config(args, model))
    if args.torch_compile:
        compile_layers(model)
    # A shard of ZeRO-3 says in ds_numel how large the whole is.
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if trained == 0:
        raise RunError("no parameter is left to train. Drop one of the flags that freeze.")
    print_first(f"{trained:,} trained parameters")
    return model


def load_weights(
    name: str, dtype: torch.dtype, computed_in: torch.dtype | None = None, **kwargs
) -> Phi3VForCausalLM:
    """
    The model of a folder or hub id, with weights of `dtype`.

    `from_pretrained` would fill in what lacks with random numbers, leave out what is too much, and
    take whole numbers for weights.

    Raises:
        RunError: the checkpoint has other tensors than the model, or values that are not finite in
            the precision that it is computed in, by default `dtype`.
    """
    flag = f"--model_name_or_path {name}"
    folder = _model_folder(name, ["*.json", "model*.safetensors"])
    _check_json_files(flag, folder)
    config = _load_config(flag, folder)
    shards = _shards(flag, folder)
    _check_tensors(flag, shards, config)
    _check_values(flag, shards, computed_in or dtype)
    if (folder / "generation_config.json").is_file():
        with _reading(flag, "generation_config.json"):
            GenerationConfig.from_pretrained(folder)
    with _reading(flag, "the weights"):
        model, info = Phi3VForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **kwargs,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RunError(f"{flag}: {kind} on loading: {sorted(map(str, info[kind]))[0]}.")
    with _reading(flag, "generation_config.json"), TemporaryDirectory() as scratch:
        model.generation_config.save_pretrained(scratch)  # or it fails when the model is trained
    # An adapter names its base model: by the hub id, not by a folder of the cache.
    model.name_or_path = model.config.name_or_path = name
    return model


def _shards(flag: str, folder: Path) -> list[Path]:
    """The files that hold the weights, all of them in `folder`."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise RunError(
            f"{flag} holds no weights as .safetensors. Others (.bin, .pt) are not loaded, because "
            "they can run code."
        )
    with _reading(flag, INDEX):
        weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    # In the hub's cache, a folder's files are links to blobs beside it.
    inside = {folder.resolve(), folder.resolve().parent.parent / "blobs"}
    for name in names:
        path = folder / str(name)
        if Path(str(name)).name != name or path.resolve().parent not in inside:
            raise RunError(f"{flag}: {INDEX} names a file outside the folder: {name!r}.")
        if path.suffix != ".safetensors" or not path.is_file():
            raise RunError(
                f"{flag}: {INDEX} names {name!r}, and there is no such .safetensors file."
            )
    return [folder / name for name in names]


def _check_tensors(flag: str, shards: list[Path], config: Phi3VConfig) -> None:
    """Raise RunError unless the shards' headers name the model's tensors, with their shapes."""
    found = {}  # name -> file, shape
    for path in shards:
        with _reading(flag, path.name), safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                if name.endswith("embeddings.position_ids"):
                    continue
                header = shard.get_slice(name)
                if header.get_dtype() not in FLOATS:
                    raise RunError(
                        f"{flag}: {path.name}: {name} is of type {header.get_dtype()}; weights are "
                        f"of {', '.join(sorted(FLOATS))}."
                    )
                if name in found:
                    raise RunError(f"{flag}: {name} is in {found[name][0]} and in {path.name}.")
                found[name] = path.name, list(header.get_shape())
    alias = found.pop(EMBEDDING_ALIAS, None)
    if alias:
        found.setdefault(EMBEDDING, alias)
    # Before the model is built, even without memory for its weights: of a billion layers it would
    # take for ever.
    counts = (config.num_hidden_layers, config.vision_config.num_hidden_layers)
    for (field, pattern), count in zip(LAYERS.items(), counts, strict=True):
        held = len({match[1] for name in found if (match := pattern.match(name))})
        if held != count:
            raise RunError(
                f"{flag}: config.json: {field} is {count}, but the weights have {held} layers."
            )
    with _reading(flag, "config.json"), torch.device("meta"):
        state = Phi3VForCausalLM(copy.deepcopy(config)).state_dict()
    if missing := sorted(state.keys() - found.keys()):
        raise RunError(
            f"{flag} lacks {len(missing)} of the model's tensors, {missing[0]} among them. "
            "The checkpoint is incomplete."
        )
    for name, (file, shape) in found.items():
        if name not in state:
            raise RunError(f"{flag}: {file} holds {name}, which this model does not have.")
        if shape != list(state[name].shape):
            raise RunError(
                f"{flag}: {file}: {name} is of shape {shape}; by config.json it has to be "
                f"{list(state[name].shape)}."
            )


def _check_values(flag: str, shards: list[Path], dtype: torch.dtype) -> None:
    """Raise RunError at values that are not finite in `dtype`. A machine's ranks share the work."""
    rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    largest = torch.finfo(dtype).max
    for path in shards:
        with _reading(flag, path.name), safe_open(path, "pt") as shard:
            for name in sorted(shard.keys())[rank::ranks]:
                low, high = shard.get_tensor(name).aminmax()  # NaN, where there is one
                if not (-largest <= low.item() and high.item() <= largest):
                    raise RunError(
                        f"{flag}: {path.name}: {name} holds values from {low.item()} to "
                        f"{high.item()}, which {dtype} does not have. The weights are broken."
                    )


def use_fused_kernels(model: Phi3VForCausalLM) -> None:
    """
    Let the decoder's RMSNorm, SwiGLU and RoPE run as one kernel of liger-kernel each.

    Only this model's modules change, not their classes. Liger's fused head and loss has no place
    here: the head runs at the labels alone.
    """
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    def norm(module: Phi3RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        return liger_rms_norm(hidden_states, module.weight, module.variance_epsilon)

    def mlp(module: Phi3MLP, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return module.down_proj(liger_swiglu(gate, up))

    # Attention calls RoPE by a name of its file. This is the same code, for which the name means
    # liger's.
    original = inspect.unwrap(Phi3Attention.forward)  # from 5.24 on, behind one that renames
    names = {**original.__globals__, "apply_rotary_pos_emb": liger_rope}
    attention = FunctionType(original.__code__, names, argdefs=original.__defaults__)

    fused = {Phi3RMSNorm: norm, Phi3MLP: mlp, Phi3Attention: attention}
    for module in model.modules():
        if type(module) in fused:
            module.forward = MethodType(fused[type(module)], module)


def compile_layers(model: Phi3VForCausalLM | PeftModel) -> None:
    """
    Compile the decoder's and CLIP's layers for training, one by one and in place: layers of a kind
    share the compiled code, and tensors keep their names.
    """
    # Gradients of one layer are sent while the next is computed, without DDP splitting layers for
    # it; it cannot split those that are computed again in the backward pass.
    torch._dynamo.config.optimize_ddp = False
    # By default 8, for all layers together. Some are needed: one row or several, with padding or
    # without, input with gradients or without. Past the limit, layers are no longer compiled.
    torch._dynamo.config.recompile_limit = 32
    for module in model.modules():
        if isinstance(module, Phi3DecoderLayer | CLIPEncoderLayer):
            module.forward = _compiled_in_training(module)


def _compiled_in_training(layer: torch.nn.Module) -> Callable:
    """The layer's forward. Generation is not compiled: its shapes change with every token."""
    forward = layer.forward
    compiled = torch.compile(forward, dynamic=True)  # lengths and numbers of crops vary

    def choose(*args, **kwargs):
        return (compiled if layer.training else forward)(*args, **kwargs)

    return choose


def quantization_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's 4-bit weights, which are computed with in `compute_dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        # Only the decoder's layers are quantised: the rest is small, and its precision matters.
        llm_int8_skip_modules=["lm_head", "model.vision_embed_tokens"],
    )


def lora_config(args: argparse.Namespace, model: Phi3VForCausalLM) -> LoraConfig:
    """
    The recipe's LoRA: all linear layers that run, of the language model alone with
    --freeze_vision_model.
    """
    targets = list(LANGUAGE_TARGETS)
    if not args.freeze_vision_model:
        targets += VISION_TARGETS + PROJECTION_TARGETS
    last = model.config.vision_config.num_hidden_layers - 1
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank * args.lora_alpha_ratio,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        # CLIP's last layer is never run, see `Phi3VVisionTower`.
        exclude_modules=rf".*\.vision_model\.encoder\.layers\.{last}\..*",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
