"""README and docs/: commands that parse, links that lead somewhere, numbers that are computed."""

import argparse
import ast
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageColor
from torch.distributed.run import get_args_parser
from transformers import TrainingArguments

from benchmarks.memory import full_size, make_batch, make_prompts
from phi3v import check
from phi3v.data import load_records
from phi3v.training import RecipeParser, arguments
from phi3v.training.flops import PEAK_FLOPS, training_flops
from small_datasets import picture
from test_convert_ucf101 import write_video

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {
    **{"<lr>": "1e-5", "<epochs>": "2", "<num_nodes>": "2", "${{outputs.model}}": "out"},
    **{"$MASTER_PORT": "29500", "$NODE_RANK": "0"},
}
# What runs everywhere. Any other program stands in a block that says before it what it needs.
ANYWHERE = {"pip", "make", "python", "torchrun"}
# Other packages' modules, and the file that the reader of own_data.md has saved.
ELSEWHERE = {"lmms_eval", "vllm", "make_records"}
# Of pip, vLLM and Azure's command line.
FOREIGN_FLAGS = {"no-build-isolation", "index-url", "max-model-len", "model", "dtype", "name"}


class Parsed(Exception):
    """A command line has passed its parser."""


def bash_blocks() -> Iterator[tuple[str, str, bool]]:
    """Page, commands, and whether the text before them says what they need."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in BLOCK.finditer(text):
            before = text[: found.start()].rstrip().rpartition("\n\n")[2]
            if found[1] == "bash":
                yield page.name, found[2], re.search(r"\bneeds?\b", before, re.I) is not None


def words_of(commands: str) -> Iterator[list[str]]:
    """The words of each command."""
    for placeholder, value in PLACEHOLDERS.items():
        commands = commands.replace(placeholder, value)
    unfinished = ""
    for line in commands.replace("\\\n", " ").splitlines():
        unfinished += f"{line}\n"
        with contextlib.suppress(ValueError):  # a quotation goes on in the next line
            words = shlex.split(unfinished, comments=True)
            unfinished = ""
            if words:
                yield words
    assert not unfinished


@pytest.fixture
def machine(monkeypatch):
    """One that has what a command needs. Programs end when their flags are parsed, by Parsed."""

    def stop_after(parser, name):
        original = getattr(parser, name)

        def parse(*args, **kwargs):
            original(*args, **kwargs)
            raise Parsed

        monkeypatch.setattr(parser, name, parse)

    for name in ("parse_args", "parse_intermixed_args"):
        stop_after(argparse.ArgumentParser, name)
    stop_after(RecipeParser, "parse_args")
    monkeypatch.setattr(arguments, "gpu_problems", lambda args: ())
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("WORLD_SIZE", "1")
    return monkeypatch


def check_command(words: list[str], machine: pytest.MonkeyPatch) -> None:
    """Its files exist, and its flags pass the parser of the program."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "torchrun":
        check_torchrun(rest, machine)
    elif program == "python":
        check_python(rest, machine)
    elif program == "pip" and "-r" in rest:
        assert Path(rest[rest.index("-r") + 1]).is_file()


def check_torchrun(words: list[str], machine: pytest.MonkeyPatch) -> None:
    """A batch has to be divisible by the processes that it starts."""
    meet, unknown = get_args_parser().parse_known_args(words)
    assert not unknown
    nodes = int(meet.nnodes.rpartition(":")[2])
    machine.setenv("WORLD_SIZE", str(int(meet.nproc_per_node) * nodes))
    script = [meet.training_script, *meet.training_script_args]
    check_python(["-m", *script] if meet.module else script, machine)
    machine.setenv("WORLD_SIZE", "1")


def check_python(words: list[str], machine: pytest.MonkeyPatch) -> None:
    is_module = words[0] == "-m"
    name, *flags = words[is_module:]
    if name.split(".")[0] in ELSEWHERE or name.startswith("docs/"):
        return
    if "--deepspeed" in flags:
        assert Path(flags[flags.index("--deepspeed") + 1]).is_file()
    machine.setattr(sys, "argv", [name, *flags])
    machine.delitem(sys.modules, name, raising=False)  # or runpy warns
    with pytest.raises(Parsed):
        if is_module:
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(name, run_name="__main__")


@pytest.mark.parametrize(("page", "commands", "marked"), [*bash_blocks()])
def test_commands_parse(page, commands, marked, machine):
    """
    A flag that was renamed, a batch that GPUs do not divide, a file or target that is gone; what
    cannot run everywhere says before the block what it needs.
    """
    for words in words_of(commands):
        if not marked:
            assert words[0] in ANYWHERE, f"{page}: a line with 'needs' has to go before {words}"
        check_command(words, machine)


def test_readme_is_one_page():
    """What a newcomer types stands on the first screen, and the rest in docs/."""
    lines = (REPO / "README.md").read_text("utf-8").splitlines()
    assert len(lines) < 200
    first = "\n".join(lines[:45])
    assert re.search(r"^make demo .*\nmake test ", first, re.MULTILINE)
    assert "docs/demo_report.png" in first and "**Limits.**" in first
    assert (REPO / "docs" / "demo_report.png").stat().st_size < 150_000


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub names them."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, REPO / "benchmarks" / "SCALING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """To files of the repository, and to headings in them."""
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_text_exist(page):
    """Targets, modules, flags and files that sentences and tables name."""
    folders = (REPO / name for name in ("phi3v", "demo", "benchmarks"))
    sources = [*REPO.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    code = "".join(path.read_text("utf-8") for path in sources) + get_args_parser().format_help()
    flags = {*re.findall(r"--([\w-]+)", code), *TrainingArguments.__dataclass_fields__}
    for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text("utf-8"))):
        words = span.split()
        if words[0] == "make":
            assert f"\n{words[1]}:" in (REPO / "Makefile").read_text(), span
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] not in ELSEWHERE:
            assert (REPO / f"{words[2].replace('.', '/')}.py").is_file(), span
        if re.fullmatch(r"(phi3v|demo|benchmarks|docs|examples|tests|ds_configs)/[\w/.]+", span):
            assert (REPO / span).exists(), span
        for flag in re.findall(r"(?<!\S)--([\w-]+)", span):
            assert flag in flags | FOREIGN_FLAGS, span


def test_messages_of_the_guide_are_those_of_the_code():
    """A reader searches the guide for a part of the line that a run ended with."""
    text = (REPO / "docs" / "guide.md").read_text("utf-8").split("## Messages")[1]
    rows = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    said = [
        node.value
        for path in (REPO / "phi3v").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(rows) > 15
    assert [row for row in rows if not any(row in text for text in said)] == []


def test_a_csv_becomes_records(tmp_path, monkeypatch, capsys):
    """The lines of docs/own_data.md run as they stand, and the check finds nothing wrong."""
    page = (REPO / "docs" / "own_data.md").read_text("utf-8")
    (tmp_path / "images").mkdir()
    lines = ["file,answer"]
    for index in range(20):
        picture(index).save(tmp_path / "images" / f"{index}.png")
        lines.append(f'{index}.png,"a, {index}"')
    (tmp_path / "labels.csv").write_text("\n".join(lines), "utf-8")
    monkeypatch.chdir(tmp_path)
    exec(next(code for kind, code in BLOCK.findall(page) if kind == "python"), {})
    for name, count in {"train": 18, "eval": 2}.items():
        assert check.main([f"{name}.jsonl", "--image_dir", "images", "--no-tqdm"]) == 0
        assert f"{count} samples, 0 of them bad" in capsys.readouterr().out
    lines = "".join(Path(f"{name}.jsonl").read_text() for name in ("train", "eval")).splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == 20


@pytest.mark.long
def test_commands_run(tmp_path):
    """
    Those of docs/ that need nothing run as they stand: of 60 pictures in three colours and a CSV,
    to a check, a trained model, its report and a right answer; to shards; and of a video to frames.
    """
    scripts = ("finetune_hf_trainer_ucf101.py", "convert_ucf101.py")
    for name in ("phi3v", "demo", "ds_configs", *scripts):
        (tmp_path / name).symlink_to(REPO / name)
    write_video(tmp_path / "my_videos/train/Walking/a.mp4", num_frames=58)
    (tmp_path / "images").mkdir()
    lines = ["file,answer"]
    for index in range(60):
        colour = ("Red", "Green", "Blue")[index % 3]
        shade = ImageColor.getrgb(colour)
        shade = tuple(value * (200 + index % 50) // 255 for value in shade)
        Image.new("RGB", (64, 64), shade).save(tmp_path / "images" / f"{index}.png")
        lines.append(f"{index}.png,{colour}")
    (tmp_path / "labels.csv").write_text("\n".join(lines), "utf-8")
    page = (REPO / "docs" / "own_data.md").read_text("utf-8")
    records = next(code for kind, code in BLOCK.findall(page) if kind == "python")
    (tmp_path / "make_records.py").write_text(records, "utf-8")
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(page: str) -> str:
        blocks = [c for name, c, needs in bash_blocks() if name == page and not needs]
        done = subprocess.run(
            ["bash", "-euc", "\n".join(blocks)],
            cwd=tmp_path,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        assert blocks and done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    assert run("own_data.md").splitlines()[-1] == "Red"
    run("data_formats.md")
    assert len((tmp_path / "good.jsonl").read_text().splitlines()) == 54
    run("large_data.md")
    for name, count in {"train": 54, "eval": 6}.items():
        assert len(load_records(tmp_path / f"shards/{name}.shards.json", None)) == count
    assert len([*(tmp_path / "converted/images").rglob("*.jpg")]) == 2  # of 2.3 seconds
    for name in ("my_model", "other_model"):
        shutil.copytree(tmp_path / "tried", tmp_path / name)
    run("guide.md")
    for name in ("tried/report.html", "my_model/report.html", "compared.html"):
        assert "Confusion matrix" in (tmp_path / name).read_text("utf-8")


# ---------------------------------------------------------------- examples/


def test_slurm_file_parses(machine):
    """Its command line, as torchrun and the recipe read it."""
    text = (REPO / "examples" / "slurm.sbatch").read_text()
    [command] = [words for words in words_of(text) if words[0] == "srun"]
    check_command(command[command.index("torchrun") :], machine)
    nodes = re.search(r"--nodes=(\d+)", text)[1]
    gpus = re.search(r"--gpus-per-node=(\d+)", text)[1]
    assert f"--nnodes={nodes}" in command and f"--nproc_per_node={gpus}" in command


def test_azure_ml_file_loads_and_its_command_parses(machine):
    """Its image is built of a file that is there."""
    job = yaml.safe_load((REPO / "examples" / "azureml_docvqa.yml").read_text())
    processes = job["distribution"]["process_count_per_instance"]
    assert (REPO / "examples" / job["environment"]["build"]["path"] / "Dockerfile").is_file()
    machine.setenv("WORLD_SIZE", str(processes * job["resources"]["instance_count"]))
    [words] = words_of(job["command"])
    check_command(words, machine)


def test_workflow_runs_the_test_command():
    """GitHub runs what the README says."""
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "test.yml").read_text())
    assert {"run": "make test"} in workflow["jobs"]["test"]["steps"]


# ---------------------------------------------------------------- numbers

PHOTO = (3, 4)  # rows and columns of the crops of a 4:3 photo
SAMPLES = {  # crops of the images, tokens
    "DocVQA": ([(4, 4)], 2546),
    "Hateful Memes": ([PHOTO], 1981),
    "NLVR2": ([PHOTO] * 2, 3902),
    "UCF-101": ([(2, 2)] * 8, 6139),
}
PUBLISHED = 8.657  # pages per second of full finetuning on 8 A100-80GB with flash attention
A_PAGE = ([(4, 4)], 2443)  # of that run


def flops_of(each: dict[str, int], crops: list[tuple[int, int]], tokens: int) -> float:
    """FLOPs of a sample with 8 labels, in full finetuning."""
    pairs, seen = tokens * (tokens + 1) // 2, sum(h * w + 1 for h, w in crops)
    counts = {"tokens": tokens, "pairs": pairs, "labels": 8, "crops": seen}
    return sum(each[unit] * count for unit, count in counts.items())


def rows_of(page: str) -> dict[str, list[str]]:
    """Cells of the first table that has a line for each recipe, by recipe."""
    lines = (REPO / page).read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        name: next(row[1:] for row in rows if re.match(rf"\[?{name}\b", row[0]) and len(row) > 3)
        for name in SAMPLES
    }


def test_hours_are_those_of_the_published_speed():
    """The README's hours and docs/speed.md's FLOPs, computed again."""
    each = training_flops(full_size(8).model)
    peak = 8 * PEAK_FLOPS["A100",]
    mfu = PUBLISHED * flops_of(each, *A_PAGE) / peak
    assert f"{mfu:.0%}" == "26%"
    readme, speed = rows_of("README.md"), rows_of("docs/speed.md")
    for name, sample in SAMPLES.items():
        needed = flops_of(each, *sample)
        assert speed[name][-1] == f"{needed / 1e12:.1f}", name
        assert speed[name][-2] == f"{sample[1]:,}", name
        assert readme[name][-1] == f"{10_000 * needed / (mfu * peak) / 3600:.2f}", name


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SAMPLES)
def test_memory_of_the_recipes(name):
    """The README's GB per GPU, counted again: of training, and of an evaluation."""
    run = full_size(8)
    evaluation = run.evaluation(make_prompts(run.model.config, *SAMPLES[name]))
    training = run.training(make_batch(*SAMPLES[name]))
    counted = f"{sum(training) / 1e9:.0f}, {sum(evaluation) / 1e9:.0f}"
    assert rows_of("README.md")[name][-2] == counted
