"""What the recipes share around the Trainer: its arguments, learning rates, saving."""

import argparse
import json
import os
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..distributed import print_first, rank, world_size
from ..errors import RunError, explain_failures
from ..model.processing_phi3_v import Phi3VProcessor
from . import stopping
from .loading import load_weights
from .output_folder import OutputFolder

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

DECIDED_BY_FLAGS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "gradient_clipping"),
)

# Half an hour by default, which the other ranks would wait for one that hangs.
TIMEOUT = timedelta(minutes=10)


def make_training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """
    The recipe's TrainingArguments. Also starts the process group, silences every rank but the
    first, and from here on gives failures a message (see `errors.py`).

    Full finetuning runs under DeepSpeed ZeRO-2, LoRA under plain DDP, unless --deepspeed says
    otherwise.
    """
    explain_failures(args.output_dir)
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
        base = load_weights(args.model_name_or_path, dtype=merged_dtype(args))
        merged = PeftModel.from_pretrained(base, output.path).merge_and_unload()
        processor = Phi3VProcessor.from_pretrained(output.path, trust_remote_code=False)
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
