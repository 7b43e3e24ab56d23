"""The converter: a video dataset -> frames and jsonl."""

import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import psutil
import pytest
from av.video.frame import PictureType
from PIL import Image

import convert_ucf101 as converter
from phi3v.data import frame_folder, video
from phi3v.data.manifest import PART
from phi3v.data.sampling import Sampling, Times

SCRIPT = Path(converter.__file__).resolve()
H264 = "libx264" if "libx264" in av.codecs_available else "mpeg4"
OWN_FILES = [".converted.lock", "converted.jsonl"]


def write_video(
    path: Path, num_frames: int = 10, codec: str = "mpeg4", b_frames: int = 0, title: str = ""
) -> Path:
    """A video of flat grey frames; frame i has the level 20 + 4 * i. Keyframes every 12 frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.gop_size = 12
        stream.codec_context.max_b_frames = b_frames
        if codec == "libx264":
            stream.options = {"b-adapt": "0", "sc_threshold": "0"}
        if path.suffix == ".avi":
            stream.codec_tag = "XVID"
        container.start_encoding()  # or a video without frames would be no file
        for index in range(num_frames):
            grey = np.full((48, 64, 3), 20 + 4 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
        container.mux(stream.encode())
    return path


def level(pixels: np.ndarray) -> int:
    """Which frame of `write_video` this is."""
    return round((pixels.mean() - 20) / 4)


def picked(path: Path, num_frames: int = 8) -> list[int]:
    """Which frames of a video `read_frames` returns."""
    frames, _ = video.read_frames(path, Sampling(num_frames))
    return [level(frame.to_ndarray(format="rgb24")) for frame in frames]


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their bytes."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def records(out_dir: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out_dir / f"ucf101_{split}.jsonl").open()]


def flags(source: Path, out_dir: Path, *more: object) -> list[str]:
    kind = "--video_dir" if source.is_dir() else "--archive"
    words = [kind, source, "--out_dir", out_dir, "--tmp_dir", out_dir.parent / "tmp"]
    return [str(word) for word in (*words, "--num_workers", 1, "--no-tqdm", *more)]


def main(source: Path, out_dir: Path, *more: object) -> int:
    return converter.main(flags(source, out_dir, *more))


def make_tar(path: Path, folder: Path, name: str = "UCF101_subset", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, name)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """2 + 1 + 2 videos; class C is in test only, B not in val."""
    root = tmp_path / "videos"
    write_video(root / "train" / "B" / "b 1.avi")
    write_video(root / "train" / "A" / "a1.avi")
    write_video(root / "val" / "A" / "a2.MP4", codec=H264)
    write_video(root / "test" / "C" / "c1.avi")
    write_video(root / "test" / "A" / "ä.3.mkv")
    return root


STEMS = ["train/A/a1", "train/B/b 1", "val/A/a2", "test/A/ä.3", "test/C/c1"]  # in order


@pytest.fixture
def read(tmp_path: Path, monkeypatch) -> Callable[[], list[str]]:
    """
    The names of the videos that were decoded since the last call. Those whose name says so kill
    their worker, hang, or take a while; the workers are forks of this process.
    """
    log, read_frames = tmp_path / "read.log", frame_folder.read_frames

    def look(path: Path, sampling: Sampling):
        with log.open("a") as file:
            print(path.stem, file=file)
        if "dies" in path.stem:
            os._exit(9)
        time.sleep(60 * ("hangs" in path.stem) + 0.3 * ("late" in path.stem))
        return read_frames(path, sampling)

    def names() -> list[str]:
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return sorted(text.splitlines())

    monkeypatch.setattr(frame_folder, "read_frames", look)
    return names


class Run:
    """`python convert_ucf101.py ...` in a process of its own, forked: the imports take seconds."""

    def __init__(self, tmp_path: Path, words: list[str]):
        self.output = tmp_path / f"output{time.monotonic_ns()}"
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self._script, args=(words,))
        self.process.start()

    def _script(self, words: list[str]) -> None:
        os.setsid()
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(i, "w"), "ascii") for i in (1, 2))
        # In the background of a shell, the processes of a test would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [str(SCRIPT), *words]
        runpy.run_path(str(SCRIPT), run_name="__main__")

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def finish(self, seconds: int = 30) -> tuple[int, str]:
        """The exit code and the output."""
        self.process.join(seconds)
        return self.process.exitcode, self.output.read_text()


def wait_until(condition: Callable[[], bool], seconds: int = 20) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def manifest_lines(out_dir: Path) -> int:
    path = out_dir / "converted.jsonl"
    return path.read_text().count('"warning"') if path.exists() else 0


# ---- The result ----


def test_tree_and_jsonl(videos: Path, tmp_path: Path):
    """Names, order, ids, prompt and the very bytes of the jsonl are what the recipe reads."""
    (videos / "train/A/._a1.avi").write_text("written by macOS, not a video")
    (videos / "train/Empty").mkdir()
    for folder in (".thumbnails", "__MACOSX"):
        shutil.copytree(videos / "train/A", videos / "train" / folder)
    out = tmp_path / "out"
    assert main(videos, out) == 0

    images = [f"images/{stem}.{i}.jpg" for stem in STEMS for i in range(8)]
    jsonl = [f"ucf101_{split}.jsonl" for split in ("train", "val", "test")]
    assert sorted(tree(out)) == sorted(images + jsonl + OWN_FILES)
    with Image.open(out / images[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 48))

    ids = ["train-0000000000", "train-0000000001", "val-0000000002"]
    ids += ["test-0000000003", "test-0000000004"]
    found = [record for split in ("train", "val", "test") for record in records(out, split)]
    user = "Classify the video into one of the following classes: A, B, C."
    for record, id, stem in zip(found, ids, STEMS, strict=True):
        frames = [f"{stem}.{i}.jpg" for i in range(8)]
        turn = {"images": frames, "user": user, "assistant": stem.split("/")[1]}
        assert record == {"id": id, "source": "ucf101", "conversations": [turn]}
    assert (out / "ucf101_val.jsonl").read_bytes() == (
        b'{"id": "val-0000000002", "source": "ucf101", "conversations": [{"images": ['
        + b", ".join(b'"val/A/a2.%d.jpg"' % i for i in range(8))
        + b'], "user": "Classify the video into one of the following classes: A, B, C.", '
        b'"assistant": "A"}]}\n'
    )


def test_same_bytes_for_any_number_of_workers(videos: Path, tmp_path: Path, read):
    """Runs can be compared and resumed: neither chance nor the order of the workers shows."""
    write_video(videos / "train/A/a0_late.avi")
    outs = [tmp_path / f"out{workers}" for workers in (1, 2, 3)]
    for workers, out in enumerate(outs, start=1):
        assert main(videos, out, "--num_workers", workers) == 0
    assert len(tree(outs[0])) == 6 * 8 + 3 + len(OWN_FILES)
    assert tree(outs[0]) == tree(outs[1]) == tree(outs[2])


def test_command(videos: Path, tmp_path: Path):
    """On an ASCII terminal, too, the user sees problems, counts and the next command."""
    shutil.copy(videos / "train/A/a1.avi", videos / "train/A" / os.fsdecode(b"caf\xe9.avi"))
    code, output = Run(tmp_path, flags(videos, tmp_path / "é è")).finish()
    assert code == 1, output
    assert r"failed: train/A/caf\udce9.avi: its name is not UTF-8" in output
    assert "Traceback" not in output
    assert f"train: 2 videos, 1 failed -> {tmp_path}/\\xe9 \\xe8/ucf101_train.jsonl" in output
    assert f"finetune_hf_trainer_ucf101.py --data_dir '{tmp_path}/\\xe9 \\xe8'\n" in output


# ---- Which frames ----


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [("v.avi", "mpeg4", 0), ("v.avi", "mpeg4", 2), ("v.mp4", H264, 3), ("v.mkv", H264, 3)],
)
@pytest.mark.parametrize("num_frames", [8, 21, 50])
def test_frames_are_evenly_spaced(tmp_path: Path, name, codec, b_frames, num_frames):
    """Frame floor(i * n / 8) in the order of display, with and without B-frames."""
    path = write_video(tmp_path / name, num_frames, codec, b_frames)
    assert picked(path) == [i * num_frames // 8 for i in range(8)]
    with av.open(str(path)) as container:
        types = {frame.pict_type for frame in container.decode(video=0)}
    assert (PictureType.B in types) == (b_frames > 0)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_num_frames_and_short_videos(tmp_path: Path, count: int):
    """--num_frames is obeyed, and a video with fewer frames repeats them."""
    write_video(tmp_path / "videos/val/A/v.avi", 3)
    assert main(tmp_path / "videos", tmp_path / "out", "--num_frames", count) == 0
    (record,) = records(tmp_path / "out", "val")
    images = [tmp_path / "out/images" / name for name in record["conversations"][0]["images"]]
    shown = [level(np.asarray(Image.open(image))) for image in images]
    assert shown == [i * 3 // count for i in range(count)]


def test_header_lies(tmp_path: Path):
    """A cut-off file counts the frames that are there, not those that its header promises."""
    path = write_video(tmp_path / "v.avi", 50)
    with av.open(str(path)) as container:
        cut = [packet.pos for packet in container.demux(video=0)][30]
    os.truncate(path, cut)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 50
    assert picked(path) == [i * 30 // 8 for i in range(8)]


@pytest.mark.skipif(H264 == "mpeg4", reason="needs libx264")
def test_packets_lie(tmp_path: Path):
    """A stream that starts between keyframes has packets that give no frame: frames count."""
    whole = write_video(tmp_path / "whole.mkv", 40, H264)
    with av.open(str(whole)) as old, av.open(str(tmp_path / "v.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.size]
        for packet in packets[1:]:  # frames 1 to 11 need the keyframe that is gone
            packet.stream = stream
            new.mux(packet)
    _, guesses = video.survey(tmp_path / "v.mkv")
    assert [len(times.ticks) for times in guesses] == [37, 38, 39, 40, 41]
    assert picked(tmp_path / "v.mkv") == [12 + i * 28 // 8 for i in range(8)]


@pytest.mark.parametrize("guess", [0, 18, 22, 40, 1000])
def test_result_does_not_depend_on_the_guess(tmp_path: Path, monkeypatch, guess: int):
    """One decoding or two give the same frames, and only a bad guess costs a second one."""
    path = write_video(tmp_path / "v.mp4", 20, H264, b_frames=2)
    decode, calls = video.decode, []
    monkeypatch.setattr(video, "decode", lambda *args: calls.append(args) or decode(*args))
    near = [Times(range(guess + i), Fraction(1, 25)) for i in range(-2, 3)]
    monkeypatch.setattr(video, "survey", lambda path: (None, near))
    assert picked(path) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert len(calls) == (1 if 18 <= guess <= 22 else 2)


def test_huge_frames(tmp_path: Path, monkeypatch):
    """Frames that would fill the memory are not decoded."""
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="its frames of 64 x 48 are larger than 8K"):
        video.read_frames(write_video(tmp_path / "v.avi"), Sampling())


def by_hand(times: list[float], fps: float) -> list[int]:
    """The frame on the screen at 0, 1 / fps, 2 / fps, ..., each once."""
    ticks = np.arange(0, times[-1] - times[0] + 1e-9, 1 / fps) + times[0] + 1e-9
    return sorted({max(i for i, time in enumerate(times) if time <= tick) for tick in ticks})


@pytest.mark.parametrize("fps", ["1", "0.3", "10", "25", "30000/1001", "100"])
@pytest.mark.parametrize("step", [lambda i: 40, lambda i: 1 + 37 * i % 101, lambda i: 3000])
def test_fps(fps: str, step: Callable[[int], int]):
    """Which frames --fps takes: by time stamps, at any rate of the video, none twice."""
    stamps = np.cumsum([7000, *map(step, range(59))]).tolist()
    times = Times.of_frames(stamps, Fraction(1, 1000), Fraction(1, 25))
    expected = by_hand([stamp / 1000 for stamp in stamps], float(Fraction(fps)))
    assert Sampling(8, Fraction(fps), 1000).choose(times) == expected
    few = Sampling(8, Fraction(fps), 5).choose(times)
    count = min(5, len(expected))
    assert few == [expected[i * len(expected) // count] for i in range(count)]


@pytest.mark.parametrize("stamps", [[0, 1, None, 3], [0, 2, 1, 3], [0, 1, 1, 2]])
def test_fps_without_time_stamps(stamps: list):
    """Where stamps are missing or do not rise, the average rate counts."""
    times = Times.of_frames(stamps, Fraction(1, 100), Fraction(1, 2))
    assert Sampling(8, Fraction(1), 9).choose(times) == [0, 2]


@pytest.mark.parametrize("name", ["v.avi", "v.mp4", "v.mkv", "v.ts"])
def test_fps_of_files(tmp_path: Path, monkeypatch, name: str):
    """In every container a second has 25 frames, and no file is decoded twice."""
    path = write_video(tmp_path / name, 56, "mpeg4" if name == "v.avi" else H264, b_frames=2)
    decode, calls = video.decode, []
    monkeypatch.setattr(video, "decode", lambda *args: calls.append(args) or decode(*args))
    frames, warning = video.read_frames(path, Sampling(fps=Fraction(5, 2), max_frames=4))
    assert [level(frame.to_ndarray(format="rgb24")) for frame in frames] == [0, 10, 30, 40]
    assert warning == "" and len(calls) <= 1


# ---- Bad videos ----


def damage_last_packet(path: Path) -> None:
    with av.open(str(path)) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
        position, size = last.pos, last.size
    data = path.read_bytes()
    path.write_bytes(data[:position] + b"\xff" * size + data[position + size :])


def test_bad_videos(videos: Path, tmp_path: Path, capsys):
    """Every kind of bad file is named with its reason; the others keep their frames and ids."""
    folder = videos / "train/A"
    for suffix, codec in (("avi", "mpeg4"), ("mkv", H264), ("mp4", H264)):
        whole = write_video(folder / f"half.{suffix}", 50, codec)
        os.truncate(whole, whole.stat().st_size // 2)
        whole.rename(folder / f"half_{suffix}.{suffix}")
    damage_last_packet(write_video(folder / "packet.mov", 24))
    write_video(folder / "title.mkv", title="0123456789")
    data = (folder / "title.mkv").read_bytes().replace(b"0123456789", b"caf\xe9 cr\xe8me")
    (folder / "title.mkv").write_bytes(data)
    write_video(folder / "one.avi", 1)
    write_video(folder / "zero_frames.avi", 0)
    (folder / "empty.avi").touch()
    (folder / "text.avi").write_text("no video")
    (folder / "notes.txt").write_text("no video")
    write_video(folder.parent / "stray.avi")
    (folder / "folder.avi").mkdir()
    (folder / "nowhere.avi").symlink_to("gone.avi")
    with (folder / "sparse.avi").open("wb") as file:
        file.truncate(1 << 40)
    write_video(folder / ("long" * 62 + "abc.avi"))
    os.mkfifo(folder / "pipe.avi")
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with av.open(str(folder / "gif.mp4"), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())

    assert main(videos, tmp_path / "out", "--num_workers", 2) == 1
    captured = capsys.readouterr()
    reasons = {
        "failed: train/A/audio.mp4": "no video stream",
        "failed: train/A/empty.avi": "Invalid data",
        "failed: train/A/folder.avi": "not a regular file",
        "failed: train/A/gif.mp4": "its format is none of asf,avi,",
        "failed: train/A/half_mp4.mp4": "Invalid data",
        f"failed: train/A/{'long' * 62}abc.avi": "its name is too long",
        "failed: train/A/nowhere.avi": "not a regular file",
        "failed: train/A/pipe.avi": "not a regular file",
        "failed: train/A/sparse.avi": "larger than --max_video_gb 1",
        "failed: train/A/text.avi": "Invalid data",
        "failed: train/A/zero_frames.avi": "no frame can be decoded",
        "ignored": "2 files: train/A/notes.txt, train/stray.avi",
        "warning: train/A/half_avi.avi": "cut off: about 50 frames promised",
        "warning: train/A/half_mkv.mkv": "cut off: about 50 frames promised",
        "warning: train/A/one.avi": "frames repeat: it has 1, fewer than 8",
        "warning: train/A/packet.mov": "1 damaged packets skipped",
    }
    lines = captured.err.splitlines()
    assert len(lines) == len(reasons)
    for start, reason in reasons.items():
        assert any(line.startswith(f"{start}: ") and reason in line for line in lines), start

    good = ["a1", "half_avi", "half_mkv", "one", "packet", "title", "b 1"]
    found = records(tmp_path / "out", "train")
    ids = {Path(record["conversations"][0]["images"][0]).stem: record["id"] for record in found}
    assert list(ids) == [f"{stem}.0" for stem in good]
    assert len(tree(tmp_path / "out/images")) == (len(good) + 3) * 8
    # The numbers of the failed ones stay unused.
    names = sorted(path.stem for path in folder.iterdir() if path.suffix != ".txt")
    assert ids["title.0"] == f"train-{names.index('title'):010d}"
    assert f"train: {len(good)} videos, 11 failed" in captured.out


def playlists(outside: str) -> dict[str, str]:
    """Text files that make ffmpeg open other files."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    return {
        "list.m3u8": hls.format(f"{outside}/marker.ts"),
        "concat.mp4": f"ffconcat version 1.0\nfile {outside}/marker.avi\n",
        "concat_hls.avi": "ffconcat version 1.0\nfile list.m3u8\n",
        "concat_beside.mov": "ffconcat version 1.0\nfile good.avi\n",
        "hls.mp4": hls.format(f"{outside}/marker.ts"),
        "dash.mp4": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        f"<AdaptationSet><Representation><BaseURL>{outside}/marker.avi</BaseURL>"
        "</Representation></AdaptationSet></Period></MPD>",
    }


@pytest.mark.parametrize("formats", ["", ",concat,hls,dash"])
def test_no_other_file_is_opened(tmp_path: Path, capsys, monkeypatch, formats: str):
    """A list of files that is named like a video brings none of them into the dataset."""
    folder = tmp_path / "videos/train/A"
    write_video(folder / "good.avi")
    for suffix in ("avi", "ts"):
        write_video(tmp_path / f"outside/marker.{suffix}")
    texts = playlists(os.path.relpath(tmp_path / "outside", folder))
    for name, text in texts.items():
        (folder / name).write_text(text)
    # The second lock holds on its own.
    options = video.ONE_FILE | {"format_whitelist": video.CONTAINERS + formats}
    monkeypatch.setattr(video, "ONE_FILE", options)
    assert main(tmp_path / "videos", tmp_path / "out") == 1
    error = capsys.readouterr().err
    bad = [name for name in texts if not name.endswith(".m3u8")]
    assert all(f"failed: train/A/{name}: " in error for name in bad)
    (record,) = records(tmp_path / "out", "train")
    assert record["conversations"][0]["images"] == [f"train/A/good.{i}.jpg" for i in range(8)]


def test_worker_dies(tmp_path: Path, capsys, read):
    """A crash in a decoder costs that video only, not the run and not the videos beside it."""
    names = [f"v{i:02d}{'_dies' if i in (1, 7) else ''}" for i in range(12)]
    for name in names:
        write_video(tmp_path / f"videos/train/A/{name}.avi")
    assert main(tmp_path / "videos", tmp_path / "out", "--num_workers", 2) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"failed: train/A/v{i:02d}_dies.avi: its worker process died" for i in (1, 7)
    ]
    ids = [record["id"] for record in records(tmp_path / "out", "train")]
    assert ids == [f"train-{i:010d}" for i in range(12) if i not in (1, 7)]


def test_strict(videos: Path, tmp_path: Path, capsys):
    """The first bad file stops the run; once it is repaired the same command continues."""
    out, bad = tmp_path / "out", videos / "train/B/b 1.avi"
    good = bad.read_bytes()
    bad.write_bytes(good[:3000])
    assert main(videos, out, "--strict") == 1
    assert capsys.readouterr().err.startswith("failed: train/B/b 1.avi: ")
    assert list(out.glob("*.jsonl")) == [out / "converted.jsonl"]
    assert (out / "images/train/A/a1.7.jpg").exists()
    bad.write_bytes(good)
    (videos / "test/C/notes.txt").touch()
    assert main(videos, out, "--strict") == 1
    assert capsys.readouterr().err.startswith("ignored: 1 files: test/C/notes.txt\n")
    (videos / "test/C/notes.txt").unlink()
    assert main(videos, out, "--strict") == 0
    assert main(videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")


# ---- To stop and to continue ----


@pytest.mark.parametrize(
    ("workers", "lines", "left"), [(1, 3, ["a2", "b", "c1", "ä.3"]), (2, 5, ["b", "c1"])]
)
def test_continues_after_a_kill(
    videos: Path, tmp_path: Path, read, workers: int, lines: int, left: list[str]
):
    """
    What a killed run completed is not decoded again, nor what came after a video that took long;
    the result is that of a run in peace.
    """
    hangs = write_video(videos / "test/A/b_hangs.avi")
    out = tmp_path / "out"
    run = Run(tmp_path, flags(videos, out, "--num_workers", workers))
    wait_until(lambda: manifest_lines(out) == lines)
    pids = run.workers()
    assert len(pids) == workers
    run.process.kill()
    assert run.finish()[0] == -9
    wait_until(lambda: not any(worker.is_running() for worker in pids))
    assert list(out.glob("*.jsonl")) == [out / "converted.jsonl"]
    assert not list(out.rglob("*.part"))
    # The kill may also come while a line is written, the last one, or an image.
    os.truncate(out / "converted.jsonl", (out / "converted.jsonl").stat().st_size - 5)
    (out / "images/test/C").mkdir(parents=True, exist_ok=True)
    (out / "images/test/C" / PART.format("killed")).write_bytes(b"\xff\xd8")
    hangs.rename(videos / "test/A/b.avi")
    read()
    assert main(videos, out, "--num_workers", workers) == 0
    assert read() == left
    assert main(videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals(videos: Path, tmp_path: Path, capsys, read, number: signal.Signals):
    """
    Ctrl-C and SIGTERM leave no process, lock or temporary file, and no traceback. Until then a
    second converter for the same folder stops at once.
    """
    hangs = [write_video(videos / f"val/A/{name}_hangs.avi") for name in "ab"]
    archive, out = make_tar(tmp_path / "videos.tar", videos), tmp_path / "out"
    run = Run(tmp_path, flags(archive, out, "--num_workers", 2))
    wait_until(lambda: manifest_lines(out) == 3)
    pids = run.workers()
    assert len(pids) == 2 and list((tmp_path / "tmp").iterdir())
    assert main(archive, out) == 2
    assert f"another run is writing to {out}" in capsys.readouterr().err
    kill = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches the workers, too
    kill(run.process.pid, number)
    code, output = run.finish()
    line = "convert_ucf101.py: stopped; the same command continues\n"
    assert (code, output) == ((130, line) if number == signal.SIGINT else (143, ""))
    assert not any(worker.is_running() for worker in pids)
    assert not list((tmp_path / "tmp").iterdir())
    assert list(out.glob("*.jsonl")) == [out / "converted.jsonl"]
    for path in hangs:
        path.unlink()
    assert main(videos, out) == 0


def test_all_done(videos: Path, tmp_path: Path, read, capsys):
    """A second run decodes nothing; its warnings and its files are those of the first."""
    out = tmp_path / "out"
    write_video(videos / "train/A/short.avi", 3)
    assert main(videos, out) == 0
    assert len(read()) == 6
    first, files = capsys.readouterr(), tree(out)
    assert main(videos, out) == 0
    assert read() == []
    assert capsys.readouterr() == first and "short.avi: frames repeat" in first.err
    assert tree(out) == files


STALE = {
    "image deleted": lambda videos, out: (out / "images/train/A/a1.3.jpg").unlink(),
    "image torn": lambda videos, out: os.truncate(out / "images/train/A/a1.3.jpg", 500),
    "image of another": lambda videos, out: shutil.copy(
        out / "images/train/B/b 1.7.jpg", out / "images/train/A/a1.0.jpg"
    ),
    "video changed": lambda videos, out: write_video(videos / "train/A/a1.avi", 20),
}


@pytest.mark.parametrize("kind", STALE)
def test_stale_images(videos: Path, tmp_path: Path, read, kind: str):
    """What does not fit is made anew, and only that; the result is that of a fresh run."""
    out = tmp_path / "out"
    write_video(videos / "train/B/b 1.avi", 30)
    assert main(videos, out) == 0
    STALE[kind](videos, out)
    read()
    assert main(videos, out) == 0
    assert read() == ["a1"]
    assert main(videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")


def test_other_settings_and_videos(videos: Path, tmp_path: Path, monkeypatch, read):
    """Frames of other settings, versions or videos are not mixed with those of this run."""
    out = tmp_path / "out"
    assert main(videos, out, "--num_frames", 12) == 0
    (out / "images/test/C/own.0.jpg").touch()
    shutil.rmtree(videos / "test/C")
    assert main(videos, out) == 0
    (out / "images/test/C/own.0.jpg").unlink()  # what is not of this script stays
    assert main(videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")
    read()
    monkeypatch.setattr(frame_folder, "MADE_BY", "another version")
    assert main(videos, out) == 0
    assert len(read()) == 4


def test_fps_and_resume(tmp_path: Path, read):
    """Each video has its number of images. Other flags make anew what they change, and remove."""
    root, out = tmp_path / "videos", tmp_path / "out"
    for name, count in (("a", 1), ("b", 26), ("c", 56)):
        write_video(root / f"val/A/{name}.mp4", count, H264)

    def images(*more: object) -> list[int]:
        assert main(root, out, *more) == 0
        found = [record["conversations"][0]["images"] for record in records(out, "val")]
        for stem, names in zip("abc", found, strict=True):
            assert names == [f"val/A/{stem}.{i}.jpg" for i in range(len(names))]
        assert sorted(tree(out / "images")) == sorted(name for names in found for name in names)
        return [len(names) for names in found]

    assert images("--fps", 10) == [1, 11, 23]
    assert read() == ["a", "b", "c"]
    assert images("--fps", "20/2", "--max_frames", 32) == [1, 11, 23]
    assert read() == []
    assert images("--fps", 10, "--max_frames", 8) == [1, 8, 8]
    assert read() == ["a", "b", "c"]
    before = tree(out / "images")
    assert images() == [8, 8, 8]  # as many files, of other frames
    assert read() == ["a", "b", "c"] and tree(out / "images") != before
    assert images("--fps", 0.5) == [1, 1, 2]
    (out / "images/val/A/c.1.jpg").unlink()
    read()
    assert images("--fps", 0.5) == [1, 1, 2]
    assert read() == ["c"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--fps", "0"], "not above 0"),
        (["--fps", "1/0"], "not above 0"),
        (["--fps", "-1"], "not above 0"),
        (["--fps", "fast"], "invalid rate value"),
        (["--fps", "1", "--num_frames", "4"], "not allowed with"),
        (["--max_frames", "4"], "--max_frames needs --fps"),
        (["--fps", "1", "--max_frames", "0"], "not from 1 to 1000"),
    ],
)
def test_bad_flags(capsys, words: list[str], why: str):
    """Rates that mean nothing, and flags that exclude each other, stop before the work starts."""
    with pytest.raises(SystemExit, match="2"):
        converter.main(words)
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a1.3.jpg", "ucf101_test.jsonl"])
def test_full_disk(videos: Path, tmp_path: Path, monkeypatch, capsys, name: str):
    """One message with the path, nothing half written, and the same command continues."""
    out, replace = tmp_path / "out", Path.replace

    def fails(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        assert main(videos, out) == 2
    assert f"{name}: No space left on device. When that" in capsys.readouterr().err
    assert not list(out.rglob("*.part"))
    assert main(videos, out) == 0
    assert main(videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")


# ---- Sources ----


@pytest.mark.parametrize(
    ("root", "mode"), [("UCF101_subset", "w"), (".", "w:gz"), ("a/b", "w:bz2"), ("a", "w:xz")]
)
def test_archive(videos: Path, tmp_path: Path, root: str, mode: str):
    """Plain or compressed, below any folder: the archive gives what the folder gives."""
    archive = tmp_path / "UCF101_subset.tar.gz"  # also when it is neither: the hub's is plain
    with tarfile.open(archive, mode) as tar:
        tar.add(videos, root)
        tar.add(videos, "__MACOSX/a")
    assert main(archive, tmp_path / "out") == 0
    assert main(videos, tmp_path / "expected") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert list((tmp_path / "tmp").iterdir()) == []  # nothing stays behind


def test_download(videos: Path, tmp_path: Path, monkeypatch, capsys):
    """Without a source the hub's archive is fetched; offline, the message names the ways out."""
    archive, calls = make_tar(tmp_path / "hub.tar", videos), []

    def download(**kwargs) -> str:
        calls.append(kwargs)
        return str(archive)

    def offline(**kwargs) -> str:
        raise ConnectionError("no route to the hub")

    words = ["--out_dir", str(tmp_path / "out"), "--tmp_dir", str(tmp_path / "tmp"), "--no-tqdm"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert converter.main(words) == 0
    repo = {"repo_id": "sayakpaul/ucf101-subset", "repo_type": "dataset"}
    assert calls == [repo | {"filename": "UCF101_subset.tar.gz"}]
    assert len(records(tmp_path / "out", "train")) == 2
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert converter.main(words) == 2
    error = capsys.readouterr().err
    assert "no route to the hub" in error and "--archive" in error and "--video_dir" in error


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


BAD_MEMBERS = {
    "parent": [member("UCF101_subset/train/../../../evil.avi")],
    "absolute": [member("/{outside}/evil.avi")],
    "link": [member("UCF101_subset/link", tarfile.SYMTYPE, "../../../outside")],
    "chain of links": [
        member("d", tarfile.SYMTYPE, "."),
        member("d/e", tarfile.SYMTYPE, "d/.."),
        member("e/../evil.avi"),
    ],
    "huge": [member("UCF101_subset/train/A/huge.avi", size=(1 << 30) + 1)],
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_bad_archive_is_refused(videos: Path, tmp_path: Path, capsys, kind: str):
    """No member of an archive gets out of its folder or fills the disk, and nothing stays of it."""
    archive, outside = tmp_path / "bad.tar", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.avi").write_bytes(b"secret")
    with tarfile.open(archive, "w") as tar:
        tar.add(videos, "UCF101_subset")
        for info in BAD_MEMBERS[kind]:
            header = info.replace(name=info.name.format(outside=outside)).tobuf()
            tar.fileobj.write(header)
            tar.offset += len(header)
    before = tree(tmp_path)
    assert main(archive, tmp_path / "out") == 2
    assert f"error: {archive} cannot be extracted" in capsys.readouterr().err
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


def damage_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-1].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)


BROKEN = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "header": damage_header,
    "missing": Path.unlink,
    "device": lambda path: path.unlink() or path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_archive(videos: Path, tmp_path: Path, capsys, kind: str):
    """A broken archive is an error with its name, not a traceback and not a smaller dataset."""
    archive = make_tar(tmp_path / "broken.tar", videos)
    BROKEN[kind](archive)
    assert converter.main(flags(archive, tmp_path / "out")) == 2
    assert f"{archive} cannot be extracted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and tree(tmp_path / "tmp") == {}


@pytest.mark.parametrize("layout", ["missing", "empty", "train/a.avi", "A/a.avi", "dev/A/a.avi"])
def test_folder_without_videos(tmp_path: Path, capsys, layout: str):
    """A wrong folder is answered with what was expected and what is there."""
    root, out = tmp_path / "videos", tmp_path / "out"
    if layout != "missing":
        root.mkdir()
    if layout.endswith(".avi"):
        write_video(root / layout)
    assert converter.main(["--video_dir", str(root), "--out_dir", str(out)]) == 2
    error = capsys.readouterr().err
    assert "Expected: {train,val,test}/<class>/<video>" in error
    found = {"missing": "nothing", "empty": "nothing"}.get(layout, layout[:5])
    assert found in error.split("Found:")[1]
    assert not out.exists()


@pytest.mark.parametrize("name", ["<|end|>", "a<s>", "A ", "  ", "a, b", "a\nb", "caf\udce9"])
def test_class_names(videos: Path, tmp_path: Path, capsys, name: str):
    """A class that the recipe would refuse or confuse stops the run before the work starts."""
    write_video(videos / "val" / name / "v.avi")
    assert main(videos, tmp_path / "out") == 2
    assert f"rename the class folder {name!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_videos_of_one_name(videos: Path, tmp_path: Path, capsys):
    """a1.avi and a1.mp4 would overwrite each other's frames: an error before anything is done."""
    write_video(videos / "train/A/a1.mp4")
    assert main(videos, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "train/A/a1.avi" in error and "train/A/a1.mp4" in error
    assert not (tmp_path / "out").exists()


OTHERS_WORK = {
    "jsonl": lambda out: (out / "ucf101_val.jsonl").write_text("{}\n"),
    "image": lambda out: write_video(out / "images/train/A/a1.0.jpg.avi"),
    "link": lambda out: (out / "images").symlink_to("elsewhere"),
    "pipe": lambda out: os.mkfifo(out / "ucf101_train.jsonl"),
    "manifest": lambda out: (out / "converted.jsonl").write_text("{}\n"),
}


@pytest.mark.parametrize("kind", OTHERS_WORK)
def test_work_of_others_is_not_replaced(videos: Path, tmp_path: Path, capsys, kind: str):
    """An --out_dir that holds a dataset of the user's own is refused, and stays as it is."""
    out = tmp_path / "out"
    out.mkdir()
    OTHERS_WORK[kind](out)
    before = {path: path.lstat() for path in out.rglob("*")}
    assert main(videos, out) == 2
    assert "choose another --out_dir" in capsys.readouterr().err
    assert {path: path.lstat() for path in out.rglob("*")} == before


def test_edited_jsonl_is_not_replaced(videos: Path, tmp_path: Path, capsys):
    """What somebody has changed in a jsonl since it was written stays."""
    out = tmp_path / "out"
    assert main(videos, out) == 0
    text = (out / "ucf101_val.jsonl").read_text().replace("Classify the", "What is in this")
    (out / "ucf101_val.jsonl").write_text(text)
    before = tree(out)
    assert main(videos, out) == 2
    assert f"{out}/ucf101_val.jsonl is not as this script wrote it" in capsys.readouterr().err
    assert tree(out) == before
    (out / "ucf101_val.jsonl").rename(tmp_path / "mine.jsonl")
    assert main(videos, out) == 0
