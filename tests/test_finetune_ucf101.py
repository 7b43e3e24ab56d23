"""The UCF-101 recipe as a user starts it: torchrun, several processes, two machines."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import REPO

SCRIPT = str(REPO / "finetune_hf_trainer_ucf101.py")
COLORS = {"Red": "red", "Green": "lime", "Blue": "blue"}
pytestmark = pytest.mark.slow


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


def environment(tmp_path: Path) -> dict[str, str]:
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **cache, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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


def torchrun(processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*launcher, "--master_addr=127.0.0.1", f"--master_port={free_port()}", *arguments]


def run(tmp_path: Path, command: list[str]) -> str:
    """Output of a command that has to succeed; from another folder than the script's."""
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finetuned(data_dir, demo_checkpoint, tmp_path_factory):
    """The recipe under every launcher, at the same effective batch; name -> (output, folder)."""
    tmp_path = tmp_path_factory.mktemp("runs")
    done = {}

    def start(name: str) -> tuple[str, Path]:
        if name in done:
            return done[name]
        output_dir = tmp_path / name
        script = flags(data_dir, demo_checkpoint, output_dir)
        if name == "zero2":
            output = run(tmp_path, torchrun(2, *script))
        elif name == "zero3":
            config = str(REPO / "ds_configs" / "zero3.json")
            output = run(tmp_path, torchrun(2, *script, "--deepspeed", config))
        elif name == "ddp":
            output = run(tmp_path, torchrun(2, *script, "--deepspeed", "none"))
        elif name == "one process":
            output = run(tmp_path, [sys.executable, *script])
        else:
            script += ["--deepspeed", "none"] if name == "two machines, ddp" else []
            port = free_port()
            nodes = [
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"),
                    *("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1"),
                    *(f"--master_port={port}", *script),
                ]
                for rank in range(2)
            ]
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started = [
                subprocess.Popen(node, cwd=tmp_path, env=environment(tmp_path), **pipe)
                for node in nodes
            ]
            outputs = [process.communicate(timeout=300)[0] for process in started]
            assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
            output = outputs[0]
        done[name] = output, output_dir
        return done[name]

    return start


LAUNCHERS = ["zero2", "zero3", "ddp", "one process", "two machines", "two machines, ddp"]


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
    """DDP, one process and two machines end where ZeRO-2 ends, text-only batches included."""
    reference, other = weights(finetuned("zero2")[1]), weights(finetuned(name)[1])
    assert reference.keys() == other.keys()
    for tensor, values in reference.items():
        torch.testing.assert_close(other[tensor], values, rtol=0, atol=2e-4, msg=tensor)


def test_training_moved_the_weights(finetuned, demo_checkpoint):
    """The saved model is not the one it started from, but for CLIP's unused tail."""
    before, after = weights(demo_checkpoint), weights(finetuned("zero2")[1])
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and all(".encoder.layers.2." in name or "post_layernorm" in name for name in same)


def test_more_ranks_than_samples(data_dir, demo_checkpoint, tmp_path):
    """Four ranks and three samples: nobody hangs, every sample counts once; test split, LoRA."""
    script = flags(data_dir, demo_checkpoint, tmp_path / "out")
    run(tmp_path, torchrun(4, *script, "--eval_split", "test", "--use_lora", "--lora_rank", "2"))
    result = json.loads((tmp_path / "out" / "eval_after.json").read_text())
    assert result["ids"] == ["test-0", "test-1", "test-2"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_lora_under_every_engine(data_dir, demo_checkpoint, tmp_path):
    """DDP and ZeRO-2 train the same adapters; ZeRO-3, which draws others, saves them whole."""
    adapters = []
    for config in ("none", "zero2.json", "zero3.json"):
        path = config if config == "none" else str(REPO / "ds_configs" / config)
        script = flags(data_dir, demo_checkpoint, tmp_path / config)
        run(tmp_path, torchrun(2, *script, "--use_lora", "--lora_rank", "2", "--deepspeed", path))
        adapters.append(load_file(tmp_path / config / "adapter_model.safetensors"))
    ddp, zero2, zero3 = adapters
    assert ddp.keys() == zero2.keys() == zero3.keys()
    for name, tensor in ddp.items():
        torch.testing.assert_close(zero2[name], tensor, rtol=0, atol=2e-4, msg=name)
        assert zero3[name].shape == tensor.shape and zero3[name].any() and tensor.any(), name


def test_wrong_data_costs_no_model(data_dir, tmp_path):
    """A bad record stops the run with one message, before the model folder is even looked at."""
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "images").symlink_to(data_dir / "images")
    lines = (data_dir / "ucf101_train.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"assistant"', '"asistant"')
    (broken / "ucf101_train.jsonl").write_text("\n".join(lines) + "\n")
    command = flags(broken, tmp_path / "no_such_model", tmp_path / "out")
    result = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    error = result.stderr[result.stderr.index("error: ") :]
    assert "ucf101_train.jsonl, line 4: conversations[0]" in error and "asistant" in error
    assert "Traceback" not in result.stderr


def test_help_explains_every_flag():
    """--help shows the commands, and a text and a default for every flag."""
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    shown = " ".join(result.stdout.split())
    for text in ("torchrun --nproc_per_node=4", "--eval_split", "--use_qlora", "(default: 4e-05)"):
        assert text in shown
    assert "an image is cut into, 1 to 16 (default: 4)" in shown and "default: None" not in shown
