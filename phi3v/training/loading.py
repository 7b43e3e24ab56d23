"""
The model folder, from --model_name_or_path to a processor and a model.

A folder may be broken, of another model, or made to do harm. What libraries say of it becomes one
message (`phase`); looked at here is what would do harm, or train something else without a word. No
code of a folder is ever run.
"""

import argparse
import contextlib
import copy
import json
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import safe_open
from transformers import BitsAndBytesConfig, CLIPVisionConfig, GenerationConfig, TrainingArguments
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from ..distributed import print_first
from ..errors import RunError, one_line, phase
from ..model.configuration_phi3_v import Phi3VConfig
from ..model.image_processing_phi3_v import Phi3VImageProcessor
from ..model.modeling_phi3_v import Phi3VForCausalLM
from ..model.processing_phi3_v import Phi3VProcessor
from .attention import choose_attention

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", INDEX),
)
CONTROL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|image|>")
RENDERING_LIMIT = 10  # seconds that a chat template may take
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
EMBEDDING, EMBEDDING_ALIAS = "model.embed_tokens.weight", "model.vision_embed_tokens.wte.weight"
LAYERS = "model.layers."
CLIP_LAYERS = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers."
QUESTION = "<|image_1|>\n<|image_2|>\nA?"
CONVERSATION = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C?"},
]
RENDERED = (
    f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\nB<|end|>\n<|user|>\nC?<|end|>\n<|assistant|>\n"
)


def load_processor(args: argparse.Namespace, adapter: Path | None = None) -> Phi3VProcessor:
    """
    The processor of --model_name_or_path, with --num_crops or else its own, tried out on a
    conversation.

    Args:
        adapter: a folder whose processor takes the place of the model's.

    Raises:
        RunError: there is none, or the folder is not one of this model.
    """
    flag = f"--model_name_or_path {args.model_name_or_path}"
    patterns = ["*.json", "*.jinja", "*.model"]
    folder = model_folder(args.model_name_or_path, patterns, args.model_revision)
    config = _load_config(flag, folder)
    crops = {} if args.num_crops is None else {"num_crops": args.num_crops}
    with phase(f"{flag}: the tokenizer's and processor's files"):
        processor = Phi3VProcessor.from_pretrained(
            adapter or folder, **crops, trust_remote_code=False
        )
        _check_processor(flag, processor, config)
    return processor


def load_config(args: argparse.Namespace) -> Phi3VConfig:
    """The config of --model_name_or_path. Weights need not be there."""
    folder = model_folder(args.model_name_or_path, ["*.json"], args.model_revision)
    return _load_config(f"--model_name_or_path {args.model_name_or_path}", folder)


def model_folder(name: str, patterns: list[str], revision: str | None) -> Path:
    """The local folder `name`; of a hub id, its copy in the cache, with files like `patterns`."""
    flag = f"--model_name_or_path {name}"
    folder = Path(name)
    if folder.is_file():
        raise RunError(f"{flag} is a file. Give the folder that it is in.")
    if folder.is_dir() and revision is not None:
        raise RunError(f"{flag} is a folder, and --model_revision {revision} is for hub ids.")
    if not folder.is_dir():
        flag += f" --model_revision {revision}" if revision is not None else ""
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:  # of the network, of the hub, of a name that cannot be a hub id
            raise RunError(
                f"{flag}: there is no such folder, and the hub has no such model, or cannot be "
                f"reached: {one_line(error)}"
            ) from error
    return folder


def _load_config(flag: str, folder: Path) -> Phi3VConfig:
    """The folder's config, without settings that would be ignored or do something else."""
    with phase(flag) as require:
        # With a model beside it, transformers would load the model that this file names.
        adapter = (folder / "adapter_config.json").exists()
        require(not adapter, "it holds an adapter. Give the folder that --merge_lora wrote.")
        require((folder / "config.json").exists(), "no config.json: it is not a model's folder.")
    for path in filter(Path.exists, (folder / name for name in JSON_FILES)):
        with phase(f"{flag}: {path.name}") as require:
            content = json.loads(path.read_text("utf-8"))
            require(isinstance(content, dict), "it has to hold an object, {...}.")
    with phase(f"{flag}: config.json") as require:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
        require(kind == "phi3_v", f"it is of a model of type {kind!r}, not 'phi3_v'.")
        config = Phi3VConfig.from_pretrained(folder)
        config.validate()  # transformers does so on saving alone: too few factors would be repeated
        clip = config.img_processor.get("clip_config") or {}
        unknown = sorted(clip.keys() - CLIPVisionConfig().to_dict().keys())
        require(not unknown, f"clip_config has no field {unknown}.")
        quantised = getattr(config, "quantization_config", None)
        require(not quantised, "it is quantised. --use_qlora makes 4 bits of whole weights.")
        require(not config.tie_word_embeddings, "tie_word_embeddings has to be false.")
        require(config.rope_parameters["rope_type"] == "longrope", "rope_scaling has to be su.")
        require(config.max_position_embeddings > 0, "max_position_embeddings has to be above 0.")
        for dropout in (config.attention_dropout, config.resid_pdrop, config.embd_pdrop):
            require(0 <= dropout < 1, f"a dropout of {dropout} is not from 0 to below 1.")
    return config


def _check_processor(flag: str, processor: Phi3VProcessor, config: Phi3VConfig) -> None:
    """Take a conversation of two turns and two images the way of the data."""
    tokenizer, images = processor.tokenizer, processor.image_processor
    with phase(f"{flag}: the tokenizer") as require:
        for token in CONTROL_TOKENS:
            ids = tokenizer(token, add_special_tokens=False).input_ids
            require(len(ids) == 1 and ids[0] != tokenizer.unk_token_id, f"it lacks {token}.")
        largest, size = max(tokenizer.get_vocab().values()), config.vocab_size
        require(largest < size, f"it has ids up to {largest}, config.json a vocab_size of {size}.")
        ids = (config.image_token_id, processor.image_token_id)
        require(ids[0] == ids[1], f"<|image|> is {ids[1]}, in config.json image_token_id {ids[0]}.")
        bos = tokenizer.convert_tokens_to_ids("<s>")
        require(tokenizer("a").input_ids[0] == bos, "it does not begin texts with <s>.")
        require(tokenizer.pad_token_id is not None, "it has no pad_token.")
    with phase(f"{flag}: the chat template") as require, _time_limit(RENDERING_LIMIT):
        text = tokenizer.apply_chat_template(
            CONVERSATION, tokenize=False, add_generation_prompt=True
        )
        require(text.endswith(RENDERED), f"it makes {text[-200:]!r}, the model knows {RENDERED!r}.")
    with phase(f"{flag}: the image processor") as require:
        kind = type(images)
        require(kind is Phi3VImageProcessor, f"it is a {kind.__name__}, no Phi3VImageProcessor.")
        vision, crop = config.vision_config, images.crop_size
        size, patch = vision.image_size, vision.patch_size
        same = crop["height"] == crop["width"] == size
        require(same, f"its crop_size is {crop}, the vision tower's image_size {size}.")
        require(
            size % (2 * patch) == 0, f"{size} pixels have no even number of patches of {patch}."
        )
        given = {images.num_img_tokens, config.img_processor["num_img_tokens"]}
        tokens = (size // patch // 2) ** 2
        require(given == {tokens}, f"num_img_tokens is {given}, but a crop makes {tokens} tokens.")
        pictures = [Image.new("RGB", (64, 48)), Image.new("RGB", (40, 90))]
        encoded = processor(text, pictures)
        found = (encoded["input_ids"] == processor.image_token_id).sum().item()
        expected = sum(processor.calc_num_image_tokens(pictures))
        require(found == expected, f"of {expected} image tokens, {found} are left in the ids.")
        finite = encoded["pixel_values"].isfinite().all()
        require(finite, "pixels are not finite, by its image_mean and image_std.")


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where Python code goes on for longer."""

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
    args: argparse.Namespace, training_args: TrainingArguments, lora: LoraConfig | None = None
) -> Phi3VForCausalLM | PeftModel:
    """
    The model as the flags ask for it: its precision and attention, 4-bit, frozen parts, adapters.

    Weights are float32 where the optimizer updates them directly, and in the low precision where
    DeepSpeed keeps a float32 copy or where they are frozen under adapters.

    Args:
        lora: the adapters of --use_lora, see `add_adapters`.

    Raises:
        RunError: the folder is not a whole checkpoint of this model, or nothing is left to train.
    """
    # Before anything random: the adapters' initialisation has to be the same on every rank and in
    # every run.
    transformers.set_seed(args.seed)
    low_precision = training_args.bf16 or training_args.fp16
    low = torch.bfloat16 if training_args.bf16 else torch.float16
    computed_in = low if low_precision else torch.float32
    mastered = training_args.deepspeed is not None
    quantization = {}
    if args.use_qlora:
        quantization["quantization_config"] = quantization_config(computed_in)
        quantization["device_map"] = {"": training_args.device}
    model = load_weights(
        args.model_name_or_path,
        dtype=computed_in if mastered or args.use_lora else torch.float32,
        computed_in=computed_in,
        revision=args.model_revision,
        attn_implementation=choose_attention(args),
        **quantization,
    )
    if args.use_qlora and training_args.device.type == "cpu":
        # bitsandbytes 0.50: an evaluation repacks the weights for an inference kernel without
        # gradients, and the training after it goes on with that kernel. Can go when Linear4bit
        # leaves that kernel in training.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if args.use_liger:
        use_fused_kernels(model)
    model = freeze_and_adapt(model, args, lora)
    if args.torch_compile:
        compile_layers(model)
    # A shard of ZeRO-3 says in ds_numel how large the whole is.
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if trained == 0:
        raise RunError("no parameter is left to train. Drop one of the flags that freeze.")
    print_first(f"{trained:,} trained parameters")
    return model


def freeze_and_adapt(
    model: Phi3VForCausalLM, args: argparse.Namespace, lora: LoraConfig | None
) -> Phi3VForCausalLM | PeftModel:
    """What is trained of `model`, by the flags."""
    if args.freeze_vision_model:
        # All that sees pixels: CLIP, the projection and the separators. Not the token embedding.
        model.model.vision_embed_tokens.requires_grad_(False)
    return add_adapters(model, lora) if args.use_lora else model


def add_adapters(model: Phi3VForCausalLM, lora: LoraConfig) -> PeftModel:
    """`model` with adapters where `lora` wants them, save in parts that are frozen or never run."""
    vision = model.model.vision_embed_tokens
    # CLIP's last layer is never run, see `Phi3VVisionTower`.
    idle = rf"encoder\.layers\.{len(vision.img_processor.vision_model.encoder.layers) - 1}"
    frozen = not any(parameter.requires_grad for parameter in vision.parameters())
    lora = copy.copy(lora)
    lora.exclude_modules = rf".*\.vision_embed_tokens\..*{'' if frozen else idle}\..*"
    commit = getattr(model.config, "_commit_hash", None)  # a new config has none
    adapted = get_peft_model(model, lora, revision=commit)
    if not lora.use_dora:  # DoRA takes the norm of the weights in the precision of its input
        # PEFT would make float32 of what autocast makes 16 bits of again: the same numbers, at the
        # cost of reading and writing every input of a layer twice.
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
    return adapted


def load_weights(
    name: str,
    dtype: torch.dtype,
    computed_in: torch.dtype | None = None,
    revision: str | None = None,
    **kwargs,
) -> Phi3VForCausalLM:
    """
    The model of a folder or hub id, with weights of `dtype`; of the hub's, its commit is in
    `config._commit_hash`.

    Raises:
        RunError: the checkpoint has other tensors than the model, or values that are not finite in
            the precision that it is computed in, by default `dtype`.
    """
    flag = f"--model_name_or_path {name}"
    folder = model_folder(name, ["*.json", "model*.safetensors"], revision)
    config = _load_config(flag, folder)
    with phase(f"{flag}: generation_config.json"):
        if (folder / "generation_config.json").exists():
            # It is strict on saving alone: too late, when the model is trained.
            GenerationConfig.from_pretrained(folder).validate(strict=True)
    shards = _shards(flag, folder)
    _check_tensors(flag, shards, config)
    if "quantization_config" in kwargs:  # 4 bits hide what is not a number
        _check_values(flag, _read(shards), computed_in or dtype)
    with phase(f"{flag}: its weights"):
        model = Phi3VForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    # Of ZeRO-3, every rank has a shard.
    values = ((name, getattr(p, "ds_tensor", p.detach())) for name, p in model.named_parameters())
    _check_values(flag, values, computed_in or dtype)
    # An adapter names its base model: by the hub id, not by a folder of the cache.
    model.name_or_path = model.config.name_or_path = name
    model.config._commit_hash = folder.name if folder.parent.name == "snapshots" else None
    return model


def _shards(flag: str, folder: Path) -> list[Path]:
    """The files that hold the weights, all of them in `folder`."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    with phase(flag) as require:
        # Others (.bin, .pt) can run code.
        require((folder / INDEX).is_file(), "it holds no weights as .safetensors.")
    # In the hub's cache, a folder's files are links to blobs beside it.
    inside = {folder.resolve(), folder.resolve().parent.parent / "blobs"}
    with phase(f"{flag}: {INDEX}") as require:
        weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            is_inside = path.parent == folder and path.resolve().parent in inside
            require(is_inside, f"it names a file outside the folder: {path}.")
            usable = path.suffix == ".safetensors" and path.is_file()
            require(usable, f"it names {path.name}, and there is no such .safetensors file.")
    return paths


def _check_tensors(flag: str, shards: list[Path], config: Phi3VConfig) -> None:
    """
    Raise RunError unless the shards' headers name the model's tensors, with their shapes.

    `from_pretrained` would fill in what lacks with random numbers, leave out what is too much, and
    take whole numbers for weights. Under ZeRO-3 it does not even report that.
    """
    found = {}
    for path in shards:
        with phase(f"{flag}: {path.name}") as require, safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                header = shard.get_slice(name)
                if not name.endswith("embeddings.position_ids"):
                    require(header.get_dtype() in FLOATS, f"{name} is {header.get_dtype()}.")
                    require(name not in found, f"{name} is in another file as well.")
                    found[name] = list(header.get_shape())
    if EMBEDDING_ALIAS in found:
        found.setdefault(EMBEDDING, found.pop(EMBEDDING_ALIAS))
    with phase(f"{flag}: config.json") as require, torch.device("meta"):
        # Before the model is built, even without memory for its weights: of a billion layers it
        # would take for ever.
        for layers, of in ((LAYERS, config), (CLIP_LAYERS, config.vision_config)):
            held = {name.removeprefix(layers).split(".")[0] for name in found if layers in name}
            said = f"num_hidden_layers is {of.num_hidden_layers}, {layers}* has {len(held)}."
            require(len(held) == of.num_hidden_layers, said)
        model = Phi3VForCausalLM(copy.deepcopy(config))
    needed = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with phase(f"{flag}: its weights") as require:
        for name in sorted(needed.keys() | found.keys()):
            has, needs = found.get(name), needed.get(name)
            require(has is not None, f"{name} is missing. The checkpoint is incomplete.")
            require(needs is not None, f"this model does not have {name}.")
            require(has == needs, f"{name} is of shape {has}, and by config.json of {needs}.")


def _read(shards: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in shards:
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                yield name, shard.get_tensor(name)


def _check_values(
    flag: str, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """Raise RunError at weights that are not finite in `dtype`."""
    largest = torch.finfo(dtype).max
    with phase(f"{flag}: its weights") as require:
        for name, values in weights:
            if values.numel() > 0:
                low, high = (value.item() for value in values.aminmax())  # NaN, where there is one
                finite = -largest <= low and high <= largest
                require(finite, f"{name} holds values from {low} to {high}, beyond {dtype}'s.")


def use_fused_kernels(model: Phi3VForCausalLM) -> None:
    """
    Let the decoder's RMSNorm, SwiGLU and RoPE run as one kernel of liger-kernel each.

    Liger's fused head and loss has no place here: the head runs at the labels alone. RoPE changes
    for all Phi-3 models of this process, because liger (0.8) puts its own in the place of
    `modeling_phi3.apply_rotary_pos_emb`.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_phi3

    apply_liger_kernel_to_phi3(fused_linear_cross_entropy=False, model=model)


def compile_layers(model: Phi3VForCausalLM | PeftModel) -> None:
    """
    Compile the decoder's and CLIP's layers for training, one by one and in place: layers of a kind
    share the compiled code, and tensors keep their names.
    """
    # DDPOptimizer does not split graphs with a higher order op (torch 2.14, `has_higher_order_op`
    # in torch/_dynamo/backends/distributed.py), as gradient checkpointing makes them. Gradients of
    # one layer are sent while the next is computed without it. It can go when it splits those too.
    torch._dynamo.config.optimize_ddp = False
    # By default 8, for all layers together (torch 2.14). More are needed: one row or several,
    # packed or not, input with gradients or without. Past the limit, layers are not compiled.
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
