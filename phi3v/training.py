"""What the recipes share around the Trainer: its arguments, the model and its adapters, saving."""

import argparse
import json
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FunctionType, MethodType

import datasets
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3DecoderLayer,
    Phi3MLP,
    Phi3RMSNorm,
)

from . import stopping
from .distributed import print_first, rank, world_size
from .failures import RunError, explain_failures
from .modeling_phi3_v import Phi3VForCausalLM
from .output_folder import OutputFolder
from .processing_phi3_v import Phi3VProcessor

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"

DECIDED_BY_FLAGS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "gradient_clipping"),
)

# Half an hour by default, which the other ranks would wait for one that hangs.
TIMEOUT = timedelta(minutes=10)

LANGUAGE_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
VISION_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PROJECTION_TARGETS = ["img_projection.0", "img_projection.2"]


def make_training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """
    The recipe's TrainingArguments. Also starts the process group, silences every rank but the
    first, and from here on gives failures a message (see `failures.py`).

    Full finetuning runs under DeepSpeed ZeRO-2, LoRA under plain DDP, unless --deepspeed says
    otherwise.
    """
    explain_failures()
    on_gpu = torch.cuda.is_available()
    deepspeed = deepspeed_path(args)
    if deepspeed:
        _check_deepspeed(args, deepspeed)
    _meet_again(on_gpu)
    if deepspeed:
        _prepare_deepspeed(on_gpu)
    first = rank() == 0
    _filter_warnings(first)
    workers = args.dataloader_num_workers
    if workers is None:
        workers = 4 if on_gpu else 0
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=args.batch_size // (world_size() * args.batch_size_per_gpu),
        num_train_epochs=args.num_train_epochs,
        learning_rate=args.learning_rate,
        optim="adamw_torch_fused",
        lr_scheduler_type="linear",
        warmup_steps=50,
        weight_decay=args.wd,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        max_grad_norm=1.0,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=args.bf16,
        # Without a GPU there is no fp16: the Trainer would run float32 under that name.
        fp16=on_gpu and not args.bf16,
        use_cpu=not on_gpu,
        deepspeed=str(deepspeed) if deepspeed else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=workers,
        logging_steps=10,
        # LossWatch ends the run at such a loss. In fp16 its step is skipped, so it is not logged.
        logging_nan_inf_filter=on_gpu and not args.bf16,
        save_strategy="no" if args.save_steps is None else "steps",
        save_steps=args.save_steps or 500,
        ddp_timeout=TIMEOUT.seconds,
        report_to="none",
        # Records reach the collator as they are.
        remove_unused_columns=False,
        label_names=["labels"],
        # Without a bar, the Trainer prints on every machine; with one, on the first rank alone.
        disable_tqdm=not args.tqdm and first,
        seed=args.seed,
        log_level="warning",
        log_level_replica="error",
    )
    if not (args.tqdm and first):
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if not first:
        transformers.logging.set_verbosity_error()
    print_first(
        f"{training_args.world_size} x {training_args.device.type}, {_precision(args, on_gpu)}, "
        f"{'flash attention 2' if args.use_flash_attention else 'sdpa attention'}, "
        f"{'liger kernels, ' if args.use_liger else ''}"
        f"{'compiled layers, ' if args.torch_compile else ''}"
        f"{'DeepSpeed ' + deepspeed.stem if deepspeed else 'DDP'}, batches of "
        f"{args.batch_size} = {training_args.world_size} x {args.batch_size_per_gpu} x "
        f"{training_args.gradient_accumulation_steps} accumulation steps"
    )
    return training_args


def deepspeed_path(args: argparse.Namespace) -> Path | None:
    """The DeepSpeed config that a run takes; None for plain DDP."""
    if args.deepspeed is None:
        return None if args.use_lora else DS_CONFIGS / "zero2.json"
    return None if args.deepspeed == "none" else Path(args.deepspeed)


def _check_deepspeed(args: argparse.Namespace, path: Path) -> None:
    """Stop where there is no such config, or where the flags do not go with it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    flag = f"--deepspeed {path}"
    try:
        config = json.loads(path.read_text())
        zero = config.get("zero_optimization", {})
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
        precisions = {name: config.get(name, {}).get("enabled") for name in ("fp16", "bf16")}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"{flag}: {' '.join(str(error).split())}. Give a DeepSpeed config, or `none`."
        ) from None
    numbers = {name: config.get(name) for name in DECIDED_BY_FLAGS}
    for name, value in (numbers | precisions).items():
        if value not in (None, "auto", False):
            raise RunError(f'{flag}: {name} is decided by the recipe\'s flags. Write "auto" there.')
    if zero.get("stage") == 3:
        remedy = "Leave --deepspeed away: DDP is enough for adapters."
        if args.use_qlora:
            raise RunError(f"--use_qlora: ZeRO-3 cannot shard 4-bit weights. {remedy}")
        if args.merge_lora:
            raise RunError(f"--merge_lora: ZeRO-3 has no rank with whole weights. {remedy}")
        if args.torch_compile:
            raise RunError(
                "--torch_compile: ZeRO-3 puts weights together in the middle of a layer, which "
                "cannot be compiled. Leave one of the two away."
            )


def _meet_again(on_gpu: bool) -> None:
    """
    Start the process group where torchrun has restarted the ranks (--max_restarts).

    torchrun keeps the store through which ranks meet, and in torch 2.14 they would find there the
    addresses of the ranks before them, and wait for those.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt == 0 or dist.is_initialized():
        return
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )


def _prepare_deepspeed(on_gpu: bool) -> None:
    import deepspeed.ops
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed would load its checkpoints as pickles that may run code. These are all that it
    # stores besides tensors.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
    if not on_gpu:
        # DeepSpeed's shared-memory collectives serve inference on CPUs. Training never uses them,
        # and compiling them takes two minutes at the first collective.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        # Started without torchrun: one process, which DeepSpeed would ask MPI about. With port 0
        # the system chooses, so that runs which start together never take the same.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    if not on_gpu:
        # ZeRO-3 shards the model while it is loaded, which is before the Trainer would do this.
        deepspeed.init_distributed(dist_backend="gloo")


def _filter_warnings(first: bool) -> None:
    """Keep quiet what a user can't act on: names that libraries are about to change."""
    if not first:
        warnings.simplefilter("ignore")
    for message in (r".*gradient_checkpointing", r"`torch\.distributed\."):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


def _precision(args: argparse.Namespace, on_gpu: bool) -> str:
    if args.bf16:
        return "bf16"
    return "fp16 mixed precision" if on_gpu else "float32 (no GPU, so no fp16)"


def load_processor(args: argparse.Namespace) -> Phi3VProcessor:
    """
    The processor of --model_name_or_path, with --num_crops.

    Raises:
        RunError: there is none, or the folder is not one of this model.
    """
    name = args.model_name_or_path
    _check_model_folder(Path(name))
    try:
        return AutoProcessor.from_pretrained(name, num_crops=args.num_crops)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"--model_name_or_path {name} has no processor that loads: {error}"
        ) from error


def _check_model_folder(folder: Path) -> None:
    """Raise RunError where a local folder is something else than a checkpoint of this model."""
    if not folder.is_dir():
        return  # a hub id
    flag = f"--model_name_or_path {folder}"
    if not (folder / "config.json").is_file():
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            raise RunError(
                f"{flag} holds an adapter, not a model. Give the folder that --merge_lora wrote."
            )
        raise RunError(f"{flag} holds no config.json: it is not a model's folder.")
    try:
        model_type = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise RunError(f"{flag}: config.json is broken: {error}") from None
    if model_type != "phi3_v":
        raise RunError(f"{flag} is a model of type {model_type!r}, not Phi-3.5-vision's 'phi3_v'.")
    if not any(folder.glob("*.safetensors")):
        raise RunError(
            f"{flag} holds no weights as .safetensors. Others (.bin, .pt) are not loaded, because "
            "they can run code."
        )


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
    # DeepSpeed's fp16 engine casts the model itself, and keeps what float32 weights hold beyond
    # fp16's range.
    mastered = training_args.deepspeed is not None and training_args.bf16
    quantization = {}
    if args.use_qlora:
        compute_dtype = low if low_precision else torch.float32
        quantization["quantization_config"] = quantization_config(compute_dtype)
        quantization["device_map"] = {"": training_args.device}
    model = _load_weights(
        args.model_name_or_path,
        dtype=low if low_precision and (mastered or args.use_lora) else torch.float32,
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


def _load_weights(name: str, **kwargs) -> Phi3VForCausalLM:
    """`from_pretrained`, which would fill in what a checkpoint lacks with random numbers."""
    flag = f"--model_name_or_path {name}"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{flag} does not load: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise RunError(
            f"{flag} lacks {len(missing)} of the model's tensors, {missing[0]} among them. "
            "The checkpoint is incomplete."
        )
    return model


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
    original = Phi3Attention.forward
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
    last = model.config.get_vision_config().num_hidden_layers - 1
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


def set_learning_rates(trainer: Trainer, args: argparse.Namespace) -> None:
    """
    Give the vision tower and the projector the learning rates of their flags.

    The optimizer is the one that the Trainer would make, with more parameter groups.
    """
    rates = {
        ".img_processor.": args.vision_learning_rate,
        ".vision_embed_tokens.": args.projector_learning_rate,
    }
    if all(rate is None for rate in rates.values()):
        return
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            own_rate = next((rate for part, rate in rates.items() if part in name), None)
            rate = args.learning_rate if own_rate is None else own_rate
            decay = args.wd if name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.optimizer = optimizer_class(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        **settings,
    )


def save_model(trainer: Trainer, processor: Phi3VProcessor, args: argparse.Namespace) -> None:
    """
    Write the trained model (of LoRA: the adapter) and the processor to the output folder.

    Files get their names when they are whole.
    """
    first = trainer.is_world_process_zero()
    # Ranks have to save together: each may have a part of the weights.
    with OutputFolder(args.output_dir).finished_files() if first else nullcontext() as folder:
        _save_weights(trainer, folder)
        if first:
            processor.save_pretrained(folder)
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
    print_first(f"Saved the {'adapter' if args.use_lora else 'model'} to {args.output_dir}")
    trainer.accelerator.wait_for_everyone()


def _save_weights(trainer: Trainer, folder: Path | None) -> None:
    """`folder` is None on all ranks but the first, which help to put the weights together."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        state_dict = None
        if is_deepspeed_zero3_enabled():
            # Every rank has a part of every adapter.
            state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if folder is not None:
            # lm_head has an adapter, which makes PEFT save the whole of it as well unless told
            # otherwise.
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    else:
        # The Trainer turns the cache off for training; a saved model generates.
        model.config.use_cache = True
        trainer.save_model(None if folder is None else str(folder))


def finish_run(args: argparse.Namespace) -> None:
    """After the last evaluation: the run counts as finished. --merge_lora is done then."""
    if rank() == 0:
        OutputFolder(args.output_dir).update(finished=True)
    if args.merge_lora:
        merge_adapter(args)
    stopping.end()


def merge_adapter(args: argparse.Namespace) -> None:
    """
    On the first rank, merge the output folder's adapter into a fresh base model, never into a 4-bit
    one, as merged/ in that folder. The adapter stays as it is.

    Raises:
        RunError: it cannot be done; the message says why.
    """
    output = OutputFolder(args.output_dir)
    if rank() != 0 or (output.path / "merged" / "config.json").exists():
        return
    try:
        base = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=merged_dtype(args), trust_remote_code=False
        )
        merged = PeftModel.from_pretrained(base, output.path).merge_and_unload()
        processor = AutoProcessor.from_pretrained(output.path, trust_remote_code=False)
        with output.finished_files("merged") as folder:
            merged.save_pretrained(folder)
            processor.save_pretrained(folder)
    except Exception as error:  # the disk, the memory, the hub
        raise RunError(
            f"--merge_lora: {error or type(error).__name__}. The adapter is saved in "
            f"{output.path}; when that is solved, the same command with --resume_from_checkpoint "
            "merges it."
        ) from error
    print_first("Merged the adapter into the model, as merged/ in the output folder")


def merged_dtype(args: argparse.Namespace) -> torch.dtype:
    """The precision of the merged model: that of training."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if torch.cuda.is_available() else torch.float32
