"""The converter on many machines: shards, and a Ray cluster."""

import errno
import fcntl
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from phi3v.data import engine, frame_folder
from phi3v.data.manifest import PART
from phi3v.errors import RunError
from test_convert_ucf101 import SCRIPT, Run, flags, main, read, tree, wait_until, write_video  # noqa: F401

CLUSTER = Path(__file__).parent / "helpers" / "ray_cluster.py"
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray")
# Ray starts Python for every worker, on a machine that may be busy with other tests.
SECONDS = 120


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], Run]]:
    """Starts the converter in a process of its own, which does not outlive the test."""
    runs: list[Run] = []

    def start(words: list[str]) -> Run:
        runs.append(Run(tmp_path, words))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.join()


def make_videos(root: Path, *names: str) -> Path:
    """The videos name, of one class each: what is before its first underscore."""
    for i, name in enumerate(names):
        write_video(root / "train" / name.split("_")[0] / f"{name}.avi", 10 + i % 40)
    return root


def noted(out: Path, manifest: str = "converted.jsonl") -> list[str]:
    """The videos that a manifest has, in its order."""
    text = (out / manifest).read_text() if (out / manifest).exists() else ""
    return re.findall(r'^{"name": "train/\w+/(\w+)"', text, re.MULTILINE)


# ---- Any engine ----


def half(number: int) -> float:
    if number == 13:
        os._exit(9)
    time.sleep(0.05 * (number % 3 == 0))
    return number / 2


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_order(workers: int):
    """Whoever is done first, and also around an item whose process dies."""
    expected = [i / 2 for i in range(30)]
    expected[13] = -1.0
    assert list(engine.run_all(half, range(30), died=-1.0, num_workers=workers)) == expected


def test_no_items():
    assert list(engine.run_all(half, [], died=-1.0)) == []


def test_bounded_in_flight():
    """However many items there are, few are given out at a time."""
    waiting, most = iter([engine.Item(i, (i,)) for i in range(50)]), 0
    with ThreadPoolExecutor(2) as pool:
        at_work: set[int] = set()

        def submit(item: engine.Item):
            nonlocal most
            at_work.add(item.number)
            most = max(most, len(at_work))
            return pool.submit(time.sleep, 0.001)

        for item, _ in engine.in_flight(submit, lambda: next(waiting, None), 5):
            at_work.remove(item.number)
    assert most == 5 and not at_work


def test_without_ray(tmp_path: Path, monkeypatch, capsys):
    """--ray where Ray is not installed: what to install, before anything is converted."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(make_videos(tmp_path / "videos", "A_1"), tmp_path / "out", "--ray") == 2
    assert "pip install ray" in capsys.readouterr().err
    assert not (tmp_path / "out/images").exists()


def test_folders_that_a_node_does_not_see(tmp_path: Path):
    """A node without the shared storage is an error of the run, not one of each video."""
    engine.check_node((tmp_path,))
    with pytest.raises(RunError, match=f"the node .* does not see {tmp_path}/nowhere"):
        engine.check_node((tmp_path, tmp_path / "nowhere"))


# ---- Shards ----


def test_shards_at_once(tmp_path: Path, start, read, capsys):  # noqa: F811
    """
    Four shards at once, of which one is killed and started again, and then --finish: the bytes and
    the words of one machine; and what a shard had done is not done again.
    """
    names = [f"A_{i}{'_hangs' if i == 9 else ''}" for i in range(11)]
    videos, out = make_videos(tmp_path / "videos", *names), tmp_path / "out"
    (videos / "train/A/A_3.avi").write_text("no video")
    write_video(videos / "train/A/A_5.avi", 3)
    (videos / "notes.txt").touch()
    runs = [start(flags(videos, out, "--shard", f"{i}/4")) for i in range(4)]
    order = sorted(path.stem for path in videos.rglob("*.avi"))
    hangs = order.index("A_9_hangs") % 4
    killed = f"converted.{hangs}-of-4.jsonl"
    assert [run.finish()[0] for i, run in enumerate(runs) if i != hangs] == [0, 0, 0]
    wait_until(lambda: noted(out, killed) == order[hangs::4][:-1])
    pids = runs[hangs].workers()
    # While a shard is at work, there is room for no one else.
    for words in (["--shard", f"{hangs}/4"], ["--finish"], []):
        assert main(videos, out, *words) == 2
        assert f"another run is writing to {out}" in capsys.readouterr().err
    runs[hangs].process.kill()
    wait_until(lambda: not any(worker.is_running() for worker in pids))
    (out / "images/train/A" / PART.format("killed")).touch()
    assert main(videos, out, "--finish") == 2
    error = capsys.readouterr().err
    assert f"1 of 11 videos are not done: those of the shards {hangs} of 4. Start" in error
    assert not list(out.glob("ucf101_*"))

    assert sorted(read()) == order
    (videos / "train/A/A_9_hangs.avi").rename(videos / "train/A/A_9.avi")
    assert main(videos, out, "--shard", f"{hangs}/4") == 0
    assert read() == ["A_9"]
    capsys.readouterr()
    assert main(videos, out, "--finish") == 1
    assert read() == []
    joined = capsys.readouterr()
    assert main(videos, tmp_path / "one") == 1
    one = capsys.readouterr()
    assert joined.err == one.err and "failed: train/A/A_3.avi: Invalid data" in one.err
    assert joined.out == one.out.replace(str(tmp_path / "one"), str(out))
    assert tree(out) == tree(tmp_path / "one")


def test_failed_video_is_tried_again(tmp_path: Path, read, capsys):  # noqa: F811
    """A shard started again tries what failed, and --finish goes by the last try."""
    videos, out = make_videos(tmp_path / "videos", "A_0", "A_1"), tmp_path / "out"
    good = (videos / "train/A/A_1.avi").read_bytes()
    (videos / "train/A/A_1.avi").write_text("no video")
    for i in range(2):
        assert main(videos, out, "--shard", f"{i}/2") == 0
    (videos / "train/A/A_1.avi").write_bytes(good)
    read()
    for i in range(2):
        assert main(videos, out, "--shard", f"{i}/2") == 0
    assert read() == ["A_1"]
    assert main(videos, out, "--finish") == 0
    assert main(videos, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")


def test_shards_on_top_of_a_finished_run(tmp_path: Path, read):  # noqa: F811
    """Shards keep what one machine did, and --finish removes what is no longer of the dataset."""
    videos, out = make_videos(tmp_path / "videos", "A_0", "A_1", "B_2"), tmp_path / "out"
    assert main(videos, out) == 0
    shutil.rmtree(videos / "train/B")
    make_videos(videos, "A_3")
    read()
    for i in range(5):  # more than there are videos
        assert main(videos, out, "--shard", f"{i}/5") == 0
        assert not list(out.glob("ucf101_*"))
    assert read() == ["A_3"]
    assert main(videos, out, "--finish") == 0
    assert main(videos, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")


def test_one_machine_takes_over(tmp_path: Path, read, capsys):  # noqa: F811
    """Another number of shards is refused; a run without --shard takes over what some did."""
    videos, out = make_videos(tmp_path / "videos", "A_0", "A_1", "A_2"), tmp_path / "out"
    assert main(videos, out, "--shard", "1/2") == 0
    for words in (["--shard", "0/3"], ["--finish"]):
        assert main(videos, out, *words) == 2
    error = capsys.readouterr().err
    assert "shards of 2 and of 3 do not fit together: a run without --shard" in error
    assert "2 of 3 videos are not done: those of the shards 0 of 2" in error
    read()
    assert main(videos, out) == 0
    assert read() == ["A_0", "A_2"]
    assert main(videos, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")
    files = tree(out)
    assert main(videos, out, "--finish") == 2
    assert "no shards" in capsys.readouterr().err
    assert tree(out) == files


def test_shards_of_other_settings(tmp_path: Path, monkeypatch, capsys):
    """Frames of another number, or of another version of a library, are not mixed."""
    videos, out = make_videos(tmp_path / "videos", "A_0", "A_1"), tmp_path / "out"
    for i in range(2):
        assert main(videos, out, "--shard", f"{i}/2", "--num_frames", 4 * (i + 1)) == 0
    assert main(videos, out, "--finish") == 2
    assert "1 of 2 videos are not done: those of the shards 0 of 2." in capsys.readouterr().err
    assert main(videos, out, "--shard", "0/2") == 0
    monkeypatch.setattr(frame_folder, "MADE_BY", "PyAV 0")
    assert main(videos, out, "--finish") == 2
    assert "another machine has PyAV 1" in capsys.readouterr().err


def test_strict_shards(tmp_path: Path, capsys):
    """--strict stops the shard that has a bad file, and --finish."""
    videos, out = make_videos(tmp_path / "videos", "A_0", "A_1", "A_2", "A_3"), tmp_path / "out"
    (videos / "train/A/A_1.avi").write_text("no video")
    assert [main(videos, out, "--shard", f"{i}/2", "--strict") for i in range(2)] == [0, 1]
    assert "Stopped by --strict." in capsys.readouterr().err
    assert main(videos, out, "--finish", "--strict") in (1, 2)
    assert main(videos, out, "--shard", "1/2") == 0
    assert main(videos, out, "--finish", "--strict") == 1
    assert not list(out.glob("ucf101_*"))
    assert main(videos, out, "--finish") == 1
    assert len(list(out.glob("ucf101_*"))) == 1


def test_storage_without_locks(tmp_path: Path, monkeypatch, capsys):
    """As some cluster storage is mounted: it works, with a warning."""

    def flock(file, operation) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(make_videos(tmp_path / "videos", "A_1"), tmp_path / "out", "--shard", "0/1") == 0
    assert f"warning: no locks in {tmp_path}/out: start nothing twice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["4/4", "1/0", "-1/4", "1", "a/b", "1/4/2", ""])
def test_bad_shard(tmp_path: Path, capsys, text: str):
    with pytest.raises(SystemExit) as stopped:
        main(tmp_path, tmp_path / "out", f"--shard={text}")
    assert stopped.value.code == 2
    assert f"{text} is not i/n with i from 0 to n - 1" in capsys.readouterr().err


@pytest.mark.long
def test_shards_after_random_kills(tmp_path: Path, start, read, seed: int):  # noqa: F811
    """Shards that are killed and started again, many times, end with the bytes of one machine."""
    rng = random.Random(seed)
    names = [f"{'AB'[i % 2]}_{i:02d}{rng.choice(['', '_late'])}" for i in range(60)]
    videos, out = make_videos(tmp_path / "videos", *names), tmp_path / "out"
    words = [flags(videos, out, "--shard", f"{i}/3", "--num_workers", i + 1) for i in range(3)]
    runs = [start(each) for each in words]
    for _ in range(15):
        time.sleep(rng.uniform(0.1, 1))
        i = rng.randrange(3)
        if not runs[i].process.is_alive():
            continue
        workers = runs[i].workers()
        if workers and rng.random() < 0.5:  # which the shard survives
            with suppress(psutil.NoSuchProcess):
                workers[0].kill()
        else:
            runs[i].process.kill()
            runs[i].process.join()
            for worker in workers:
                worker.wait(20)
            runs[i] = start(words[i])
    assert [run.finish()[0] for run in runs] == [0, 0, 0]
    read()
    assert main(videos, out, "--finish") == 0
    assert read() == []
    assert main(videos, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")


SLURM = {
    "python": 'printf "%s\\n" "$*" >> said.txt',
    "srun": '"$@"',
    "sbatch": 'for word; do case $word in --wrap=*) sh -c "${word#--wrap=}";; esac; done',
}


def test_sbatch(tmp_path: Path):
    """examples/convert.sbatch starts the shards of all videos, and one --finish."""
    folder = tmp_path / "clone of it"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for name, body in SLURM.items():
        (folder / ".venv/bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / ".venv/bin" / name).chmod(0o755)
    script = SCRIPT.parent / "examples/convert.sbatch"
    slurm = {"SUBMIT_DIR": folder, "CPUS_PER_TASK": 16, "ARRAY_TASK_COUNT": 2, "ARRAY_JOB_ID": 7}
    for i in range(2):
        env = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        env |= {"SLURM_ARRAY_TASK_ID": str(i), "PATH": os.environ["PATH"]}
        subprocess.run(["bash", script], env=env, check=True)
    said = (folder / "said.txt").read_text().splitlines()
    begin = (
        f"convert_ucf101.py --video_dir {folder}/my_videos --out_dir {folder}/converted --no-tqdm"
    )
    assert said == [
        f"{begin} --finish",
        f"{begin} --num_workers 16 --shard 0/2",
        f"{begin} --num_workers 16 --shard 1/2",
    ]


# ---- Ray ----


class Ray:
    def __init__(self, folder: str):
        words = [sys.executable, str(CLUSTER), folder]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
        self.address = self.process.stdout.readline().strip()
        assert self.address

    def node(self, what: str) -> None:
        """`kill` the second node, or `add` one again."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def workers(self) -> list[psutil.Process]:
        """The processes that have an item."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] == ["ray::task"]:
                    found.append(process)
        return found

    def close(self) -> None:
        processes = psutil.Process(self.process.pid).children(recursive=True)
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for process in [*processes, self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ray]:
    # The names of sockets may have about 100 letters, and pytest's folders have more.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:
        ray = Ray(name)
        yield ray
        ray.close()


HOOK = """
import os, time
from pathlib import Path

def read_frames(path, *args, read_frames=read_frames):
    with open({log!r}, "a") as file:
        print(path.stem, file=file)
    if "dies" in path.stem:
        os._exit(9)
    time.sleep(0.5 * ("slow" in path.stem))
    while "waits" in path.stem and not os.path.exists({go!r}):
        time.sleep(0.02)
    return read_frames(path, *args)
"""


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch) -> Path:
    """
    What the nodes get as phi3v, in place of this one: it writes to the file read.log which videos
    are decoded; one whose name says so kills its process, or waits for the file `go`. Without its
    __init__.py it imports neither torch nor transformers, which take 5 s of every worker.
    """
    package = tmp_path / "nodes" / "phi3v"
    shutil.copytree(engine.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "data/__init__.py"):
        (package / name).write_text("")
    (package / "errors.py").write_text(
        "class DataError(ValueError):\n    pass\n\n\nclass RunError(RuntimeError):\n    pass\n\n\n"
        "def one_line(error):\n    return str(error)\n"
    )
    hook = HOOK.format(log=str(tmp_path / "read.log"), go=str(tmp_path / "go"))
    with (package / "data/frame_folder.py").open("a") as file:
        file.write(hook)
    monkeypatch.setattr(engine, "PACKAGE", package)
    return package


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[str]]:
    def names() -> list[str]:
        path = tmp_path / "read.log"
        return path.read_text().split() if path.exists() else []

    return names


def convert_here(videos: Path, out: Path, monkeypatch) -> None:
    """By one machine, where a video may kill its process."""
    read_frames = frame_folder.read_frames

    def look(path: Path, *args):
        if "dies" in path.stem:
            os._exit(9)
        return read_frames(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(frame_folder, "read_frames", look)
        assert main(videos, out) == 1


@needs_ray
def test_ray_after_all_kinds_of_kills(
    tmp_path: Path, cluster, shipped, log, start, monkeypatch, capsys
):
    """
    The driver is killed; a second one goes on, and loses a worker process and a node. A video that
    kills its process costs itself only. The bytes and words are those of one machine, and what was
    done is not done again.
    """
    names = [*(f"A_{i}" for i in range(6)), "B_waits_1", "B_waits_2", "C_dies", "D_1"]
    videos, out = make_videos(tmp_path / "videos", *names), tmp_path / "out"
    (videos / "train/A/A_3.avi").write_text("no video")
    words = flags(videos, out, "--ray", cluster.address, "--num_workers", 8)
    first = start(words)
    waiting = {"B_waits_1", "B_waits_2"}
    wait_until(lambda: waiting <= set(log()) and len(noted(out)) == 5, SECONDS)
    workers = cluster.workers()
    assert len(workers) == 2
    first.process.kill()
    first.process.join()
    wait_until(lambda: not any(worker.is_running() for worker in workers), SECONDS)
    assert list(out.glob("*.jsonl")) == [out / "converted.jsonl"]
    (tmp_path / "read.log").unlink()

    second = start(words)
    wait_until(lambda: waiting <= set(log()), SECONDS)
    cluster.workers()[0].kill()
    wait_until(lambda: sum(name in waiting for name in log()) == 3, SECONDS)
    cluster.node("kill")
    time.sleep(1)
    (tmp_path / "go").touch()
    code, output = second.finish(SECONDS)
    cluster.node("add")
    assert code == 1, output
    assert not {"A_0", "A_1", "A_2", "A_4", "A_5"} & set(log())
    assert Counter(log())["C_dies"] == engine.MAX_DEAD_PROCESSES

    convert_here(videos, tmp_path / "one", monkeypatch)
    one = capsys.readouterr()
    assert "failed: train/C/C_dies.avi: its worker process died" in one.err
    words = (one.err + one.out).replace(str(tmp_path / "one"), str(out))
    assert set(words.splitlines()) <= set(output.splitlines())  # Ray tells of the kills, too
    assert tree(out) == tree(tmp_path / "one")


@needs_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ray_stops(tmp_path: Path, cluster, shipped, log, start, number: signal.Signals):
    """Ctrl-C and SIGTERM end the tasks on all nodes, with the exit codes of one machine."""
    videos, out = make_videos(tmp_path / "videos", "A_1", "B_waits"), tmp_path / "out"
    run = start(flags(videos, out, "--ray", cluster.address))
    wait_until(lambda: log() == ["A_1", "B_waits"], SECONDS)
    workers = cluster.workers()
    assert len(workers) == 1
    os.kill(run.process.pid, number)
    line = "convert_ucf101.py: stopped; the same command continues\n"
    assert run.finish(SECONDS) == ((130, line) if number == signal.SIGINT else (143, ""))
    wait_until(lambda: not workers[0].is_running(), SECONDS)
    assert noted(out) == ["A_1"]


@needs_ray
def test_ray_without_shared_storage(tmp_path: Path, cluster, shipped, log, start, monkeypatch):
    """A node that does not see the videos ends the run; it is named, and no video fails for it."""
    videos, out = make_videos(tmp_path / "videos", "A_1", "A_2"), tmp_path / "out"
    monkeypatch.setattr(frame_folder.os.path, "commonpath", lambda paths: tmp_path / "elsewhere")
    code, output = start(flags(videos, out, "--ray", cluster.address)).finish(SECONDS)
    start_of_line = f"convert_ucf101.py: error: the node {os.uname().nodename} does not see "
    assert code == 2 and output.startswith(f"{start_of_line}{tmp_path}/elsewhere: "), output
    assert output.count("\n") == 1
    assert not (out / "images").exists() and log() == []


@needs_ray
@pytest.mark.long
def test_ray_with_the_whole_package(tmp_path: Path, cluster, start):
    """As `shipped`, but with what the nodes get in earnest."""
    videos, out = make_videos(tmp_path / "videos", "A_1", "A_2", "B_3"), tmp_path / "out"
    code, output = start(flags(videos, out, "--ray", cluster.address)).finish(SECONDS)
    assert code == 0, output
    assert main(videos, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")


@needs_ray
@pytest.mark.long
def test_ray_after_random_kills(tmp_path: Path, cluster, shipped, log, start, seed: int):
    """Whatever is killed at whatever time, the same command ends with the bytes of one machine."""
    rng = random.Random(seed)
    names = [f"{'AB'[i % 2]}_{i:02d}{rng.choice(['', '_slow'])}" for i in range(40)]
    videos, out = make_videos(tmp_path / "videos", *names), tmp_path / "out"
    words = flags(videos, out, "--ray", cluster.address, "--num_workers", 8)
    kills = Counter()
    run, done = start(words), set()
    for _ in range(15):
        time.sleep(rng.uniform(1, 5))
        if not run.process.is_alive():
            break
        kind = rng.choice(["driver", "worker", "node"])
        kills[kind] += 1
        if kind == "driver":
            run.process.kill()
            run.process.join()
            assert not done & set(log())
            done = set(noted(out))
            (tmp_path / "read.log").unlink(missing_ok=True)
            run = start(words)
        elif kind == "worker" and (workers := cluster.workers()):
            with suppress(psutil.NoSuchProcess):
                rng.choice(workers).kill()
        elif kind == "node":
            cluster.node("kill")
            cluster.node("add")
    print(dict(kills))
    assert run.finish(SECONDS)[0] == 0
    assert not done & set(log())
    assert main(videos, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")


@needs_ray
def test_ray_that_does_not_answer(tmp_path: Path, start):
    """A wrong address is an error in seconds; Ray itself tries for minutes."""
    videos = make_videos(tmp_path / "videos", "A_1")
    code, output = start(flags(videos, tmp_path / "out", "--ray", "127.0.0.1:1")).finish()
    assert (code, output.count("\n")) == (2, 1)
    assert "cannot use Ray at 127.0.0.1:1: " in output and "Connection refused" in output
