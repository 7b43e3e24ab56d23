"""The recipes on small local datasets in every layout that they read, started in this process."""

import ast
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from conftest import REPO
from helpers.recipes import recipe, run
from phi3v.data.collators import TrainingCollator
from phi3v.data.images import load_images
from phi3v.data.records import Records
from phi3v.errors import DataError
from small_datasets import cauldron_row, examples_row, picture, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def given(**values: object) -> SimpleNamespace:
    """Parsed arguments, as far as a function looks at them."""
    return SimpleNamespace(**{"streaming": False, **values})


def load(name: str, skip_bad: bool = False, **values: object) -> list[Records]:
    """A recipe's datasets, checked, as they are before training."""
    args = given(**{"eval_file": "", **values})
    return [records.check(skip_bad) for records in recipe(name).load_datasets(args)]


# ---------------------------------------------------------------- DocVQA


def test_docvqa_mini_train(demo_checkpoint, tmp_path, monkeypatch):
    """The examples layout, in parquet: ANLS over all accepted answers, written with the ids."""
    folder = tmp_path / "examples"
    write_parquet(folder, "train", [examples_row(i) for i in range(4)])
    write_parquet(folder, "test", [examples_row(i) for i in range(4, 7)])
    flags = ("--dataset_name_or_path", folder, "--eval_dataset_name_or_path", folder)
    for result in run("docvqa", demo_checkpoint, tmp_path, monkeypatch, *flags):
        assert result["ids"] == [f"docvqa-page_{i}" for i in range(4, 7)]
        assert result["answers_unique"][0] == ["number 4", "4"]
        assert 0 <= result["anls"] <= 1 and len(result["generated_texts_unique"]) == 3


def docvqa(folder: Path, seed: int = 1, skip_bad: bool = False) -> list[Records]:
    names = {"dataset_name_or_path": str(folder), "eval_dataset_name_or_path": str(folder)}
    return load("docvqa", skip_bad, **names, seed=seed)


def test_docvqa_records(tmp_path):
    """Prompts of both layouts; the target drawn by the seed; all questions of a row are used."""
    examples = write_parquet(tmp_path / "a", "train", [examples_row(i) for i in range(40)])
    write_parquet(examples, "test", [examples_row(i) for i in range(2)])
    records, evaluation = docvqa(examples)
    assert len(records) == 40 and len(evaluation) == 2
    turns = [record["conversations"][0] for record in records]
    assert turns[3]["user"] == "What is number 3?\nAnswer briefly."
    assert all(turn["assistant"] in (f"number {i}", str(i)) for i, turn in enumerate(turns))
    long = sum(turn["assistant"].startswith("number") for turn in turns)
    assert 10 < long < 30, "the target is one of the answers, drawn at random"
    assert [record["conversations"] for record in records] == [[turn] for turn in turns]
    again = docvqa(examples, seed=2)[0]
    assert [r["conversations"][0]["assistant"] for r in again] != [t["assistant"] for t in turns]
    assert evaluation[1]["answers"] == ["number 1", "1"]

    rows = [cauldron_row(0, 1, ("a?", "1"), ("b?", "2")), cauldron_row(1, 1, ("c?", "3"))]
    cauldron = write_parquet(tmp_path / "b", "train", rows)
    write_parquet(cauldron, "test", rows)
    records = docvqa(cauldron)[0]
    assert [record["id"] for record in records] == ["docvqa-0-0", "docvqa-0-1", "docvqa-1-0"]
    assert [record["conversations"][0]["user"] for record in records] == ["a?", "b?", "c?"]
    images = load_images(records[2])
    assert [image.getpixel((5, 5)) for image in images] == [(0, 255, 0)]


def test_docvqa_draws_the_targets_it_always_drew(tmp_path):
    """A change would make results of one seed differ from those that are published with it."""
    folder = write_parquet(tmp_path / "a", "train", [examples_row(i) for i in range(8)])
    write_parquet(folder, "test", [examples_row(0)])
    drawn = [record["conversations"][0]["assistant"] for record in docvqa(folder, seed=42)[0]]
    assert drawn == ["0", "number 1", "2", "number 3", "4", "5", "6", "number 7"]


def test_docvqa_data_that_is_not_there(tmp_path):
    """The message names the flag that the data was given with."""
    folder = write_parquet(tmp_path / "a", "train", [examples_row(0)])
    with pytest.raises(DataError, match="split 'train' of .* --dataset_name_or_path"):
        docvqa(tmp_path / "no")
    with pytest.raises(DataError, match="split 'test' of .* --eval_dataset_name_or_path"):
        docvqa(folder)


def test_docvqa_bad_rows(tmp_path):
    """An id of another row, or what cannot be trained, whichever answer is drawn: error or skip."""
    bad = {
        "id 'docvqa-page_0' is that of row 0 too": {"id": "page_0"},
        "it needs an id, a text `en` in `query`, and `answers`": {"id": None},
        "it needs .*, and `answers`": {"answers": []},
        r"answers\[3\] is empty": {"answers": ["a", "b", "c", " "]},
        r"(conversations\[0\].assistant|answers\[3\]) must be a string": {
            "answers": ["a", "b", "c", None]
        },
        r"conversations\[0\].assistant contains '<\|end\|>'": {"answers": ["<|end|>"]},
        "it needs .* a text `en`": {"query": {"en": None, "de": "Welche?"}},
    }
    for number, (message, changes) in enumerate(bad.items()):
        rows = [examples_row(0), {**examples_row(1), **changes}, examples_row(2)]
        folder = write_parquet(tmp_path / str(number), "train", rows)
        write_parquet(folder, "test", rows[:1])
        with pytest.raises(DataError, match=f"^{folder}, row 1: {message}"):
            docvqa(folder)
        kept = docvqa(folder, skip_bad=True)[0]
        assert [record["id"] for record in kept] == ["docvqa-page_0", "docvqa-page_2"]


# ---------------------------------------------------------------- Hateful Memes


def test_hateful_memes_cauldron(demo_checkpoint, tmp_path, monkeypatch):
    """The first rows evaluate, the others train; accuracy and AUROC, with the probabilities."""
    rows = [cauldron_row(i, 1, ("Hateful?", ("Yes.", "No.")[i % 2])) for i in range(8)]
    dataset = datasets.load_dataset(
        str(write_parquet(tmp_path / "memes", "train", rows)), split="train"
    )
    dataset.save_to_disk(tmp_path / "saved")
    flags = ("--dataset_name_or_path", tmp_path / "saved", "--num_eval_rows", "4")
    for result in run("hateful_memes", demo_checkpoint, tmp_path, monkeypatch, *flags):
        assert result["ids"] == [f"hateful_memes-{i}-0" for i in range(4)]
        assert 0 <= result["accuracy"] <= 1 and 0 <= result["auroc"] <= 1
        assert len(result["probabilities"]) == 4 and all(0 < p < 1 for p in result["probabilities"])


def test_hateful_memes_other_answers(tmp_path):
    """Accuracy and AUROC know Yes and No, however they are written: others are error or skip."""
    answers = ["Yes", "no.", " No. ", "YES", "Maybe"]
    rows = [cauldron_row(i, 1, ("Hateful?", answer)) for i, answer in enumerate(answers)]
    folder = write_parquet(tmp_path / "memes", "train", rows)
    flags = {"dataset_name_or_path": str(folder), "num_eval_rows": 1}
    with pytest.raises(DataError, match="row 4: an answer is 'Maybe', not Yes or No"):
        load("hateful_memes", **flags)
    train, evaluation = load("hateful_memes", skip_bad=True, **flags)
    assert len(train) == 3 and len(evaluation) == 1


def test_hateful_memes_challenge_files(tmp_path):
    """The challenge's own files: id, img, text and label."""
    (tmp_path / "img").mkdir()
    for name in ("train.jsonl", "dev_seen.jsonl"):
        lines = []
        for index in range(3):
            image = f"img/{name[0]}{index}.png"
            picture(index).save(tmp_path / image)
            row = {"id": 100 + index, "img": image, "text": f"t {index}", "label": index % 2}
            lines.append(json.dumps(row))
        (tmp_path / name).write_text("\n".join(lines))
    flags = {
        "dataset_name_or_path": str(tmp_path),
        "eval_file": "dev_seen.jsonl",
        "num_eval_rows": 1,
    }
    train, evaluation = load("hateful_memes", **flags)
    assert [record["id"] for record in train] == ["100", "101", "102"]
    turns = [record["conversations"][0] for record in evaluation]
    assert [turn["assistant"] for turn in turns] == ["No", "Yes", "No"]
    assert '"t 1" hateful?' in turns[1]["user"] and turns[1]["images"][0].endswith("img/d1.png")
    (tmp_path / "img" / "d2.png").unlink()
    with pytest.raises(ValueError, match="dev_seen.jsonl, line 3: .*'img/d2.png' cannot be read"):
        load("hateful_memes", **flags)


# ---------------------------------------------------------------- NLVR2


def test_nlvr2_cauldron(demo_checkpoint, tmp_path, monkeypatch):
    """Two images a sample; accuracy; a row with another number of images is refused."""
    rows = [cauldron_row(i, 2, ("Same?", "True" if i % 2 else "False")) for i in range(6)]
    folder = write_parquet(tmp_path / "nlvr2", "train", rows)
    flags = ("--dataset_name_or_path", folder, "--num_eval_rows", "2")
    for result in run("nlvr2", demo_checkpoint, tmp_path, monkeypatch, *flags):
        assert result["ids"] == ["nlvr2-0-0", "nlvr2-1-0"] and 0 <= result["accuracy"] <= 1
        assert result["answers_unique"] == ["false", "true"]
    bad = write_parquet(tmp_path / "bad", "train", [*rows, cauldron_row(7, 1, ("Same?", "True"))])
    flags = {"dataset_name_or_path": str(bad), "num_eval_rows": 2}
    with pytest.raises(DataError, match="bad, row 6: it has 1 images, not 2"):
        load("nlvr2", **flags)
    assert [len(records) for records in load("nlvr2", skip_bad=True, **flags)] == [4, 2]


def test_nlvr2_official_files(demo_processor, tmp_path):
    """The official json lines, with the images of each identifier wherever they are."""
    for split in ("train", "dev"):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for side in (0, 1):
            picture(side).save(folder / f"{split}-85-0-img{side}.png")
        row = {"sentence": "Two dogs.", "label": "True", "identifier": f"{split}-85-0-1"}
        (tmp_path / f"{split}.json").write_text(json.dumps(row) + "\n")
    flags = {"dataset_name_or_path": str(tmp_path), "eval_file": "dev.json", "num_eval_rows": 1}
    train, evaluation = load("nlvr2", **flags)
    assert [record["id"] for record in evaluation] == ["dev-85-0-1"]
    [turn] = train[0]["conversations"]
    assert turn["user"] == "Two dogs. Is this true or false?" and turn["assistant"] == "True"
    assert TrainingCollator(demo_processor)([train[0]])["pixel_values"].shape[0] == 2
    (tmp_path / "images" / "dev" / "dev-85-0-img1.png").unlink()
    recipe("nlvr2").find_images.cache_clear()
    with pytest.raises(ValueError, match=r"dev.json, line 1: needs .*img1.png.*, \[\]"):
        load("nlvr2", **flags)


def test_nlvr2_image_in_two_folders(tmp_path):
    """An image is looked up by its name alone: which of two is meant cannot be known."""
    rows = [{"sentence": "s", "label": "True", "identifier": f"a-{i}-0-0"} for i in range(2)]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        picture(0).save(tmp_path / folder / "a-1-0-img0.png")
    for name in ("a-0-0-img0.png", "a-0-0-img1.png", "a-1-0-img1.png"):
        picture(0).save(tmp_path / "first" / name)
    flags = {"dataset_name_or_path": str(tmp_path), "eval_file": "dev.json", "num_eval_rows": 1}
    with pytest.raises(DataError, match="train.json, line 2: .*first/a-1.*, .*second/"):
        load("nlvr2", **flags)
    for records in load("nlvr2", skip_bad=True, **flags):
        assert [record["id"] for record in records] == ["a-0-0-0"]


def test_nothing_is_fetched_for_local_folders(demo_checkpoint, tmp_path, monkeypatch):
    """With a local model and local data, no connection is tried, not even for a look at the hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    rows = [cauldron_row(i, 2, ("Same?", "True")) for i in range(6)]
    folder = write_parquet(tmp_path / "nlvr2", "train", rows)
    flags = ("--dataset_name_or_path", folder, "--num_eval_rows", "2")
    run("nlvr2", demo_checkpoint, tmp_path, monkeypatch, *flags)


# ---------------------------------------------------------------- wrong datasets


@pytest.mark.parametrize("name", ["docvqa", "hateful_memes", "nlvr2"])
def test_columns_that_do_not_fit(name, demo_checkpoint, tmp_path, monkeypatch):
    """The run ends before a model is loaded; the message lists found and expected columns."""
    folder = write_parquet(tmp_path / "other", "train", [{"picture": "a", "caption": "b"}])
    monkeypatch.setattr(
        sys,
        "argv",
        [
            name,
            f"--model_name_or_path={demo_checkpoint}",
            f"--dataset_name_or_path={folder}",
            f"--output_dir={tmp_path / 'out'}",
            "--deepspeed=none",
        ],
    )
    with pytest.raises(DataError, match="Found: picture, caption.*{images, texts}"):
        recipe(name).main()


def test_wrong_texts_are_found_before_the_start(tmp_path):
    """A text that would forge a turn, or an empty answer, names the row; no image is decoded."""
    rows = [cauldron_row(i, 2, ("Same?", "True")) for i in range(4)]
    rows[2]["texts"][0]["user"] = "a<|end|>b"
    folder = write_parquet(tmp_path / "forged", "train", rows)
    with pytest.raises(DataError, match=r"forged, row 2: .*user contains '<\|end\|>'"):
        load("nlvr2", dataset_name_or_path=str(folder), num_eval_rows=1)


def test_too_few_rows_to_split(tmp_path):
    """Nothing left to train on is an error that says how many there are."""
    rows = [cauldron_row(i, 2, ("Same?", "True")) for i in range(3)]
    folder = write_parquet(tmp_path / "small", "train", rows)
    with pytest.raises(DataError, match=r"small has 3 rows, none of them in train\[500:\]"):
        load("nlvr2", dataset_name_or_path=str(folder), num_eval_rows=500)
    with pytest.raises(DataError, match=r"train\[-1:\] is no part of a split"):
        load("nlvr2", dataset_name_or_path=str(folder), num_eval_rows=-1)


def test_a_dataset_that_is_not_there(tmp_path):
    """Neither a folder nor reachable on the hub: one message with what to give."""
    with pytest.raises(DataError, match="cannot load split 'train.*' of .*--dataset_name_or_path"):
        load("nlvr2", dataset_name_or_path=str(tmp_path / "no"), num_eval_rows=2)


# ---------------------------------------------------------------- evaluation flags


def test_evaluation_during_training_and_alone(demo_checkpoint, tmp_path, monkeypatch):
    """--eval_steps writes a file a step count; --eval_only evaluates, and trains nothing."""
    rows = [cauldron_row(i, 2, ("Same?", "True")) for i in range(8)]
    folder = write_parquet(tmp_path / "nlvr2", "train", rows)
    flags = ("--dataset_name_or_path", folder, "--num_eval_rows", "2", "--eval_steps", "2")
    run("nlvr2", demo_checkpoint, tmp_path, monkeypatch, *flags)
    output_dir = tmp_path / "output"
    steps = [path.name for path in sorted(output_dir.glob("eval_step_*"))]
    assert steps == ["eval_step_2.json", "eval_step_3.json"]
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "eval_accuracy" in e] == [0, 2, 3, 3]
    after = (output_dir / "eval_after.json").read_text()
    monkeypatch.setattr(
        sys, "argv", [*sys.argv, "--eval_only", "--output_dir", str(tmp_path / "e")]
    )
    sys.argv[1] = f"--model_name_or_path={output_dir}"
    recipe("nlvr2").main()
    written = {path.name for path in (tmp_path / "e").glob("[!.]*")}
    assert written == {"eval_before.json", "report.html", "report.json", "report.png"}
    assert (tmp_path / "e" / "eval_before.json").read_text() == after, "the saved model is it"


# ---------------------------------------------------------------- UCF-101


def test_conversations_of_other_tools(demo_checkpoint, tmp_path, monkeypatch):
    """--train_file and --eval_file: a list of LLaVA's, and messages on lines."""
    picture(0).save(tmp_path / "a.jpg")
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red"}]
    rows = [{"id": 1, "image": "a.jpg", "conversations": turns}] * 4
    (tmp_path / "train.json").write_text(json.dumps(rows))
    content = [{"type": "image"}, {"type": "text", "text": "Colour?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Red"},
    ]
    (tmp_path / "eval.jsonl").write_text(json.dumps({"messages": messages, "images": ["a.jpg"]}))
    files = ("--train_file", tmp_path / "train.json", "--eval_file", tmp_path / "eval.jsonl")
    with pytest.raises(DataError, match="train.json: give --image_dir"):
        run("ucf101", demo_checkpoint, tmp_path, monkeypatch, *files)
    run("ucf101", demo_checkpoint, tmp_path, monkeypatch, *files, "--image_dir", tmp_path)
    after = json.loads((tmp_path / "output" / "eval_after.json").read_text())
    assert after["ids"] == ["messages-1"] and after["answers_unique"] == ["red"]


# ---------------------------------------------------------------- the docs


def test_snippet_of_the_docs(demo_checkpoint, tmp_path, capsys):
    """The docs' way to answer a question runs as it stands."""
    page = (REPO / "docs" / "other_tools.md").read_text()
    snippet = page.split("Answer a question with it:")[1].split("```python\n")[1].split("```")[0]
    picture(0).save(tmp_path / "image.png")
    snippet = snippet.replace("<output_dir>", str(demo_checkpoint))
    exec(snippet.replace("<image>", str(tmp_path / "image.png")).replace("=64", "=4"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_example_of_a_new_task(demo_checkpoint, tmp_path, monkeypatch):
    """What the docs say: copy the recipe, put its two functions in, run it. From anywhere."""
    page = (REPO / "docs" / "own_data.md").read_text()
    example = page.split("## A new task")[1].split("```python\n")[1].split("```")[0]
    script = (REPO / "finetune_hf_trainer_ucf101.py").read_text()
    for function in ast.parse(example).body:
        [old] = [
            node for node in ast.parse(script).body if getattr(node, "name", "") == function.name
        ]
        new = ast.get_source_segment(example, function)
        script = script.replace(ast.get_source_segment(script, old), new)
    (tmp_path / "finetune_counts.py").write_text(script)
    lines = ["file,count"]
    for index in range(104):
        picture(index).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,{index % 4}")
    (tmp_path / "counts.csv").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("finetune_counts.py", "--data_dir", str(tmp_path), "--deepspeed", "none"),
            *("--model_name_or_path", str(demo_checkpoint), "--output_dir", str(tmp_path / "out")),
            *("--batch_size", "2", "--num_crops", "1", "--no-tqdm", "--max_new_tokens", "1"),
        ],
    )
    importlib.import_module("finetune_counts").main()
    result = json.loads((tmp_path / "out" / "eval_after.json").read_text())
    assert result["ids"][:2] == ["0.png", "1.png"] and len(result["ids"]) == 100
    assert result["answers_unique"][:5] == ["0", "1", "2", "3", "0"] and "accuracy" in result


# ---------------------------------------------------------------- TrainingArguments


@pytest.mark.parametrize("name", ["docvqa", "hateful_memes", "nlvr2", "ucf101"])
def test_optimizer_and_schedule_of_the_recipes(name, tmp_path, monkeypatch):
    """They are those fixed by the recipe, and a flag changes them."""
    module = recipe(name)
    made = []

    class Made(Exception):
        pass

    def load_processor(args):
        raise Made

    def keep(*args, **settings):
        made.append(trainer_arguments(*args, **settings))
        return made[-1]

    trainer_arguments = module.trainer_arguments
    monkeypatch.setattr(module, "trainer_arguments", keep)
    monkeypatch.setattr(module, "load_processor", load_processor)
    for flags in ((), ("--optim", "adamw_bnb_8bit", "--warmup_steps", "100")):
        argv = [name, "--output_dir", str(tmp_path), "--deepspeed", "none", *flags]
        argv += ["--data_dir", "x"] if name == "ucf101" else []
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(Made):
            module.main()
    expected = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "max_grad_norm": 1.0,
        "warmup_steps": 50,
        "logging_steps": 10,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "linear",
    }
    assert {field: getattr(made[0], field) for field in expected} == expected
    assert (made[1].optim, made[1].warmup_steps, made[1].adam_beta2) == (
        "adamw_bnb_8bit",
        100,
        0.95,
    )
