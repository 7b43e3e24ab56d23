"""The UCF-101 recipe as a user starts it: torchrun, several processes, two machines."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import REPO
from helpers.launcher import ENVIRONMENT, torchrun

SCRIPT = str(REPO / "finetune_hf_trainer_ucf101.py")
COLORS = {"Red": "red", "Green": "lime", "Blue": "blue"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Two frames a sample in 16 of 22 training samples, none in the others; five to evaluate."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 22), ("val", 5), ("test", 3)):
        lines = []
        for number in range(count):
            name, color = list(COLORS.items())[number % 3]
            images = [f"{split}/{name}/{number}.{i}.jpg" for i in range(2)]
            for image in images:
                path = folder / "images" / image
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 48), color).save(path)
            turn = {"images": images, "user": "Which colour?", "assistant": name}
            if split == "train" and number >= 16:
                turn = {"user": f"Say {name}.", "assistant": name}
            record = {"id": f"{split}-{number}", "source": "ucf101", "conversations": [turn]}
            lines.append(json.dumps(record))
        (folder / f"ucf101_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def free_port() -> int:
    """A port below those that Linux gives to outgoing connections, which could take it."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def flags(data_dir: Path, checkpoint: Path, output_dir: Path) -> list[str]:
    return [
        SCRIPT,
        *("--data_dir", str(data_dir), "--model_name_or_path", str(checkpoint)),
        *("--output_dir", str(output_dir), "--num_crops", "1", "--batch_size", "4"),
        *("--learning_rate", "1e-3", "--max_new_tokens", "4", "--eval_batch_size_per_gpu", "2"),
        "--no-tqdm",
    ]


@pytest.fixture(scope="module")
def finetuned(launcher, data_dir, demo_checkpoint, tmp_path_factory):
    """The recipe under every launcher, at the same effective batch; name -> (output, folder)."""
    tmp_path = tmp_path_factory.mktemp("runs")
    done = {}

    def start(name: str) -> tuple[str, Path]:
        if name in done:
            return done[name]
        script = flags(data_dir, demo_checkpoint, tmp_path / name)
        if "ddp" in name:
            script += ["--deepspeed", "none"]
        elif name == "zero3":
            script += ["--deepspeed", str(REPO / "ds_configs" / "zero3.json")]
        if name == "torchrun":
            [output] = real_torchruns(tmp_path, ["--standalone", "--nproc_per_node=2", *script])
        elif "two machines" in name:
            meet = ["--nproc_per_node=1", "--nnodes=2", "--master_addr=127.0.0.1"]
            meet.append(f"--master_port={free_port()}")
            nodes = [[*meet, f"--node_rank={rank}", *script] for rank in range(2)]
            if name == "two machines":
                output, _ = real_torchruns(tmp_path, *nodes)
            else:
                words = ("-m", "torch.distributed.run")
                machines = [launcher.start(*words, *node, cwd=tmp_path) for node in nodes]
                output, other = (machine.finish() for machine in machines)
                assert [machine.returncode for machine in machines] == [0, 0], output + other
        else:
            command = script if name == "one process" else torchrun(2, *script)
            output = launcher.run(*command, cwd=tmp_path)
        done[name] = output, tmp_path / name
        return done[name]

    return start


def real_torchruns(tmp_path: Path, *commands: list[str]) -> list[str]:
    """
    Outputs of torchrun as a user starts it, of several at the same time; from another folder than
    the script's.
    """
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command],
            cwd=tmp_path,
            env={**os.environ, **ENVIRONMENT, **cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(outputs)
    return outputs


LAUNCHERS = [
    *("torchrun", "zero2", "zero3", "ddp", "one process"),
    *("two machines", "two machines, ddp"),
]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_output_folder(finetuned, name):
    """Model, processor, both evaluations and the losses are there; every sample counts once."""
    output, folder = finetuned(name)
    for file in ("model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (folder / file).is_file(), file
    for file in ("eval_before.json", "eval_after.json"):
        result = json.loads((folder / file).read_text())
        assert result["ids"] == [f"val-{i}" for i in range(5)]
        assert result["answers_unique"] == ["red", "green", "blue", "red", "green"]
        assert len(result["generated_texts_unique"]) == 5 and 0 <= result["accuracy"] <= 1
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6
    # Each line once, although two processes ran: rank 0 alone prints.
    for line in ("eval_before.json: accuracy", "eval_after.json: accuracy", "Training: 22 samples"):
        assert output.count(line) == 1, line


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", LAUNCHERS[1:])
def test_every_launcher_trains_the_same_model(finetuned, name):
    """
    DDP, one process and two machines end where torchrun with ZeRO-2 ends, text-only batches
    included.
    """
    reference, other = weights(finetuned("torchrun")[1]), weights(finetuned(name)[1])
    assert reference.keys() == other.keys()
    for tensor, values in reference.items():
        atol = 0 if name == "zero2" else 2e-4  # the same run, bit for bit
        torch.testing.assert_close(other[tensor], values, rtol=0, atol=atol, msg=tensor)


def test_training_moved_the_weights(finetuned, demo_checkpoint):
    """The saved model is not the one it started from, but for CLIP's unused tail."""
    before, after = weights(demo_checkpoint), weights(finetuned("zero2")[1])
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and all(".encoder.layers.2." in name or "post_layernorm" in name for name in same)


def test_more_ranks_than_samples(launcher, data_dir, demo_checkpoint, tmp_path):
    """Four ranks and three samples: nobody hangs, every sample counts once; test split, LoRA."""
    script = flags(data_dir, demo_checkpoint, tmp_path / "out")
    script += ["--eval_split", "test", "--use_lora", "--lora_rank", "2"]
    launcher.run(*torchrun(4, *script), cwd=tmp_path)
    result = json.loads((tmp_path / "out" / "eval_after.json").read_text())
    assert result["ids"] == ["test-0", "test-1", "test-2"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_lora_under_every_engine(launcher, data_dir, demo_checkpoint, tmp_path):
    """DDP and ZeRO-2 train the same adapters; ZeRO-3, which draws others, saves them whole."""
    adapters = []
    for config in ("none", "zero2.json", "zero3.json"):
        path = config if config == "none" else str(REPO / "ds_configs" / config)
        script = flags(data_dir, demo_checkpoint, tmp_path / config)
        script += ["--use_lora", "--lora_rank", "2", "--deepspeed", path]
        launcher.run(*torchrun(2, *script), cwd=tmp_path)
        adapters.append(load_file(tmp_path / config / "adapter_model.safetensors"))
    ddp, zero2, zero3 = adapters
    assert ddp.keys() == zero2.keys() == zero3.keys()
    for name, tensor in ddp.items():
        torch.testing.assert_close(zero2[name], tensor, rtol=0, atol=2e-4, msg=name)
        assert zero3[name].shape == tensor.shape and zero3[name].any() and tensor.any(), name


def test_wrong_data_costs_no_model(launcher, data_dir, demo_checkpoint, tmp_path):
    """A bad record stops the run with one message, before the weights are even looked for."""
    no_weights = shutil.ignore_patterns("*.safetensors")
    model = shutil.copytree(demo_checkpoint, tmp_path / "model", ignore=no_weights)
    broken = tmp_path / "data"
    broken.mkdir()
    for name in ("images", "ucf101_val.jsonl"):
        (broken / name).symlink_to(data_dir / name)
    lines = (data_dir / "ucf101_train.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"assistant"', '"asistant"')
    (broken / "ucf101_train.jsonl").write_text("\n".join(lines) + "\n")
    command = flags(broken, model, tmp_path / "out")
    output = launcher.run(*command, cwd=tmp_path, status=1)
    error = output[output.index("error: ") :]
    assert "ucf101_train.jsonl, line 4: conversations[0]" in error and "asistant" in error
    assert "Traceback" not in output


def test_help_explains_every_flag(launcher):
    """--help shows the commands, and a text and a default for every flag."""
    shown = " ".join(launcher.run(SCRIPT, "--help").split())
    for text in ("torchrun --nproc_per_node=4", "--eval_split", "--use_qlora", "(default: 4e-05)"):
        assert text in shown
    assert "an image is cut into, 1 to 16 (default: 4)" in shown and "default: None" not in shown
