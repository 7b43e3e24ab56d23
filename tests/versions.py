"""
Other versions of transformers than that of requirements.txt: `make test-versions`, which downloads
them from PyPI. Of those that are named alone:

    python -m tests.versions 5.24.0

For each: the tests of the model, of its processor and of loading. Then, of all pairs, that a folder
which one has saved gives the same tokens under the other, by the folder's own code. And for older
ones, that they read its tokenizer, and say what its code needs.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Installed without dependencies, but for those that differ from requirements.txt's.
HUB = ("huggingface_hub==1.31.0", "httpx", "httpcore", "h11", "anyio", "certifi", "idna")
VERSIONS = {"5.17.0": HUB, "5.23.0": (), "5.24.0": ()}
# With all their dependencies. The model's code needs 5.15, the tokenizer any.
OLDER = ("4.43.3", "4.51.3", "4.57.6", "5.14.1")
TESTS = ("tests/test_modeling.py", "tests/test_processing.py", "tests/test_loading.py")

SAVE = """
import sys
from demo.make_checkpoint import write_checkpoint
write_checkpoint(sys.argv[1], seed=0)
print(0)
"""
SAVE_TOKENIZER = """
import sys
from transformers import AutoConfig, AutoProcessor
import phi3v
base, folder = sys.argv[1:]
AutoConfig.from_pretrained(base).save_pretrained(folder)
AutoProcessor.from_pretrained(base).save_pretrained(folder)
print(0)
"""
GENERATE = """
import json, sys
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert "phi3v" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
def tokens(*texts):
    images = [[Image.new("RGB", (60, 40), "red")] * text.count("<|image_1|>") for text in texts]
    options = {"padding": True} if len(texts) > 1 else {}
    processor.tokenizer.padding_side = "left"
    inputs = processor(list(texts), images, **options)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **options).tolist()
prompt = "<|user|>\\n<|image_1|>\\nWhich digit?<|end|>\\n<|assistant|>\\n"
long = "<|image_1|>" + "x " * 50
while (n := processor(long, [Image.new("RGB", (60, 40))])["input_ids"].shape[1]) < 4090:
    long += "x " * max(1, (4090 - n) // 3)
both = tokens(prompt, prompt + " 1 2 3"), tokens(long, prompt)
print(json.dumps([tokens(prompt), tokens(long), *both]))
"""
TOKENS = """
import json, sys
import transformers
new = int(transformers.__version__[0]) > 4  # it asks the config, whose code older ones cannot run
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=new)
print(json.dumps(tokenizer("<|user|>\\nA1 \u00e4<|image_1|><|end|>\\n").input_ids))
"""
LOAD = """
import sys
import transformers
try:
    getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    assert "transformers>=5.15 is required" in str(error), error
else:
    raise SystemExit("it was loaded")
print(0)
"""
KINDS = ("AutoConfig", "AutoImageProcessor", "AutoProcessor")


def install(folder: Path, *packages: str) -> Path:
    options = ("--quiet", "--disable-pip-version-check", "--target", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *packages], check=True)
    return folder


def run(code: str, *arguments: object, paths: tuple[Path, ...], cache: Path) -> object:
    """What a program prints, in a folder of its own, with nothing of the project but `paths`."""
    env = {
        **{k: v for k, v in os.environ.items() if k in ("PATH", "HOME")},
        **{"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        **{"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=cache, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{paths[0].name}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def saved_by(version: str) -> Path:
            # With a dot in it, transformers 4.43 takes the folder's name apart.
            return work / version.replace(".", "_")

        folders = {
            version: install(
                *(work / version, "--no-deps", f"transformers=={version}", *VERSIONS[version])
            )
            for version in names or VERSIONS
        }
        for version, folder in folders.items():
            print(f"== the model's tests on transformers {version}", flush=True)
            env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
            command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *TESTS]
            subprocess.run(command, env=env, cwd=REPOSITORY, check=True)
            run(SAVE, saved_by(version), paths=(folder, REPOSITORY), cache=work)
        expected = None
        for writer, reader in product(folders, folders):
            cache = work / f"{writer}-{reader}"
            cache.mkdir()
            tokens = run(GENERATE, saved_by(writer), paths=(folders[reader],), cache=cache)
            expected = expected or tokens
            assert tokens == expected, f"saved by {writer}, other tokens under {reader}"
            print(f"saved by {writer}, read by {reader}: the same tokens", flush=True)
        if names:
            return
        for version in OLDER:
            older = install(work / version, f"transformers=={version}", "pillow")
            for kind in KINDS:
                run(LOAD, saved_by(writer), kind, paths=(older,), cache=work)
            print(f"transformers {version} says what the code needs", flush=True)
            if version.startswith("4."):  # transformers 5 asks the config for the tokenizer's class
                folders[version] = older
        base = os.environ.get("PHI3V_TOKENIZER")
        if not base:
            print("skipped: PHI3V_TOKENIZER is no folder with the real tokenizer")
            return
        run(
            SAVE_TOKENIZER,
            base,
            work / "real",
            paths=(list(folders.values())[0], REPOSITORY),
            cache=work,
        )
        ids = {v: run(TOKENS, work / "real", paths=(f,), cache=work) for v, f in folders.items()}
        assert all(found == ids["4.43.3"] for found in ids.values()), ids
        print(f"transformers {', '.join(ids)}: the same ids")


if __name__ == "__main__":
    main(sys.argv[1:])
