"""Several datasets in one run: which samples an epoch has, and what is measured of each dataset."""

import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import REPO
from helpers.fake_gpu import Watch
from helpers.launcher import torchrun
from helpers.recipes import recipe, run
from helpers.records import MORE, RECORDS
from helpers.trainers import arguments, make_trainer
from phi3v.data import Mixture, Records, prepare
from phi3v.data.collators import TrainingCollator
from phi3v.data.mixing import MOST_SAMPLES, mix, parse_datasets, short_names
from phi3v.errors import DataError, RunError
from phi3v.report import main as report
from phi3v.training.by_dataset import dataset_metrics
from phi3v.training.checkpoints import fingerprint
from phi3v.training.trainer import evenly
from small_datasets import cauldron_row, picture, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def named(records: list[dict]) -> list[dict]:
    """With ids that differ, which those of another dataset may equal."""
    return [{**record, "id": str(number)} for number, record in enumerate(records)]


def mixture(weights=None, seed: int = 0, **parts: list[dict]) -> Mixture:
    return Mixture([Records(named(part)) for part in parts.values()], [*parts], weights, seed)


# ---------------------------------------------------------------- names and weights


def test_names_and_weights():
    """A weight stands behind the last colon; a colon of the path's own has no number after it."""
    assert parse_datasets(["a.jsonl:0.7", "b.jsonl:3"]) == (["a.jsonl", "b.jsonl"], [0.7, 3])
    assert parse_datasets(["s3:a", "x:1.jsonl"]) == (["s3:a", "x:1.jsonl"], None)
    assert parse_datasets(["disk:8:1e-3", "b:1"]) == (["disk:8", "b"], [0.001, 1])
    assert parse_datasets("one") == parse_datasets(Path("one")) == (["one"], None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a:1", "b"], "b has no weight"),
        (["a:0", "b:1"], "a:0: write"),
        (["a:-1", "b:1"], "a:-1: write"),
        (["a:inf", "b:1"], "a:inf: write"),
        (["a:nan", "b:1"], "a:nan: write"),
        ([":0.5", "b:1"], ":0.5: write"),
        (["data/a.jsonl:1", "./data/../data/a.jsonl:2"], "data/a.jsonl is given twice"),
    ],
)
@pytest.mark.parametrize("name", ["docvqa", "hateful_memes", "nlvr2", "ucf101"])
def test_flags_that_make_no_mixture(name, given, message, monkeypatch, capsys):
    """Said by the recipe's parser, before anything is loaded."""
    flag = "--train_file" if name == "ucf101" else "--dataset_name_or_path"
    monkeypatch.setattr(sys, "argv", [name, flag, *given])
    with pytest.raises(SystemExit) as left:
        recipe(name).get_arguments()
    assert left.value.code == 2 and f"{flag}: {message}" in capsys.readouterr().err


def test_flags_of_a_mixture(monkeypatch, capsys):
    """A flag that is given again adds to what it had; evaluation takes no weights."""
    flags = ["--dataset_name_or_path", "a:1", "b:2", "--dataset_name_or_path=c:3"]
    monkeypatch.setattr(sys, "argv", ["nlvr2", *flags])
    assert recipe("nlvr2").get_arguments().dataset_name_or_path == ["a:1", "b:2", "c:3"]
    monkeypatch.setattr(sys, "argv", ["docvqa", "--eval_dataset_name_or_path", "a:1", "b:2"])
    with pytest.raises(SystemExit):
        recipe("docvqa").get_arguments()
    assert "takes no weights" in capsys.readouterr().err


def test_short_names():
    """As much of the paths as tells them apart, in letters that every tracker takes."""
    assert short_names(["data/a.jsonl", "b.json", "me/c"]) == ["a", "b", "c"]
    assert short_names(["x/train.jsonl", "y/train.jsonl"]) == ["x_train", "y_train"]
    assert short_names(["a b", "a/b", "a.jsonl"]) == ["a_b", "b", "a"]
    assert short_names(["a b", "a_b"]) == ["a_b_1", "a_b_2"]


# ---------------------------------------------------------------- an epoch


def test_an_epoch_of_any_mixture(seed):
    """
    Shares are the weights', every sample is seen, none more than once more often than another, and
    the smallest dataset that it takes is seen in whole passes.
    """
    draw = random.Random(seed)
    for _ in range(60):
        sizes = [draw.randint(1, 60) for _ in range(draw.randint(2, 4))]
        weights = [draw.uniform(0.05, 3) for _ in sizes]
        names = [f"part{i}" for i in range(len(sizes))]
        mixed = Mixture([range(size) for size in sizes], names, weights, seed)
        seen = Counter(mixed.locate(index) for index in range(len(mixed)))
        for number, size in enumerate(sizes):
            times = [seen[number, place] for place in range(size)]
            share = sum(times) / len(mixed) * sum(weights) / weights[number]
            assert abs(share - 1) < 1 / sum(times) + len(sizes) / len(mixed)
            assert min(times) >= 1 and max(times) - min(times) <= 1, "evenly"
        assert any(c == size for c, size in zip(mixed.counts, sizes, strict=True)), "no longer"
        assert sum(seen.values()) == len(mixed) == sum(mixed.counts)


def test_an_epoch_in_numbers():
    """The weights' shares of 100 and 30 samples, in words; without weights, each sample once."""
    mixed = Mixture([range(100), range(30)], ["a", "b"], [1, 2])
    assert mixed.counts == [100, 200]
    assert mixed.describe() == "Samples of an epoch: 100 of a (each 1x), 200 of b (each 6.667x)"
    plain = Mixture([range(100), range(30)], ["a", "b"])
    assert [plain.locate(i) for i in (0, 99, 100, -1)] == [(0, 0), (0, 99), (1, 0), (1, 29)]
    with pytest.raises(IndexError):
        plain.locate(130)
    assert Mixture([range(100), range(30)], ["a", "b"], [10, 20]).counts == mixed.counts


def test_the_seed_decides_what_is_seen_once_more():
    """The same of one seed, others of another, and all samples have the same chance."""

    def rest(seed: int) -> list[int]:
        mixed = Mixture([range(50), range(20)], ["a", "b"], [1, 1], seed)
        assert mixed.counts == [50, 50]
        return [mixed.locate(index)[1] for index in range(90, 100)]

    assert rest(1) == rest(1) != rest(2) and len(set(rest(1))) == 10
    drawn = Counter(place for seed in range(400) for place in rest(seed))
    assert len(drawn) == 20 and all(140 < count < 260 for count in drawn.values())


def test_weights_that_no_run_can_use():
    for weights in ([1e-9, 1], [5e-324, 1]):
        with pytest.raises(DataError, match="an epoch of a, b would have .* samples"):
            len(Mixture([range(1000), range(10)], ["a", "b"], weights))
    assert len(Mixture([range(MOST_SAMPLES // 2), range(5)], ["a", "b"], [1, 1])) == MOST_SAMPLES


def test_a_million_samples_are_cheap():
    """Made in a fraction of a second, and a few bytes a sample."""
    start = time.process_time()
    mixed = Mixture([range(1_000_000), range(100_000)], ["a", "b"], [0.3, 0.7])
    assert len(mixed) == 3_333_333 and mixed.locate(3_333_332)[0] == 1
    assert time.process_time() - start < 1
    assert sum(rest.nbytes for rest in mixed._rests) <= 8 * 1_100_000


# ---------------------------------------------------------------- prepared


def options(**values: object) -> SimpleNamespace:
    defaults = {"skip_bad_samples": False, "max_length": None, "pack_length": None}
    return SimpleNamespace(**{**defaults, "tqdm": False, "seed": 7, **values})


def test_each_dataset_is_prepared_for_itself(demo_processor, capsys):
    """
    Ids of two may be equal; what is too long is left out of each; samples of two share no row; an
    epoch is said, and evaluation has every sample once whatever weights it has.
    """
    train, evaluation = prepare(
        mixture([1, 3], a=MORE, b=RECORDS),
        mixture([1, 3], a=RECORDS, b=RECORDS[:1]),
        demo_processor,
        options(),
    )
    assert train.counts == [5, 15] and train.seed == 7
    assert [record["id"] for record in evaluation] == ["a/0", "a/1", "a/2", "b/0"]
    assert {record["dataset"] for record in evaluation} == {"a", "b"}
    assert "Samples of an epoch: 5 of a (each 1x), 15 of b (each 5x)\n" in capsys.readouterr().out
    args = options(max_length=46, pack_length=60)
    packed, _ = prepare(mixture(a=MORE, b=MORE), mixture(a=RECORDS, b=MORE), demo_processor, args)
    rows = [packed[index] for index in range(len(packed))]
    assert all(len({record["dataset"] for record in row}) == 1 for row in rows)
    assert max(map(len, rows)) > 1 and len({r["id"] for row in rows for r in row}) == 6
    said = capsys.readouterr().out
    assert "Packed rows of an epoch: 2 of a (each 1x), 2 of b (each 1x)" in said
    assert "training data, b: --max_length 46: 2 of 5 samples are longer" in said
    assert "training data, a: --pack_length 60: 3 samples in 2 rows" in said


def test_messages_name_the_dataset(tmp_path, demo_processor, capsys):
    """Of a bad line in one of two files; with --skip_bad_samples the other one stays whole."""
    record = {"id": "1", "conversations": [{"user": "a", "assistant": "b"}]}
    for name in ("good", "bad"):
        lines = [json.dumps({**record, "id": str(number)}) for number in range(3)]
        lines[1] = lines[0] if name == "bad" else lines[1]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    args = recipe_args(tmp_path, "good", "bad:3", "good")
    with pytest.raises(DataError, match="b has no weight|good.* has no weight"):
        recipe("ucf101").load_datasets(args)
    args.train_file[0] += ":1"
    datasets = recipe("ucf101").load_datasets(args)
    with pytest.raises(DataError, match="^.*bad.jsonl, line 2: id '0' is that of line 1 too"):
        prepare(*datasets, demo_processor, options())
    train, _ = prepare(*datasets, demo_processor, options(skip_bad_samples=True))
    assert train.counts == [3, 9]
    assert "bad.jsonl: 1 of 3 samples are bad and left out" in capsys.readouterr().out


def recipe_args(folder: Path, first: str, second: str, evaluation: str) -> SimpleNamespace:
    name, colon, weight = second.partition(":")
    files = [f"{folder}/{first}.jsonl", f"{folder}/{name}.jsonl{colon}{weight}"]
    return SimpleNamespace(
        **{"data_dir": None, "image_dir": str(folder), "eval_split": "val", "streaming": False},
        **{"train_file": files, "eval_file": [f"{folder}/{evaluation}.jsonl"]},
    )


def test_one_dataset_is_itself():
    """Nothing of a mixture is left where there is a single name."""
    assert mix("a:0.3", lambda name: name) == "a"
    assert mix(Path("x") / "a.jsonl", str) == "x/a.jsonl"


def test_another_mixture_is_noticed():
    """By its weights, datasets and their order; the unit of weights does not count."""
    parts = {"a": MORE, "b": RECORDS}
    first = fingerprint(mixture([1, 2], **parts))
    assert first == fingerprint(mixture([0.1, 0.2], **parts))
    assert first.startswith("a: 5 of 5 samples, ")
    others = [
        mixture([1, 3], **parts),
        mixture(**parts),
        mixture([2, 1], b=RECORDS, a=MORE),
        mixture([1, 2], a=MORE, b=RECORDS[::-1]),
        mixture([1, 2], a=MORE, c=RECORDS),
        Records(named(MORE)),
    ]
    assert len({first, *map(fingerprint, others)}) == 7


# ---------------------------------------------------------------- losses


def test_losses_are_those_of_the_datasets(demo_checkpoint, tmp_path):
    """
    After a step over all samples: of each dataset the mean over its labels that the model has for
    it alone, and of both together the loss that is logged. In packed rows too.
    """
    for name, packed in (("padded", False), ("packed", True)):
        batch = ("--batch_size", "4" if packed else "8", "--batch_size_per_gpu", "2")
        args = arguments(demo_checkpoint, tmp_path / name, *batch)
        mixed = mixture(a=MORE, b=RECORDS)
        if packed:
            rows = [
                [[part[0], part[1]], [part[i] for i in range(2, len(part))]] for part in mixed.parts
            ]
            mixed = Mixture(rows, ["a", "b"])
        trainer = make_trainer(args, mixed)
        collate, expected, labels = TrainingCollator(trainer.processor), {}, {}
        for part, records in {"a": MORE, "b": RECORDS}.items():
            batch = collate(records)
            labels[part] = len(batch["shift_labels"])
            with torch.no_grad():
                expected[f"loss_{part}"] = trainer.model.eval()(**batch).loss.item()
        trainer.train()
        [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {name: entry[name] for name in entry if name.startswith("loss_")}
        assert found == pytest.approx(expected, rel=1e-5)
        total = sum(found[f"loss_{part}"] * labels[part] for part in labels)
        assert entry["loss"] == pytest.approx(total / sum(labels.values()), rel=1e-4)


def test_a_loss_that_is_not_finite_does_not_count(demo_checkpoint, tmp_path):
    """As in a step that fp16 skips; and a dataset without labels since the last time has none."""
    losses = make_trainer(
        arguments(demo_checkpoint, tmp_path), mixture(a=MORE, b=RECORDS)
    ).dataset_losses
    logits = torch.zeros(4, 10)
    logits[1] = float("nan")
    losses.add(logits, torch.arange(4), torch.tensor([0, 0, 0, 0]))
    assert losses.collect() == {"loss_a": pytest.approx(np.log(10))}
    assert losses.collect() == {}


def test_a_micro_batch_of_a_mixture_asks_nothing(demo_checkpoint, tmp_path):
    """The device is not waited for, and a single dataset has nothing to compute."""
    for records, operators in ((mixture(a=MORE, b=RECORDS), 2), (named(MORE), 1)):
        trainer = make_trainer(arguments(demo_checkpoint, tmp_path, "--bf16"), records)
        trainer.create_optimizer_and_scheduler(1)
        for _ in range(2):  # a run's first batch makes RoPE's factors
            batch = trainer.data_collator([records[index] for index in (0, 1, 2)])
            with Watch("cpu") as watch:
                trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(7))
        assert watch.reads == []
        assert watch.operators["aten.nll_loss_forward.default"] == operators


def test_ranks_share_a_mixture(launcher, demo_checkpoint, tmp_path, monkeypatch):
    """Two ranks log the losses that one logs, of each dataset and of all."""
    flags = [*write_conversations(tmp_path), "--batch_size", "4", "--logging_steps", "1"]
    run("ucf101", demo_checkpoint, tmp_path, monkeypatch, *flags)
    one = losses_of(tmp_path / "output")
    flags += ["--model_name_or_path", demo_checkpoint, "--output_dir", tmp_path / "two"]
    flags += ["--num_crops", "2", "--max_new_tokens", "1", "--no-tqdm", "--deepspeed", "none"]
    launcher.run(*torchrun(2, REPO / "finetune_hf_trainer_ucf101.py", *flags))
    two = losses_of(tmp_path / "two")
    assert len(one) == 3 and all({"loss_few", "loss_many"} <= entry.keys() for entry in one)
    assert [pytest.approx(entry, rel=1e-4) for entry in one] == two


def losses_of(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    return [{n: e[n] for n in e if n.startswith("loss")} for e in entries]


# ---------------------------------------------------------------- evaluation


def test_metrics_that_a_dataset_has_none_of(capsys):
    """Its metrics are left out, said once, and those of the others are there."""

    def compute(results: list[int]) -> dict[str, float]:
        if len(set(results)) < 2:
            raise ValueError("AUROC needs samples of both classes.")
        return {"auroc": 0.5}

    for _ in range(2):
        assert dataset_metrics(compute, {"x": [1, 1], "y": [0, 1]}) == {"y": {"auroc": 0.5}}
    assert (
        capsys.readouterr().out
        == "x has no metrics of its own: AUROC needs samples of both classes\n"
    )


def test_a_part_of_an_evaluation_has_all_datasets():
    """--eval_samples: each has its share of them, evenly spaced, and one at least."""
    mixed = Mixture([range(90), range(30), range(2)], ["a", "b", "c"])
    part = evenly(mixed, 12)
    places = [mixed.locate(index) for index in part.indices]
    assert Counter(number for number, _ in places) == {0: 9, 1: 3, 2: 1}
    assert [place for number, place in places if number == 1] == [0, 10, 20]
    assert evenly(mixed, 500) is mixed and evenly(range(9), 3).indices == [0, 3, 6]


# ---------------------------------------------------------------- runs


def write_conversations(folder: Path) -> list[str]:
    """Two files of conversations with other answers; the flags that name them."""
    picture(0).save(folder / "a.png")
    for name, count in (("few", 2), ("many", 6), ("few_val", 1), ("many_val", 2)):
        answer = "Red" if "few" in name else "It is of the colour red."
        turn = {"images": ["a.png"], "user": "Colour?", "assistant": answer}
        records = [{"id": str(number), "conversations": [turn]} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    few, many, few_val, many_val = (
        str(folder / f"{name}.jsonl") for name in ("few", "many", "few_val", "many_val")
    )
    files = ["--train_file", f"{few}:1", f"{many}:1", "--eval_file", few_val, many_val]
    return [*files, "--image_dir", str(folder)]


def test_a_run_of_two_files(demo_checkpoint, tmp_path, monkeypatch, capsys):
    """Losses and metrics of each: in the log, its line, the files, the card and the report."""
    flags = [*write_conversations(tmp_path), "--logging_steps", "1", "--save_steps", "2"]
    _, after = run("ucf101", demo_checkpoint, tmp_path, monkeypatch, *flags)
    said = capsys.readouterr().out
    assert "Samples of an epoch: 6 of few (each 3x), 6 of many (each 1x)" in said
    assert "Training: 6 of 6 steps, 1 epochs of 12 samples" in said
    assert re.search(r"^step 1/6 .* left  (few|many) \d+\.\d{4}", said, re.MULTILINE)
    assert "  many_val: accuracy 0.0000 on 2 samples" in said
    assert after["ids"] == ["few_val/0", "many_val/0", "many_val/1"]
    assert after["datasets"] == {"few_val": {"accuracy": 0.0}, "many_val": {"accuracy": 0.0}}
    output = tmp_path / "output"
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert {"loss_few", "loss_many", "eval_few_val_accuracy"} <= {k for e in history for k in e}
    card = (output / "README.md").read_text()
    assert "| accuracy, few_val | 0.0000 | 0.0000 |" in card and "many.jsonl:1" in card
    assert "\nmetrics:\n- accuracy\n" in card and "datasets:" not in card
    page = (output / "report.html").read_text()
    assert "<th>accuracy, many_val</th><td>0.0000 before → 0.0000 after</td>" in page
    charts = re.findall("<figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL)
    legends = {title: re.findall(">(all|few|many|few_val|many_val)<", svg) for title, svg in charts}
    assert legends["Loss"] == ["all", "few", "many"]
    assert legends["accuracy by step"] == ["all", "few_val", "many_val"]
    assert not any(legends[title] for title in legends if title not in ("Loss", "accuracy by step"))
    assert report([str(output), str(output), "--out", str(tmp_path / "two.html")]) == 0


def test_a_plan_of_a_mixture(demo_checkpoint, tmp_path, monkeypatch, capsys, own_cache):
    """It counts the samples of an epoch, and says of what it is; nothing is trained."""
    folders = []
    for name, count in (("a", 6), ("b", 5)):
        rows = [cauldron_row(i, 2, ("Same?", "True")) for i in range(count)]
        folders.append(f"{write_parquet(tmp_path / name, 'train', rows)}:1")
    flags = ("--dataset_name_or_path", *folders, "--num_eval_rows", "2", "--plan")
    with pytest.raises(SystemExit) as left:
        run("nlvr2", demo_checkpoint, tmp_path, monkeypatch, *flags)
    said = capsys.readouterr().out
    assert (
        left.value.code == 0
        and "Samples of an epoch: 4 of a (each 1x), 4 of b (each 1.333x)" in said
    )
    assert "8 samples to train on, 4 to evaluate" in said


def test_killed_and_resumed(demo_checkpoint, tmp_path):
    """
    What a kill leaves goes on to the weights and the logged losses of a run without one, bit for
    bit; with other weights of the datasets, it does not go on.
    """

    def train(folder: str, *flags: str, weights=(2, 1)):
        flags = (*flags, "--save_steps", "3", "--num_train_epochs", "2", "--learning_rate", "1e-2")
        trainer = make_trainer(
            arguments(demo_checkpoint, tmp_path / folder, *flags),
            mixture(weights, 42, a=MORE, b=RECORDS),
        )
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model()
        return losses_of(tmp_path / folder), load_file(tmp_path / folder / "model.safetensors")

    losses, weights = train("whole")
    assert len(losses) == 10 and {*losses[0], *losses[1]} == {"loss", "loss_a", "loss_b"}
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-9")
    (tmp_path / "killed" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="training data is 'a: 5 of 5 .*it had 'a: 6 of 5"):
        train("killed", "--resume_from_checkpoint", weights=(1, 1))
    again, resumed = train("killed", "--resume_from_checkpoint")
    assert losses_of(tmp_path / "killed") == again == losses
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
