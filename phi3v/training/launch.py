"""From the flags to TrainingArguments: the process group, DeepSpeed, and who prints what."""

import argparse
import json
import os
import warnings
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from transformers import TrainingArguments

from ..distributed import print_first, rank, world_size
from ..errors import RunError, explain_failures, phase
from .attention import SHOWN, choose_attention
from .card import create_repository
from .checkpoints import find_checkpoint

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# Half an hour by default, which the other ranks would wait for one that hangs.
TIMEOUT = timedelta(minutes=10)


def trainer_arguments(args: argparse.Namespace, **recipe: object) -> TrainingArguments:
    """
    TrainingArguments from the recipe's own settings and the flags, where flags win.

    This begins the run: ranks meet, all but the first fall silent, failures get a message (see
    `errors.py`), and the output folder is looked at. Full finetuning runs under DeepSpeed ZeRO-2,
    LoRA under DDP, unless --deepspeed says otherwise.

    Args:
        recipe: fields of TrainingArguments, such as `optim`.

    Returns:
        The arguments. `resume_from_checkpoint` is the checkpoint to go on from, or None. With
        --plan, the output folder and the hub are left alone.

    Raises:
        RunError: the settings, the DeepSpeed config or the output folder cannot be used.
    """
    explain_failures(args.output_dir)
    on_gpu, first = torch.cuda.is_available(), rank() == 0
    deepspeed = deepspeed_path(args)
    if deepspeed:
        _check_deepspeed(args, deepspeed)
    if args.plan is not None:
        deepspeed = None  # a plan only reads its config
    with phase("starting the processes"):
        init_after_restart(on_gpu)
        if deepspeed:
            _prepare_deepspeed(on_gpu)
    quieten(first, args.tqdm and first)
    # Where it can, sdpa prefers cuDNN (torch 2.14, on Hopper and Blackwell), which builds a plan
    # for every new length: of each batch, and of each token of an answer. Without it, sdpa's flash
    # kernel is next.
    torch.backends.cuda.enable_cudnn_sdp(False)
    workers = args.dataloader_num_workers
    from_flags = {
        "output_dir": args.output_dir,
        "per_device_train_batch_size": args.batch_size_per_gpu,
        "gradient_accumulation_steps": args.batch_size // (world_size() * args.batch_size_per_gpu),
        "per_device_eval_batch_size": args.eval_batch_size_per_gpu,
        "num_train_epochs": args.num_train_epochs,
        "learning_rate": args.learning_rate,
        "weight_decay": args.wd,
        "seed": args.seed,
        "gradient_checkpointing": args.gradient_checkpointing,
        # Reentrant, LoRA's gradients are lost under DDP (torch 2.14: "Expected to mark a variable
        # ready only once"). It can go when use_reentrant=False is transformers' default.
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": args.bf16,
        # Without a GPU there is no fp16: the Trainer would run float32 under that name.
        "fp16": on_gpu and not args.bf16,
        "use_cpu": not on_gpu,
        "deepspeed": str(deepspeed) if deepspeed else None,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": int(TIMEOUT.total_seconds()),
        # Out of pinned memory, while the device computes.
        "accelerator_config": {"non_blocking": on_gpu},
        "dataloader_num_workers": (4 if on_gpu else 0) if workers is None else workers,
        "eval_strategy": "steps" if args.eval_steps else "no",
        "eval_steps": args.eval_steps,
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or 500,
        # So that early stopping goes on counting.
        "restore_callback_states_from_checkpoint": args.early_stopping_patience is not None,
        "hub_strategy": "end",
        # A loss that is not finite ends the run. In fp16 its step is skipped, so it is not logged.
        "logging_nan_inf_filter": on_gpu and not args.bf16,
        # Records reach the collator as they are.
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": not args.tqdm,
        "log_level": "warning",
        "log_level_replica": "error",
    }
    with phase("the training arguments"):
        training_args = TrainingArguments(**(recipe | from_flags | args.others))
    if args.plan is not None:
        return training_args
    print_first(
        f"{training_args.world_size} x {training_args.device.type}, {_precision(args, on_gpu)}, "
        f"{SHOWN[choose_attention(args)]}, "
        f"{'liger kernels, ' if args.use_liger else ''}"
        f"{'compiled layers, ' if args.torch_compile else ''}"
        f"{'DeepSpeed ' + deepspeed.stem if deepspeed else 'DDP'}, batches of "
        f"{args.batch_size} = {training_args.world_size} x {args.batch_size_per_gpu} x "
        f"{training_args.gradient_accumulation_steps} accumulation steps"
    )
    if training_args.push_to_hub:
        create_repository(training_args)
    training_args.resume_from_checkpoint = find_checkpoint(args, training_args)
    return training_args


def deepspeed_path(args: argparse.Namespace) -> Path | None:
    """The DeepSpeed config that a run takes; None for plain DDP."""
    if args.deepspeed is None:
        return None if args.use_lora else DS_CONFIGS / "zero2.json"
    return None if args.deepspeed == "none" else Path(args.deepspeed)


def _check_deepspeed(args: argparse.Namespace, path: Path) -> None:
    """Stop where there is no such config, or where the flags do not go with it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with phase(f"--deepspeed {path}"):
        config = json.loads(path.read_text("utf-8"))
        zero = config.get("zero_optimization", {})
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
        decided = {name: config.get(name, {}).get("enabled") for name in ("fp16", "bf16")}
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        decided[name] = config.get(name)
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        decided[name] = config.get(name)
    for name, value in decided.items():
        if value not in (None, "auto", False):
            raise RunError(
                f'--deepspeed {path}: {name} is decided by the flags. Write "auto" there.'
            )
    if zero.get("stage") == 3:
        for flag, why in {
            "use_qlora": "ZeRO-3 cannot shard 4-bit weights. DDP, the default, is enough.",
            "merge_lora": "under ZeRO-3 no rank has whole weights. DDP, the default, is enough.",
            "torch_compile": "ZeRO-3 gathers weights inside a layer, which cannot be compiled.",
        }.items():
            if getattr(args, flag):
                raise RunError(f"--{flag} with --deepspeed {path}: {why}")


def init_after_restart(on_gpu: bool) -> None:
    """
    Start the process group where torchrun has restarted the ranks (--max_restarts).

    torchrun keeps the store in which ranks meet, and restarted ranks find the addresses of the ones
    before them there, and wait for those until the timeout (torch 2.14, c10d's env:// rendezvous).
    The number of the restart keeps them apart on one machine. Several machines count for
    themselves, so one that comes back has another number: there, every restart needs a new store.
    It can go when torch puts the number of the rendezvous into the store's prefix itself.

    Raises:
        RunError: several machines would restart their ranks, and keep the store.
    """
    counts = ("RESTART_COUNT", "MAX_RESTARTS")
    attempt, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in counts)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if most and os.environ["GROUP_WORLD_SIZE"] != "1":
        raise RunError(
            "--max_restarts on several machines: restarted ranks would wait for the ones before "
            "them. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and start torchrun with "
            "--rdzv_backend=c10d, see examples/slurm.sbatch; or leave --max_restarts out."
        )
    if attempt == 0 or dist.is_initialized():
        return
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own_rank, ranks = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=own_rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )


def _prepare_deepspeed(on_gpu: bool) -> None:
    import deepspeed.ops
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed 0.19 would load its checkpoints as pickles that may run code. These classes are all
    # that it stores besides tensors. It can go when DeepSpeed loads with weights_only.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
    if "RANK" not in os.environ:
        # Started without torchrun: one process, which DeepSpeed would ask MPI about. With port 0
        # the system chooses, so that runs which start together never take the same.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    if not on_gpu:
        # DeepSpeed 0.19 compiles shared-memory collectives for two minutes when the first CPU group
        # starts ("Loading extension module deepspeed_shm_comm"); they serve inference alone.
        # There is no switch for it. It can go when they are compiled at their first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ZeRO-3 shards the model while it is loaded, which is before the Trainer would do this.
        deepspeed.init_distributed(dist_backend="gloo")


def quieten(first: bool, bars: bool) -> None:
    """Other ranks say nothing, and nobody what a user can't act on."""
    if not bars:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if not first:
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    # transformers 5.23 warns of the name gradient_checkpointing, which all versions know, and torch
    # 2.14 of what DeepSpeed calls. They can go with the versions that do not.
    for message in (r".*gradient_checkpointing", r"`torch\.distributed\."):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


def _precision(args: argparse.Namespace, on_gpu: bool) -> str:
    if args.bf16:
        return "bf16"
    return "fp16 mixed precision" if on_gpu else "float32 (no GPU, so no fp16)"
