"""The command line that all recipes share."""

import argparse
import math
import os
import shutil
from collections.abc import Callable

import torch
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from ..distributed import world_size
from ..errors import prints_failures, record_failure

TORCHRUN_NUMBERS = (
    *("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"),
    "TORCHELASTIC_RESTART_COUNT",
)
LARGE = 2**31 - 1  # more than anything is counted to here
# The least and the largest value of numeric flags, those of single recipes included.
RANGES = {
    "num_crops": (1, 16),
    "batch_size": (1, LARGE),
    "batch_size_per_gpu": (1, LARGE),
    "eval_batch_size_per_gpu": (1, LARGE),
    "max_new_tokens": (1, LARGE),
    "save_total_limit": (1, LARGE),
    "max_length": (1, LARGE),
    "pack_length": (1, LARGE),
    "eval_steps": (1, LARGE),
    "save_steps": (1, LARGE),
    "num_eval_rows": (1, LARGE),
    "lora_rank": (1, 65_536),
    "lora_alpha_ratio": (0, 65_536),
    "lora_dropout": (0, 1),
    "dataloader_num_workers": (0, 1024),
    "num_train_epochs": (0, 1_000_000),
    "learning_rate": (0, 1000),
    "vision_learning_rate": (0, 1000),
    "projector_learning_rate": (0, 1000),
    "wd": (0, 1000),
    "seed": (0, 2**32 - 1),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str, num_crops: int = 16) -> argparse.ArgumentParser:
    """A parser with the flags of every recipe; `num_crops` is the recipe's own default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path",
        default="microsoft/Phi-3.5-vision-instruct",
        help="hub id or local folder of the checkpoint to start from",
    )
    group.add_argument(
        "--num_crops",
        type=int,
        default=num_crops,
        help="most HD crops an image is cut into, 1 to 16",
    )
    group.add_argument(
        "--use_flash_attention", action="store_true", help="flash attention 2; implies --bf16"
    )
    group.add_argument(
        "--bf16", action="store_true", help="bf16 instead of the default fp16 mixed precision"
    )
    group.add_argument(
        "--use_liger",
        action="store_true",
        help="fused kernels of liger-kernel for the decoder's RMSNorm, SwiGLU and RoPE",
    )
    group.add_argument(
        "--torch_compile",
        action="store_true",
        help="compile the layers for training; the first steps are slower, while it compiles",
    )

    group = parser.add_argument_group("what is trained (default: everything)")
    group.add_argument(
        "--freeze_vision_model", action="store_true", help="train the language model only"
    )
    group.add_argument("--use_lora", action="store_true", help="train LoRA adapters")
    group.add_argument(
        "--use_qlora", action="store_true", help="LoRA on a 4-bit NF4 model; implies --use_lora"
    )
    group.add_argument("--lora_rank", type=int, default=64, help="rank of the adapters")
    group.add_argument(
        "--lora_alpha_ratio", type=float, default=2, help="LoRA's alpha = rank x ratio"
    )
    group.add_argument(
        "--lora_dropout", type=float, default=0.0, help="dropout before the adapters"
    )

    group.add_argument(
        "--merge_lora",
        action="store_true",
        help="after LoRA, also write the model with the adapters merged into it, to merged/ in the "
        "output folder",
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--output_dir",
        default="./output/",
        help="where the model, the processor, eval_before.json and eval_after.json go",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="effective batch size, over all GPUs and accumulation steps",
    )
    group.add_argument(
        "--batch_size_per_gpu",
        type=int,
        default=1,
        help="micro batch; --batch_size must be divisible by GPUs x this",
    )
    group.add_argument(
        "--max_length",
        type=int,
        help="leave out samples of more tokens, images included, and say how many; none is cut",
    )
    group.add_argument(
        "--pack_length",
        type=int,
        help="let short samples share a row of at most so many tokens, without padding and without "
        "seeing each other; a batch then counts rows",
    )
    group.add_argument(
        "--skip_bad_samples",
        action="store_true",
        help="go on without samples that are wrong or whose images cannot be read, and say which; "
        "without it, the first one ends the run",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute activations again in the backward pass instead of keeping them: saves "
        "memory, costs a second forward pass of each layer",
    )
    group.add_argument("--num_train_epochs", type=float, default=1, help="passes over the data")
    group.add_argument("--learning_rate", type=float, default=4e-5, help="peak learning rate")
    group.add_argument(
        "--vision_learning_rate", type=float, help="of CLIP's layers, where it is to be another"
    )
    group.add_argument(
        "--projector_learning_rate",
        type=float,
        help="of the projection and the separators, where it is to be another",
    )
    group.add_argument("--wd", type=float, default=0.01, help="weight decay")
    group.add_argument("--seed", type=int, default=42, help="seed of data order and adapters")
    group.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="DeepSpeed config, or `none` for plain DDP (default: ZeRO-2, "
        "ds_configs/zero2.json, for full finetuning; none for LoRA)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        help="processes per GPU that prepare batches (default: 4, and 0 on a machine without GPU)",
    )
    group.add_argument(
        "--save_steps",
        type=int,
        help="save a checkpoint every so many steps, from which the run can be resumed (default: "
        "none but at SIGTERM)",
    )
    group.add_argument("--save_total_limit", type=int, default=2, help="newest checkpoints to keep")
    group.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from this checkpoint; without PATH, from the newest complete one in the output "
        "folder, or anew where there is none",
    )
    group.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="replace the results and checkpoints that the output folder holds",
    )
    group.add_argument(
        "--no-tqdm", dest="tqdm", action="store_false", default=True, help="no progress bars"
    )

    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_batch_size_per_gpu", type=int, default=8, help="prompts generated at a time"
    )
    group.add_argument(
        "--eval_only", action="store_true", help="evaluate the model into eval_before.json and stop"
    )
    group.add_argument(
        "--eval_steps", type=int, help="evaluate every so many steps too, into eval_step_<n>.json"
    )
    group.add_argument("--max_new_tokens", type=int, default=64, help="longest generated answer")
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """
    Parse, apply what a flag implies, and check what can be checked before anything is loaded.

    Exits with status 2 and a message that names the flag to change, as argparse does.
    """
    args = parser.parse_args(argv)
    args.use_lora = args.use_lora or args.use_qlora
    args.bf16 = args.bf16 or args.use_flash_attention

    def refuse(message: str) -> None:
        # Every rank finds the same mistake. One says it; torchrun shows it once more, last.
        record_failure(message)
        if prints_failures():
            parser.error(message)
        parser.exit(2)

    check_environment(refuse)
    check_ranges(args, refuse)
    check_output_dir(args, refuse)
    processes = world_size()
    per_step = processes * args.batch_size_per_gpu
    if args.batch_size % per_step:
        refuse(
            f"--batch_size {args.batch_size} must be divisible by {processes} processes x "
            f"--batch_size_per_gpu {args.batch_size_per_gpu} = {per_step}."
        )
    if args.resume_from_checkpoint is not None:
        for flag in ("eval_only", "overwrite_output_dir"):
            if getattr(args, flag):
                refuse(f"--{flag} and --resume_from_checkpoint contradict each other.")
    if args.merge_lora and not args.use_lora:
        refuse("--merge_lora needs --use_lora or --use_qlora: without adapters, nothing is merged.")
    if args.merge_lora and args.eval_only:
        refuse("--merge_lora has nothing to merge under --eval_only. Give one of the two.")
    for flag in ("vision_learning_rate", "projector_learning_rate"):
        if getattr(args, flag) is not None and args.freeze_vision_model:
            refuse(
                f"--{flag} has nothing to train under --freeze_vision_model. Give one of the two."
            )
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and 0 < torch.cuda.device_count() < on_node:
        refuse(
            f"{on_node} processes were started and {torch.cuda.device_count()} GPUs are visible. "
            f"Start torchrun with --nproc_per_node={torch.cuda.device_count()}."
        )
    if args.use_flash_attention and not torch.cuda.is_available():
        refuse("--use_flash_attention needs a GPU, and none is visible. Without it, sdpa is used.")
    if args.use_flash_attention and not is_flash_attn_2_available():
        refuse(
            "--use_flash_attention needs the package flash-attn: pip install flash-attn "
            "--no-build-isolation. Without the flag, sdpa is used."
        )
    if args.use_liger and not torch.cuda.is_available():
        refuse("--use_liger needs a GPU, and none is visible. Leave it away.")
    if args.use_liger and not is_liger_kernel_available():
        refuse("--use_liger needs the package liger-kernel: pip install liger-kernel")
    if args.torch_compile and not _compiler():
        refuse(
            "--torch_compile needs a C++ compiler, and neither $CXX, g++ nor clang++ is found. "
            "Install one (apt-get install g++), or leave the flag away."
        )
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if args.bf16 and capability and capability < (8, 0):
        refuse(
            f"--bf16 needs an Ampere GPU or newer, not {torch.cuda.get_device_name()}. Leave away "
            "--bf16 and --use_flash_attention: fp16 mixed precision is the default."
        )
    if args.use_qlora and capability and capability < (7, 5):
        refuse(
            f"--use_qlora needs a Turing GPU or newer, not {torch.cuda.get_device_name()}. Use "
            "--use_lora."
        )
    return args


def check_environment(refuse: Callable[[str], None]) -> None:
    """Look at what torchrun sets, where somebody else set it."""
    numbers = {}
    for name in TORCHRUN_NUMBERS:
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal()):
            refuse(
                f"the environment variable {name} is {text!r}, not a number. Start with torchrun."
            )
        numbers[name] = int(text) if text is not None else None
    processes, rank = numbers["WORLD_SIZE"], numbers["RANK"] or 0
    on_node, port = numbers["LOCAL_WORLD_SIZE"], numbers["MASTER_PORT"] or 0
    if 0 in (processes, on_node) or rank >= (processes or LARGE) or port > 65_535:
        found = {name: number for name, number in numbers.items() if number is not None}
        refuse(f"the environment has {found}, which cannot be. Start with torchrun.")
    needed = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing and (numbers["LOCAL_RANK"] is not None or (processes or 1) > 1):
        refuse(
            f"the environment is one of several processes, without {missing[0]}. Start with "
            "torchrun."
        )


def check_ranges(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuse numbers that cannot be meant, NaN and infinity among them."""
    for flag, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"--{flag} must be a finite number, not {value}.")
        low, high = RANGES.get(flag, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            wanted = f"{low:g} to {high:g}"
            if high >= LARGE:
                wanted = f"at least {low:g}" if value < low else f"at most {high:,}"
            refuse(f"--{flag} must be {wanted}, not {value}.")
    for flag in ("num_train_epochs", "learning_rate", "lora_alpha_ratio"):
        if getattr(args, flag) == 0:
            refuse(f"--{flag} must be above 0, not {getattr(args, flag)}.")
    if args.lora_dropout == 1:
        refuse("--lora_dropout must be below 1, not 1: the adapters would see nothing.")


def check_output_dir(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuse to write where the model is read from, whatever the path that leads there."""
    try:
        args.output_dir.encode()
    except UnicodeEncodeError:
        refuse(f"--output_dir {args.output_dir!r} is no UTF-8, which libraries cannot write to.")
    if not args.output_dir:
        refuse("--output_dir is empty. Give a folder.")
    folder, output = args.model_name_or_path, os.path.join(os.path.realpath(args.output_dir), "")
    if not os.path.isdir(folder):
        return  # a hub id
    model = os.path.join(os.path.realpath(folder), "")
    # Its files may be links.
    places = [model, *(os.path.realpath(entry.path) for entry in os.scandir(folder))]
    is_its_checkpoint = output.startswith(f"{model}checkpoint-")
    if is_its_checkpoint or any(place.startswith(output) for place in places):
        refuse(
            f"--output_dir {args.output_dir} is where --model_name_or_path {folder} lies, which "
            "would be overwritten. Choose another folder."
        )


def _compiler() -> str | None:
    """The C++ compiler that torch.compile finds."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)
