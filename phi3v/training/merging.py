"""LoRA adapters merged into the model that they belong to."""

import argparse

import torch

from ..distributed import print_first, rank
from ..errors import RunError, first_line
from ..model.processing_phi3_v import Phi3VProcessor
from .loading import load_weights
from .output_folder import OutputFolder

from peft import PeftModel


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
        base = load_weights(
            args.model_name_or_path, dtype=merged_dtype(args), revision=args.model_revision
        )
        merged = PeftModel.from_pretrained(base, output.path).merge_and_unload()
        processor = Phi3VProcessor.from_pretrained(output.path, trust_remote_code=False)
        with output.finished_files("merged") as folder:
            merged.save_pretrained(folder)
            processor.save_pretrained(folder)
    except Exception as error:  # the disk, the memory, the hub
        raise RunError(
            f"--merge_lora: {first_line(error)}. The adapter is saved in {output.path}; when that "
            "is solved, the same command with --resume_from_checkpoint merges it."
        ) from error
    print_first("Merged the adapter into the model, as merged/ in the output folder")


def merged_dtype(args: argparse.Namespace) -> torch.dtype:
    """The precision of the merged model: that of training."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if torch.cuda.is_available() else torch.float32
