"""The command line that all recipes share."""

import argparse
import difflib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_liger_kernel_available

from ..data.mixing import parse_datasets
from ..distributed import world_size
from ..errors import DataError, prints_failures, record_failure
from .hardware import gpu_problems, idle_gpus

# Fields of TrainingArguments that a flag of the recipe decides, which each has another name.
DECIDED_BY = {
    "per_device_train_batch_size": "--batch_size_per_gpu",
    "gradient_accumulation_steps": "--batch_size",
    "per_device_eval_batch_size": "--eval_batch_size_per_gpu",
    "auto_find_batch_size": "--batch_size_per_gpu",
    "weight_decay": "--wd",
    "disable_tqdm": "--no-tqdm",
    "fp16": "the absence of --bf16",
    "use_cpu": "whether there is a GPU",
    "remove_unused_columns": "the recipe's collator",
    "label_names": "the recipe's collator",
    "label_smoothing_factor": "the head, which runs where there are labels alone",
    "use_liger_kernel": "--use_liger",
    "fsdp": "--deepspeed",
    "hub_token": "$HF_TOKEN, or `hf auth login`",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf, open: bool = False) -> Callable:
    """
    An argument's type: an int or float from `low` to `high`, without `low` itself where `open`.
    """

    def parse(text: str) -> int | float:
        value = kind(text)
        outside = value < low or (value == low and open) or value > high
        if outside or not math.isfinite(value):
            wanted = f"above {low:g}" if open else f"at least {low:g}"
            wanted += f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse


COUNT = number(int, 1, 2**31 - 1)
RATE = number(float, 0)


class Datasets(argparse.Action):
    """
    Names of one or several datasets, with `weights` each as NAME:WEIGHT if wanted; see `mix`. Given
    more than once, the flag adds to what it had.
    """

    def __init__(self, *args, weights: bool = True, **kwargs):
        metavar = "NAME[:WEIGHT]" if weights else "NAME"
        super().__init__(*args, nargs="+", metavar=metavar, **kwargs)
        self.weights = weights

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        values = values if before is self.default else [*before, *values]
        try:
            _, weights = parse_datasets(values)
        except DataError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if weights and not self.weights:
            raise argparse.ArgumentError(self, "takes no weights: every sample counts once.")
        setattr(namespace, self.dest, values)


class RecipeParser(argparse.ArgumentParser):
    """
    A parser with the flags of every recipe. A recipe adds its own; action="datasets" makes one that
    takes several datasets.

    Any other argument of transformers' TrainingArguments is a flag too, see `trainer_arguments`.

    Args:
        description: the script's docstring.
        num_crops: the recipe's default of `--num_crops`.
    """

    def __init__(self, description: str, num_crops: int = 16):
        # Abbreviated, a flag of ours would hide one of TrainingArguments.
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.register("action", "datasets", Datasets)
        _add_flags(self, num_crops)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """
        Parse, apply what a flag implies, and check what can be checked before anything is loaded.

        Exits with status 2 and a message that names the flag to change, as argparse does.

        Returns:
            The flags, and as `others` the fields of TrainingArguments that were given besides.
        """
        found, rest = self.parse_known_args(args, namespace)
        others = self._transformers_parser()
        others.error = self.error
        passed, unknown = others.parse_known_args(rest)
        if unknown:
            self.error(self._what_is_unknown(unknown[0], others))
        found.others = vars(passed)
        for name in found.others:
            if name in DECIDED_BY:
                self.error(f"--{name} is decided by {DECIDED_BY[name]}.")
            if hasattr(found, name):
                self.error(f"--{name.replace('_', '-')} is written --{name} here.")
        kinds = (found.use_lora, found.use_qlora, found.use_dora, found.use_rslora)
        found.use_lora = any(kinds)
        found.bf16 = found.bf16 or found.use_flash_attention
        try:
            problem = next(_problems(found), None)
        except ValueError as error:  # of WORLD_SIZE and its like
            problem = f"the environment is not what torchrun sets: {error}"
        if problem:
            self.error(problem)
        return found

    def _transformers_parser(self) -> argparse.ArgumentParser:
        """Reads fields of TrainingArguments; those that are not given are not in the result."""
        parser = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False)
        for action in parser._actions:
            action.default = argparse.SUPPRESS
            if action.dest in DECIDED_BY or f"--{action.dest}" in self._option_string_actions:
                action.help = argparse.SUPPRESS
        return parser

    def _what_is_unknown(self, word: str, others: argparse.ArgumentParser) -> str:
        flag = word.partition("=")[0]
        known = [*self._option_string_actions, *others._option_string_actions]
        close = difflib.get_close_matches(flag, known, n=1)
        return f"unrecognized argument: {word}" + (f". Did you mean {close[0]}?" if close else "")

    def error(self, message: str):
        # Every rank finds the same mistake. One says it; torchrun shows it once more, last.
        record_failure(message)
        self.exit(2, f"{self.prog}: error: {message}\n" if prints_failures() else None)

    def format_help(self) -> str:
        others = self._transformers_parser()
        others.usage = argparse.SUPPRESS
        title = "Any other argument of transformers' TrainingArguments works as well:"
        return f"{super().format_help()}\n{title}\n{others.format_help()}"


def _add_flags(parser: argparse.ArgumentParser, num_crops: int) -> None:
    group = parser.add_argument_group("what matters first")
    group.add_argument(
        "--model_name_or_path",
        default="microsoft/Phi-3.5-vision-instruct",
        help="hub id or local folder of the checkpoint to start from",
    )
    group.add_argument(
        "--output_dir",
        default="./output/",
        help="where the model, the processor, eval_before.json and eval_after.json go",
    )
    group.add_argument(
        "--batch_size",
        type=COUNT,
        default=16,
        help="effective batch size, over all GPUs and accumulation steps",
    )
    group.add_argument(
        "--batch_size_per_gpu",
        type=COUNT,
        default=1,
        help="micro batch; --batch_size must be divisible by GPUs x this",
    )
    group.add_argument(
        "--num_train_epochs",
        type=number(float, 0, 1_000_000, open=True),
        default=1,
        help="passes over the data",
    )
    group.add_argument(
        "--learning_rate",
        type=number(float, 0, open=True),
        default=4e-5,
        help="peak learning rate",
    )
    group.add_argument(
        "--bf16", action="store_true", help="bf16 instead of the default fp16 mixed precision"
    )
    group.add_argument(
        "--use_flash_attention",
        action="store_true",
        help="flash attention 2, for packed rows and padded prompts too: of the package flash-attn "
        "where it is installed and works, else PyTorch's own; implies --bf16",
    )
    group.add_argument("--use_lora", action="store_true", help="train LoRA adapters")
    group.add_argument(
        "--use_qlora", action="store_true", help="LoRA on a 4-bit NF4 model; implies --use_lora"
    )
    group.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="GPUS",
        help="print what the run will be, its memory, hours and disk space, and leave: on the GPUs "
        'that are there, or on those named, like "8 x A100-80GB"',
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_revision", help="of a hub id: the branch, tag or commit (default: newest)"
    )
    group.add_argument(
        "--num_crops",
        type=number(int, 1, 16),
        default=num_crops,
        help="most HD crops an image is cut into, 1 to 16",
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
    group.add_argument(
        "--lora_rank", type=number(int, 1, 65_536), default=64, help="rank of the adapters"
    )
    group.add_argument(
        "--lora_alpha_ratio",
        type=number(float, 0, 65_536, open=True),
        default=2,
        help="LoRA's alpha = rank x ratio",
    )
    group.add_argument(
        "--lora_dropout",
        type=number(float, 0, 0.999),
        default=0.0,
        help="dropout before the adapters",
    )
    group.add_argument(
        "--use_dora",
        action="store_true",
        help="DoRA: adapters with a magnitude of their own for each output; slower; implies "
        "--use_lora",
    )
    group.add_argument(
        "--use_rslora",
        action="store_true",
        help="rsLoRA: scale adapters by alpha / sqrt(rank) and not by alpha / rank; implies "
        "--use_lora",
    )
    group.add_argument(
        "--merge_lora",
        action="store_true",
        help="after LoRA, also write the model with the adapters merged into it, to merged/ in the "
        "output folder",
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--max_length",
        type=COUNT,
        help="omit samples of more tokens, images included, and say how many; none is cut",
    )
    group.add_argument(
        "--pack_length",
        type=COUNT,
        help="let short samples share a row of at most so many tokens, without padding and without "
        "seeing each other; a batch then counts rows",
    )
    group.add_argument(
        "--streaming",
        action="store_true",
        help="read training data that python -m phi3v.shards wrote in sequence, and of a hub id "
        "what is read alone; samples that lie together are then shuffled among themselves",
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
    group.add_argument(
        "--vision_learning_rate", type=RATE, help="of CLIP's layers, if it should differ"
    )
    group.add_argument(
        "--projector_learning_rate",
        type=RATE,
        help="of the projection and the separators, if it should differ",
    )
    group.add_argument("--wd", type=RATE, default=0.01, help="weight decay")
    group.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of data order and adapters"
    )
    group.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="DeepSpeed config, or `none` for plain DDP (default: ZeRO-2, "
        "ds_configs/zero2.json, for full finetuning; none for LoRA)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=number(int, 0, 1024),
        help="processes per GPU that prepare batches (default: 4, and 0 on a machine without GPU)",
    )
    group.add_argument(
        "--save_steps",
        type=COUNT,
        help="save a checkpoint every so many steps, from which the run can be resumed (default: "
        "only at SIGTERM)",
    )
    group.add_argument(
        "--save_total_limit", type=COUNT, default=2, help="newest checkpoints to keep"
    )
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
        "--eval_batch_size_per_gpu",
        type=COUNT,
        default=8,
        help="most prompts generated at a time; fewer where the longest do not fit the GPU",
    )
    group.add_argument(
        "--eval_only", action="store_true", help="evaluate the model into eval_before.json and stop"
    )
    group.add_argument(
        "--eval_steps", type=COUNT, help="evaluate every so many steps too, into eval_step_<n>.json"
    )
    group.add_argument(
        "--eval_samples",
        type=COUNT,
        help="evaluate between steps on so many samples, evenly spaced; before and after training "
        "on all",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=COUNT,
        help="end training after so many evaluations in a row that are not better than the best; "
        "with --eval_steps, --load_best_model_at_end and --metric_for_best_model",
    )
    group.add_argument("--max_new_tokens", type=COUNT, default=64, help="longest generated answer")


def _problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags together, or with this machine."""
    processes = world_size()
    per_step = processes * args.batch_size_per_gpu
    if args.batch_size % per_step:
        yield (
            f"--batch_size {args.batch_size} must be divisible by {processes} processes x "
            f"--batch_size_per_gpu {args.batch_size_per_gpu} = {per_step}."
        )
    if args.streaming and (args.max_length or args.pack_length):
        yield "--streaming: --max_length and --pack_length would read all samples to count tokens."
    if args.streaming and "train_sampling_strategy" in args.others:
        yield "--streaming: --train_sampling_strategy is that of the shards."
    anew = args.eval_only or args.overwrite_output_dir
    if anew and args.resume_from_checkpoint is not None:
        yield "--resume_from_checkpoint contradicts --eval_only and --overwrite_output_dir."
    if args.merge_lora and (args.eval_only or not args.use_lora):
        yield "--merge_lora needs --use_lora or --use_qlora, and a training."
    keeps_best = args.others.get("load_best_model_at_end")
    if args.early_stopping_patience and not (keeps_best and args.eval_steps):
        yield "--early_stopping_patience needs --eval_steps and --load_best_model_at_end."
    if keeps_best and "metric_for_best_model" not in args.others:
        yield "--load_best_model_at_end needs --metric_for_best_model, one that is evaluated."
    pushes, when = args.others.get("push_to_hub"), args.others.get("hub_strategy", "end")
    if pushes and (args.eval_only or when != "end"):
        yield "--push_to_hub needs a training, at whose end it pushes: --hub_strategy can be end."
    if args.freeze_vision_model and (
        args.vision_learning_rate is not None or args.projector_learning_rate is not None
    ):
        yield (
            "--vision_learning_rate and --projector_learning_rate have nothing to train under "
            "--freeze_vision_model."
        )
    if args.plan is None:  # which may be of other GPUs, and without torchrun
        yield from gpu_problems(args)
        yield from idle_gpus()
    if args.use_liger and not is_liger_kernel_available():
        yield "--use_liger needs the package liger-kernel: pip install liger-kernel"
    if args.torch_compile and not _compiler():
        yield (
            "--torch_compile needs a C++ compiler, and neither $CXX, g++ nor clang++ is found. "
            "Install one (apt-get install g++), or drop the flag."
        )
    if problem := _output_problem(args.output_dir, args.model_name_or_path):
        yield problem


def _output_problem(output_dir: str, model: str) -> str | None:
    """Why nothing can be written there. The model may lie there, whatever path leads to it."""
    if not output_dir or not output_dir.isprintable():
        return f"--output_dir {output_dir!r} is no name for a folder."
    if not os.path.isdir(model):
        return None  # a hub id
    output, folder = (os.path.join(os.path.realpath(path), "") for path in (output_dir, model))
    # Its files may be links.
    places = [folder, *(os.path.realpath(entry.path) for entry in os.scandir(model))]
    is_its_checkpoint = output.startswith(f"{folder}checkpoint-")
    if is_its_checkpoint or any(place.startswith(output) for place in places):
        return (
            f"--output_dir {output_dir} is where --model_name_or_path {model} lies, which would be "
            "overwritten. Choose another folder."
        )
    return None


def _compiler() -> str | None:
    """The C++ compiler that torch.compile finds."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)
