"""Whether the GPUs of this machine can do what the flags ask for."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator

import torch

from ..errors import one_line

CU126 = "--index-url https://download.pytorch.org/whl/cu126"


def gpu_problems(args: argparse.Namespace) -> Iterator[str]:
    """What the GPUs of this machine cannot do."""
    count, started = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        if not torch.cuda.is_available():
            torch.cuda.init()  # says why
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    except Exception as error:  # a RuntimeError of the driver; an AssertionError of a CPU's torch
        if count:  # the driver's library sees them, and CUDA does not
            yield (
                f"{count} GPUs are visible, and torch {torch.__version__} cannot use them: "
                f"{one_line(error)}. Update NVIDIA's driver, or install a torch for the CUDA "
                "version that it has (nvidia-smi shows it), such as: pip install torch "
                f"torchvision {CU126}. To run on the CPU, set CUDA_VISIBLE_DEVICES to nothing."
            )
        for flag in ("use_flash_attention", "use_liger"):
            if getattr(args, flag):
                yield f"--{flag} needs a GPU, and none is visible. Drop the flag."
        return
    if 0 < count < started:
        yield (
            f"{started} processes were started and {count} GPUs are visible. Start torchrun with "
            f"--nproc_per_node={count}."
        )
    if count > 1 and "RANK" not in os.environ:
        command = shlex.join(sys.argv)
        yield (
            f"{count} GPUs are visible, and torchrun was not used. Type: torchrun "
            f"--nproc_per_node={count} {command}; for one of them alone: CUDA_VISIBLE_DEVICES=0 "
            f"python {command}"
        )
    if not _has_kernels(capability):
        yield (
            f"torch {torch.__version__} has no kernels for {name} (compute capability "
            f"{capability[0]}.{capability[1]}). The last one that has them for Volta, such as "
            f'V100: pip install "torch<2.15" torchvision {CU126}'
        )
    if args.bf16 and capability < (8, 0):
        yield (
            f"--bf16 needs an Ampere GPU or newer, not {name}. Drop --bf16 and "
            "--use_flash_attention: fp16 mixed precision is the default."
        )
    if args.use_qlora and capability < (7, 5):
        yield f"--use_qlora needs a Turing GPU or newer, not {name}. Use --use_lora."


def _has_kernels(capability: tuple[int, int]) -> bool:
    """
    Whether this torch was built for such a GPU: for an older one of the same generation (sm_80
    serves 8.6), or with code that is compiled for any newer one (compute_80).
    """
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)\w?", a) for a in torch.cuda.get_arch_list()]
    if not all(built):  # of ROCm
        return True
    for kind, major, minor in (arch.groups() for arch in built):
        of = (int(major), int(minor))
        if of <= capability and (kind == "compute" or of[0] == capability[0]):
            return True
    return False
