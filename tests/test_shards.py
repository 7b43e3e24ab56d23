"""`python -m phi3v.shards`, and reading what it writes: the same dataset, whole or not at all."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from helpers.trainers import arguments, make_trainer
from phi3v import shards
from phi3v.data import Mixture, Records, load_records, load_rows, prepare
from phi3v.data.images import load_images
from phi3v.data.packing import fit_lengths
from phi3v.data.shard_order import ShardOrder
from phi3v.data.shard_rows import ShardRows
from phi3v.errors import DataError, RunError
from phi3v.training import load_processor
from small_datasets import cauldron_row, write_parquet

COUNT = 23
ROWS = 5  # of a shard


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A jsonl of 23 records in three forms: no image, one or two, answers, a system turn."""
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for i in range(COUNT):
        names = [f"{i}.{k}.png" for k in range(i % 3)]
        for k, name in enumerate(names):
            Image.new("RGB", (20 + i, 30), (i * 9, k * 50, 0)).save(folder / name)
        turn = {"images": names, "user": f"question {i}?", "assistant": f"answer {i}"}
        line = {"id": f"id-{i}", "source": "s", "conversations": [turn]}
        if i % 4 == 1:
            line["answers"] = [f"answer {i}", f"{i}"]
        if i % 5 == 1:
            user, assistant = ({"role": r, "content": f"{r} {i}"} for r in ("user", "assistant"))
            user["content"] = "<image>" * len(names) + user["content"]
            system = {"role": "system", "content": "Be brief."}
            line = {"messages": [system, user, assistant], "images": names}
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def write(source: Path, out_dir: Path, *flags: str) -> int:
    command = [source / "train.jsonl", "--image_dir", source, "--out_dir", out_dir, "--no-tqdm"]
    flags = ("--rows_per_shard", ROWS, "--num_workers", 1, *flags)
    return shards.main([*map(str, command), *map(str, flags)])


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("shards")
    assert write(source, out_dir) == 0
    return out_dir


def content(record: dict) -> dict:
    """A record with what its images show in their place."""
    pixels = iter([(image.size, image.tobytes()) for image in load_images(record)])
    turns = [{**t, "images": [next(pixels) for _ in t["images"]]} for t in record["conversations"]]
    return {**record, "conversations": turns}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.stat().st_size}


def test_they_are_their_source(source, folder):
    """Every record is there once, in the source's order, whatever the order in the files."""
    theirs, ours = load_records(source / "train.jsonl", source), load_records(folder, None)
    assert len(ours) == COUNT and len(list(folder.glob("train-*-of-00005.parquet"))) == 5
    assert [content(record) for record in ours] == [content(record) for record in theirs]
    first = pq.read_table(folder / "train-00000-of-00005.parquet")["row"].to_pylist()
    assert first != sorted(first)
    parts = [load_rows(folder, split=part) for part in ("train[:4]", "train[4:]")]
    joined = [record for part in parts for record in Records(part)]
    assert [record["id"] for record in joined] == [record["id"] for record in theirs]


def test_the_hub_and_others_can_read_them(folder):
    """`datasets` finds the split by the files' names, and images by their type."""
    import datasets

    rows = datasets.load_dataset("parquet", data_dir=str(folder), split="train", streaming=True)
    row = next(row for row in rows if row["conversations"][0]["images"])
    assert isinstance(row["conversations"][0]["images"][0], Image.Image)


def test_a_killed_run_goes_on(source, folder, tmp_path):
    """What is written is not written again, and the result is that of an undisturbed run."""
    records = load_records(source / "train.jsonl", source)

    def until_killed(work, numbers):
        for number in list(numbers)[:3]:
            yield work(number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(records, tmp_path, rows_per_shard=ROWS, run=until_killed)
    assert len(files(tmp_path)) == 3
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    with pytest.raises(DataError, match="before python -m phi3v.shards has finished"):
        load_records(tmp_path, None)
    assert write(source, tmp_path) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert files(tmp_path) == files(folder)


@pytest.mark.long
def test_kills(source, tmp_path, seed):
    """SIGKILL at random moments, while two processes write: nothing is lost, nothing is left."""
    draw, files_of = random.Random(seed), [tmp_path / name for name in ("whole", "killed")]
    command = [sys.executable, "-m", "phi3v.shards", source / "train.jsonl", "--no-tqdm"]
    command += ["--image_dir", source, "--rows_per_shard", "1", "--num_workers", "2", "--out_dir"]
    subprocess.run([*command, files_of[0]], check=True)
    for kill in range(4):
        run = subprocess.Popen([*command, files_of[1]])
        while run.poll() is None and len(list(files_of[1].glob("*.parquet"))) < 5 * (kill + 1):
            time.sleep(0.001)
        time.sleep(draw.random() / 100)
        run.kill()
        run.wait()
    subprocess.run([*command, files_of[1]], check=True)
    assert files(files_of[0]) == files(files_of[1])
    assert not list(files_of[1].glob("*.part"))


def test_other_shards_are_not_mixed_with(source, folder, tmp_path, capsys):
    for flags in (("--seed", "1"), ("--rows_per_shard", "6")):
        before = files(folder)
        assert write(source, folder, *flags) == 2
        assert "is of another dataset, --seed or --rows_per_shard" in capsys.readouterr().err
        assert files(folder) == before


def test_bad_records(source, tmp_path, capsys):
    """The first ends the run with its line; --skip_bad_samples leaves out and names them all."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in source.glob("*.png"):
        (bad / path.name).write_bytes(path.read_bytes())
    lines = (source / "train.jsonl").read_text().splitlines()
    (bad / "2.0.png").write_bytes((bad / "2.0.png").read_bytes()[:-20])
    lines[7] = lines[7].replace('"assistant": "answer 7"', '"assistant": ""')
    lines[12] = lines[12].replace("id-12", "id-9")
    (bad / "train.jsonl").write_text("\n".join(lines) + "\n")
    out_dir = tmp_path / "out"
    assert write(bad, out_dir) == 2
    assert "train.jsonl, line" in (message := capsys.readouterr().err), message
    assert "--skip_bad_samples" in message and not list(out_dir.glob("*.json"))
    for _ in range(2):  # what is bad is known to a run that finds the shards there
        assert write(bad, out_dir, "--skip_bad_samples") == 0
        said = capsys.readouterr().out
        assert "3 of 23 samples are bad" in said
        assert all(f"line {line}: " in said for line in (3, 8, 13)) and "line 10: " not in said
        assert "id 'id-9' is that of" in said
    assert [r["id"] for r in load_records(out_dir, None)].count("id-9") == 1
    assert len(load_records(out_dir, None)) == 20


def test_damage_is_noticed(folder, tmp_path):
    """A shard that is cut off at the start, and a changed byte of an image when it is read."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in files(folder).items():
        (copy / name).write_bytes(data)
    path = copy / "train-00001-of-00005.parquet"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="train-00001-of-00005.parquet is missing or cut off"):
        load_records(copy, None)
    data[data.index(b"PNG") + 60] ^= 1
    path.write_bytes(data)
    records = load_records(copy, None)
    with pytest.raises(DataError, match="train-00001-of-00005.parquet cannot be read"):
        list(records)


def test_a_start_reads_a_few(folder, demo_checkpoint, tmp_path, monkeypatch):
    """Shards were checked when they were written, so a start does not read them all."""
    read = []
    monkeypatch.setattr(ShardRows, "_read", lambda self, group: read.append(group))
    args = arguments(demo_checkpoint, tmp_path)
    records = load_records(folder, None)
    train, evaluation = prepare(records, load_records(folder, None), load_processor(args), args)
    assert len(train) == len(evaluation) == COUNT and train.where(3).endswith("row 3")
    assert read == []


def test_packed_as_their_source(source, folder, demo_checkpoint, tmp_path):
    """Tokens are counted in the order of the files, and rows are packed as without shards."""
    args = arguments(demo_checkpoint, tmp_path, "--pack_length", "300", "--max_length", "250")
    processor = load_processor(args)
    theirs, ours = load_records(source / "train.jsonl", source), load_records(folder, None)
    assert ours.places()[ours.reading_order()].tolist() == list(range(COUNT))
    packed = [fit_lengths(records.check(), processor, args) for records in (theirs, ours)]
    assert packed[0].rows == packed[1].rows and len(packed[0]) < COUNT


def test_the_cauldrons_columns(tmp_path, own_cache):
    """Each text of a row becomes a record, with the row's images."""
    rows = [cauldron_row(i, 2, ("a?", "1"), ("b?", "2")) for i in range(3)]
    write_parquet(tmp_path / "hub", "train", rows)
    command = [str(tmp_path / "hub"), "--out_dir", str(tmp_path / "out"), "--no-tqdm"]
    assert shards.main([*command, "--num_workers", "1"]) == 0
    records = load_records(tmp_path / "out", None)
    assert [r["conversations"][0]["user"] for r in records] == ["a?", "b?"] * 3
    assert all(len(load_images(record)) == 2 for record in records)


# ---- On the hub ----


class Hub:
    """What stands for the hub: a folder."""

    folder: Path

    def __init__(self, token):
        assert token is True

    def create_repo(self, name, repo_type, private, exist_ok):
        assert (name, repo_type, private, exist_ok) == ("me/data", "dataset", False, True)

    def upload_folder(self, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        for pattern in allow_patterns:
            for path in Path(folder_path).glob(pattern):
                (self.folder / path.name).write_bytes(path.read_bytes())


def test_to_the_hub_and_back(source, folder, tmp_path, monkeypatch):
    """Pushed, downloaded by its id, and with --streaming read where it lies."""
    Hub.folder = tmp_path / "hub"
    Hub.folder.mkdir()
    monkeypatch.setattr(shards, "HfApi", Hub)
    assert write(source, tmp_path / "out", "--push_to_hub", "me/data") == 0
    assert files(Hub.folder) == files(folder)

    def download(name, repo_type, allow_patterns):
        assert (name, repo_type) == ("me/data", "dataset")
        return str(Hub.folder)

    monkeypatch.setattr("phi3v.data.shard_rows.huggingface_hub.snapshot_download", download)
    ids = [record["id"] for record in load_records(source / "train.jsonl", source)]
    assert [record["id"] for record in Records(load_rows("me/data"))] == ids

    memory = fsspec.filesystem("memory")
    memory.put(str(Hub.folder), "/data", recursive=True)
    places = {"hf://datasets/me/data": (memory, "/data")}
    monkeypatch.setattr("phi3v.data.shard_rows.fsspec.core.url_to_fs", places.__getitem__)
    remote = Records(load_rows("me/data", split="train[2:]", streaming=True))
    assert not remote.shards.local and [record["id"] for record in remote] == ids[2:]
    workers = DataLoader(remote, batch_size=None, num_workers=2)  # forked from who has read there
    assert [record["id"] for record in workers] == ids[2:]


def test_streaming_needs_shards(source, tmp_path):
    with pytest.raises(DataError, match="--streaming: .* is not what python -m phi3v.shards wrote"):
        load_records(source / "train.jsonl", source, streaming=True)
    with pytest.raises(DataError, match="--streaming: .* is not what python -m phi3v.shards wrote"):
        load_rows(tmp_path, streaming=True)


# ---- The order of --streaming ----


@pytest.fixture
def small_groups(source, tmp_path, monkeypatch) -> Records:
    monkeypatch.setattr(shards, "GROUP_ROWS", 2)
    assert write(source, tmp_path / "small") == 0
    return load_records(tmp_path / "small", None)


@pytest.mark.parametrize("processes, workers, batch", [(1, 1, 1), (2, 1, 2), (2, 3, 1)])
def test_a_group_is_read_once_and_by_one_worker(processes, workers, batch, monkeypatch):
    """Dealt out as accelerate and the DataLoader do, up to where the streams run out."""
    groups = np.random.default_rng(0).permutation(np.arange(2000) // 5)
    monkeypatch.setattr("phi3v.data.shard_order.groups_of", lambda groups: groups)
    order = ShardOrder(groups, batch, processes * workers, seed=1)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(indices := list(order))
        assert sorted(indices) == list(range(2000))
        readers: dict[int, Counter] = {}
        for start in range(0, 2000, batch):
            number = start // batch
            worker = (number % processes, number // processes % workers)
            for index in indices[start : start + batch]:
                readers.setdefault(order.groups[index], Counter())[worker] += 1
        assert len(readers) == 400
        assert sum(len(who) > 1 for who in readers.values()) < 0.05 * len(readers)
    assert epochs[0] != epochs[1]
    order.set_epoch(0)
    assert list(order) == epochs[0]


def test_parts_in_an_order(small_groups):
    """Of a part of the records, the order holds its indices."""
    some = small_groups.select(random.Random(0).sample(range(COUNT), 9))
    assert sorted(ShardOrder(some, 2, 2, seed=0)) == list(range(9))


def test_mixtures_have_an_order(small_groups):
    """A sample that an epoch has three times has a group in each pass."""
    some, rest = small_groups.select(range(5)), small_groups.select(range(5, COUNT))
    mixture = Mixture([some, rest], ["a", "b"], [1, 1])
    order = ShardOrder(mixture, 1, 2, seed=0)
    assert sorted(order) == list(range(len(mixture))) and len(mixture) == 36
    for number, span in enumerate(mixture.spans()):
        assert [mixture.locate(i)[1] for i in span] == mixture.places(number).tolist()
    first, again = order.groups[[mixture.locate(i)[1] == 0 for i in range(18)] + [False] * 18][:2]
    assert first != again and set(order.groups[:18]).isdisjoint(order.groups[18:])


def test_a_streamed_run_resumes_exactly(small_groups, demo_checkpoint, tmp_path):
    """From a checkpoint in the second epoch, whose order is another than the first one's."""
    flags = ("--streaming", "--save_steps", "3", "--num_train_epochs", "2")

    def train(name: str, *more: str) -> dict[str, np.ndarray]:
        args = arguments(demo_checkpoint, tmp_path / name, *flags, *more)
        trainer = make_trainer(args, small_groups.select(range(8)))
        trainer.train(trainer.args.resume_from_checkpoint)
        order = trainer._get_train_sampler()
        assert isinstance(order, ShardOrder) and order.streams == 1
        trainer.save_model()
        return load_file(tmp_path / name / "model.safetensors")

    whole = train("whole", "--save_total_limit", "5")
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    resumed = train("resumed", "--resume_from_checkpoint", checkpoint)
    assert all((whole[name] == resumed[name]).all() for name in whole)
    with pytest.raises(RunError, match="streaming is '1 processes x 2 workers x 1', it had"):
        train("x", "--dataloader_num_workers", "2", "--resume_from_checkpoint", checkpoint)
