"""convert_ucf101.py: a video dataset -> frames and jsonl."""

import fcntl
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from functools import partial
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image, ImageOps

import convert_ucf101 as converter

SCRIPT = Path(converter.__file__).resolve()
H264 = "libx264" if "libx264" in av.codecs_available else "mpeg4"


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


def write_packets(path: Path, source: Path, start: int) -> Path:
    """A copy of a video without its first `start` packets."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.size]
        for packet in packets[start:]:
            packet.stream = stream
            new.mux(packet)
    return path


def shown(path: Path, num_frames: int = 8) -> list[int]:
    """Which frames of the video the JPEGs show, told from their grey level."""
    images = [Image.open(path.with_name(f"{path.name}.{i}.jpg")) for i in range(num_frames)]
    assert {image.format for image in images} == {"JPEG"}
    assert {(image.mode, image.size) for image in images} == {("RGB", (64, 48))}
    return [round((np.asarray(image).mean() - 20) / 4) for image in images]


def picked(path: Path, num_frames: int = 8) -> list[int]:
    """The same for the frames that pick_frames returns."""
    frames, _ = converter.pick_frames(path, num_frames)
    return [round((frame.to_ndarray(format="rgb24").mean() - 20) / 4) for frame in frames]


def header_and_packets(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.frames, sum(packet.size > 0 for packet in container.demux(stream))


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their bytes."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Beside the images and the jsonl.
OWN_FILES = [".convert_ucf101", ".convert_ucf101.sha256"]


def records(out_dir: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out_dir / f"ucf101_{split}.jsonl").open()]


def run(*args: object, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), *map(str, args), "--no-tqdm"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def main(source: str, path: Path, out_dir: Path, *args: object) -> int:
    flags = [f"--{source}", path, "--out_dir", out_dir, "--tmp_dir", out_dir.parent / "tmp"]
    flags += ["--num_workers", 1, "--no-tqdm", *args]
    return converter.main([str(flag) for flag in flags])


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")  # where nobody collects it, a process that ended stays
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")


# The converter, with videos that behave as their names say. Workers import it anew.
WORKER_SCRIPT = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import convert_ucf101

original = convert_ucf101.convert_video

def convert_video(video, **kwargs):
    if "dies" in video.path.stem:
        os._exit(9)
    if "late" in video.path.stem:
        time.sleep(1)
    if "sleeps" in video.path.stem:
        video.path.with_suffix(f".pid{{os.getpid()}}").touch()
        time.sleep(60)
    return original(video, **kwargs)

convert_ucf101.convert_video = convert_video
if __name__ == "__main__":
    sys.exit(convert_ucf101.main())
"""


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


# ---- The result ----


def test_tree_and_jsonl(videos: Path, tmp_path: Path):
    """Names, order, ids, prompt and the very bytes of the jsonl are what the recipe reads."""
    (videos / "train" / "A" / "notes.txt").write_text("not a video")
    (videos / "train" / "A" / "._a1.avi").write_text("written by macOS, not a video")
    (videos / "train" / "Empty").mkdir()
    for folder in (".ipynb_checkpoints", ".thumbnails", "__MACOSX"):
        shutil.copytree(videos / "train/A", videos / "train" / folder)
    out = tmp_path / "out"
    assert main("video_dir", videos, out) == 0

    stems = ["train/A/a1", "train/B/b 1", "val/A/a2", "test/A/ä.3", "test/C/c1"]
    images = [f"images/{stem}.{i}.jpg" for stem in stems for i in range(8)]
    jsonl = [f"ucf101_{split}.jsonl" for split in ("train", "val", "test")]
    assert sorted(tree(out)) == sorted(images + jsonl + OWN_FILES)

    ids = ["train-0000000000", "train-0000000001", "val-0000000002"]
    ids += ["test-0000000003", "test-0000000004"]
    found = [record for split in ("train", "val", "test") for record in records(out, split)]
    assert [record["id"] for record in found] == ids
    assert found == [
        {
            "id": id,
            "source": "ucf101",
            "conversations": [
                {
                    "images": [f"{stem}.{i}.jpg" for i in range(8)],
                    "user": "Classify the video into one of the following classes: A, B, C.",
                    "assistant": stem.split("/")[1],
                }
            ],
        }
        for id, stem in zip(ids, stems, strict=True)
    ]
    assert (out / "ucf101_val.jsonl").read_bytes() == (
        b'{"id": "val-0000000002", "source": "ucf101", "conversations": [{"images": ['
        + b", ".join(b'"val/A/a2.%d.jpg"' % i for i in range(8))
        + b'], "user": "Classify the video into one of the following classes: A, B, C.", '
        b'"assistant": "A"}]}\n'
    )


def test_same_bytes_for_any_number_of_workers(videos: Path, tmp_path: Path):
    """Runs can be compared and resumed: neither chance nor the order of the workers shows."""
    write_video(videos / "train" / "A" / "a0_late.avi")
    script = tmp_path / "script.py"
    script.write_text(WORKER_SCRIPT)
    outs = [tmp_path / "one", tmp_path / "again", tmp_path / "three"]
    for out, workers in zip(outs, (1, 1, 3), strict=True):
        flags = ("--video_dir", videos, "--out_dir", out, "--num_workers", workers)
        done = run(*flags, script=script)
        assert done.returncode == 0, done.stderr
    assert len(tree(outs[0])) == 6 * 8 + 3 + len(OWN_FILES)
    assert tree(outs[0]) == tree(outs[1]) == tree(outs[2])


def test_spawned_workers(videos: Path, tmp_path: Path, monkeypatch):
    """Where processes cannot be forked, as on macOS, the result is the same."""
    assert main("video_dir", videos, tmp_path / "one") == 0
    monkeypatch.setattr(converter, "START_METHOD", "spawn")
    assert main("video_dir", videos, tmp_path / "two", "--num_workers", 2) == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_summary_and_next_command(videos: Path, tmp_path: Path):
    """The user sees the counts, where the jsonl are, and a command that can be pasted."""
    out = tmp_path / "out dir"
    done = run("--video_dir", videos, "--out_dir", out, "--num_frames", 3)
    assert done.returncode == 0 and done.stderr == ""
    assert f"train: 2 videos, 6 frames, 0 failed -> {out / 'ucf101_train.jsonl'}" in done.stdout
    assert f"finetune_hf_trainer_ucf101.py --data_dir '{out}'\n" in done.stdout


def test_output_that_cannot_be_printed(videos: Path, tmp_path: Path):
    """An ASCII terminal and a reader that has left change nothing: the work is done."""
    command = [sys.executable, SCRIPT, "--video_dir", videos, "--no-tqdm", "--out_dir"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, tmp_path / "é"], env=ascii_only, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and rb"\xe9" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, tmp_path / "out"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert tree(tmp_path / "out") == tree(tmp_path / "é")


def test_help():
    """The docstring and every flag can be read without a source at hand."""
    done = run("--help")
    assert done.returncode == 0
    for word in (
        "out_dir",
        "tmp_dir",
        "archive",
        "video_dir",
        "num_frames",
        "num_workers",
        "no-tqdm",
    ):
        assert f"--{word}" in done.stdout
    assert "/tmp/ucf101" in done.stdout and "Exit code" in done.stdout


# ---- Which frames ----


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [("v.avi", "mpeg4", 0), ("v.avi", "mpeg4", 2), ("v.mp4", H264, 3), ("v.mkv", H264, 3)],
)
@pytest.mark.parametrize("num_frames", [8, 21, 50])
def test_frames_are_evenly_spaced(tmp_path: Path, name, codec, b_frames, num_frames):
    """Frame floor(i * n / 8) in the order of display, with and without B-frames."""
    video = write_video(tmp_path / "videos" / "val" / "A" / name, num_frames, codec, b_frames)
    assert main("video_dir", tmp_path / "videos", tmp_path / "out") == 0
    assert shown(tmp_path / "out/images/val/A/v") == [i * num_frames // 8 for i in range(8)]
    with av.open(str(video)) as container:
        types = {frame.pict_type for frame in container.decode(video=0)}
    assert (PictureType.B in types) == (b_frames > 0)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_num_frames_and_short_videos(tmp_path: Path, count: int):
    """--num_frames is obeyed, and a video with fewer frames repeats them."""
    write_video(tmp_path / "videos/val/A/v.avi", 3)
    assert main("video_dir", tmp_path / "videos", tmp_path / "out", "--num_frames", count) == 0
    assert len(tree(tmp_path / "out/images")) == count
    assert shown(tmp_path / "out/images/val/A/v", count) == [i * 3 // count for i in range(count)]


def test_header_lies(tmp_path: Path):
    """A cut-off file counts the frames that are there, not those that its header promises."""
    video = write_video(tmp_path / "v.avi", 50)
    with av.open(str(video)) as container:
        cut = [packet.pos for packet in container.demux(video=0)][30]
    video.write_bytes(video.read_bytes()[:cut])
    assert header_and_packets(video) == (50, 30)
    assert picked(video) == [i * 30 // 8 for i in range(8)]


@pytest.mark.skipif(H264 == "mpeg4", reason="needs libx264")
def test_packets_lie(tmp_path: Path):
    """A stream that starts between keyframes has packets that give no frame: frames count."""
    source = write_video(tmp_path / "whole.mkv", 40, H264)
    video = write_packets(tmp_path / "v.mkv", source, start=1)
    _, packets = header_and_packets(video)
    assert packets == 39  # of which those of frames 1 to 11 need the keyframe that is gone
    assert picked(video) == [12 + i * 28 // 8 for i in range(8)]


@pytest.mark.parametrize("guess", [0, 18, 22, 40, 1000])
def test_result_does_not_depend_on_the_guess(tmp_path: Path, monkeypatch, guess: int):
    """The fast way and the second decoding give the same frames, and only a bad guess costs one."""
    video = write_video(tmp_path / "v.mp4", 20, H264, b_frames=2)
    decode, calls = converter.decode, []
    monkeypatch.setattr(converter, "decode", lambda *args: calls.append(args) or decode(*args))
    monkeypatch.setattr(converter, "guess_count", lambda path, stream: guess)
    assert picked(video) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert len(calls) == (1 if 18 <= guess <= 22 else 2)


@pytest.mark.parametrize(
    ("name", "codec", "part", "opened"),
    [
        ("v.avi", "mpeg4", 1, 1),
        ("v.mp4", H264, 1, 1),
        ("v.mkv", H264, 1, 2),
        ("v.avi", "mpeg4", 0.6, 2),
    ],
)
def test_videos_are_read_once(tmp_path: Path, monkeypatch, name, codec, part, opened: int):
    """Where header and index agree, no packets are counted; a cut-off file is not decoded twice."""
    video = write_video(tmp_path / name, 40, codec)
    os.truncate(video, int(part * video.stat().st_size))
    open_video, decode, calls = converter.open_video, converter.decode, []
    monkeypatch.setattr(
        converter, "open_video", lambda path: calls.append("open") or open_video(path)
    )
    monkeypatch.setattr(converter, "decode", lambda *args: calls.append("decode") or decode(*args))
    picked(video)
    assert calls.count("open") == opened and calls.count("decode") == 1


@pytest.mark.parametrize("width", [64, 66, 318])
def test_jpeg_is_that_of_to_image(width: int):
    """The short cut around PyAV's to_image changes no byte, also where rows are padded."""
    pixels = np.random.default_rng(0).integers(0, 255, (50, width, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels).reformat(format="yuv420p")
    expected = io.BytesIO()
    frame.to_image().save(expected, "JPEG", quality=95)
    assert converter.to_jpeg(frame) == expected.getvalue()


def test_odd_names_and_titles(tmp_path: Path, monkeypatch):
    """A folder that looks like a URL and a title that is not UTF-8 do not keep a video out."""
    video = tmp_path / "my:videos" / "val" / "A" / "v.mkv"
    write_video(video, title="0123456789")
    video.write_bytes(video.read_bytes().replace(b"0123456789", b"caf\xe9 cr\xe8me"))
    monkeypatch.chdir(tmp_path)
    assert main("video_dir", Path("my:videos"), tmp_path / "out") == 0
    assert shown(tmp_path / "out/images/val/A/v") == [i * 10 // 8 for i in range(8)]


# ---- Videos that fail ----


@pytest.mark.parametrize("workers", [1, 2])
def test_undecodable_videos(videos: Path, tmp_path: Path, workers: int):
    """Bad videos are named with a reason and leave nothing; the rest keeps its ids and frames."""
    out = tmp_path / "out"
    flags = ("--video_dir", videos, "--out_dir", out, "--num_workers", workers)
    assert run(*flags).returncode == 0
    before = tree(out)

    (videos / "train" / "A" / "a1.avi").write_bytes(b"no video at all")
    (videos / "test" / "C" / "c1.avi").write_bytes(b"")
    done = run(*flags)
    assert done.returncode == 1
    assert "failed: train/A/a1.avi: Invalid data" in done.stderr
    assert "failed: test/C/c1.avi: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "train: 1 videos, 8 frames, 1 failed" in done.stdout

    after = tree(out)
    assert {path for path in before if path not in after} == {
        f"images/{stem}.{i}.jpg" for stem in ("train/A/a1", "test/C/c1") for i in range(8)
    }
    assert all(after[path] == before[path] for path in after if path.endswith(".jpg"))
    assert [record["id"] for record in records(out, "train")] == ["train-0000000001"]
    assert [record["id"] for record in records(out, "test")] == ["test-0000000003"]
    assert "classes: A, B, C." in records(out, "val")[0]["conversations"][0]["user"]


def test_damaged_packet_is_skipped(tmp_path: Path, capsys):
    """One bad packet costs a warning, not the video."""
    video = write_video(tmp_path / "videos/val/A/v.mov", 24, "mpeg4")
    with av.open(str(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        position, size = packets[-1].pos, packets[-1].size
    data = bytearray(video.read_bytes())
    data[position : position + size] = b"\xff" * size
    video.write_bytes(data)
    assert main("video_dir", tmp_path / "videos", tmp_path / "out") == 0
    assert "warning: val/A/v.mov: 1 damaged packets skipped" in capsys.readouterr().err
    assert shown(tmp_path / "out/images/val/A/v") == [i * 23 // 8 for i in range(8)]


def test_bad_videos(tmp_path: Path):
    """Every kind of bad file is named with its reason, none stops or hangs the run."""
    folder = tmp_path / "videos/train/A"
    whole = {
        suffix: write_video(tmp_path / f"whole.{suffix}", 50, codec).read_bytes()
        for suffix, codec in (("avi", "mpeg4"), ("mkv", H264), ("mp4", H264))
    }
    write_video(folder / "good.avi")
    write_video(folder / "one.avi", 1)
    write_video(folder / "zero_frames.avi", 0)
    write_video(folder / "zero.mp4", 0)
    for suffix, data in whole.items():
        (folder / f"half_{suffix}.{suffix}").write_bytes(data[: len(data) // 2])
    (folder / "empty.avi").write_bytes(b"")
    (folder / "text.avi").write_text("no video")
    (folder / "video.xyz").write_bytes(whole["avi"])
    (folder.parent / "stray.avi").write_bytes(whole["avi"])
    (folder / "folder.avi").mkdir()
    (folder / "nowhere.avi").symlink_to("gone.avi")
    (folder / ("long" * 62 + "abc.avi")).write_bytes(whole["avi"])
    os.mkfifo(folder / "pipe.avi")
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())

    done = run("--video_dir", tmp_path / "videos", "--out_dir", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line.split(": ", 2) for line in done.stderr.splitlines()]
    found = {Path(path).name: reason for _, path, reason in lines}
    reasons = {
        "audio.mp4": "no video stream",
        "empty.avi": "the file is empty",
        "folder.avi": "not a regular file",
        "half_avi.avi": "cut off: about 50 frames promised",
        "half_mkv.mkv": "cut off: about 50 frames promised",
        "half_mp4.mp4": "Invalid data",
        "nowhere.avi": "No such file",
        "one.avi": "frames repeat: it has 1, fewer than 8",
        "pipe.avi": "not a regular file",
        "stray.avi": "not in train/<class>/",
        "text.avi": "Invalid data",
        "video.xyz": "not a video suffix",
        "zero_frames.avi": "no frame can be decoded",
        "zero.mp4": "no video stream",
    }
    assert "File name too long" in done.stderr
    for name, reason in reasons.items():
        assert reason in found[name], name
    stems = ["good", "half_avi", "half_mkv", "one"]
    images = [record["conversations"][0]["images"] for record in records(tmp_path / "out", "train")]
    assert images == [[f"train/A/{stem}.{i}.jpg" for i in range(8)] for stem in stems]
    assert len(tree(tmp_path / "out")) == 4 * 8 + 1 + len(OWN_FILES)
    assert shown(tmp_path / "out/images/train/A/one") == [0] * 8


def playlists(outside: str) -> dict[str, str]:
    """Text files that make ffmpeg open other files."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    return {
        "list.m3u8": hls.format(f"{outside}/marker.ts"),
        "list_url.m3u8": hls.format(f"file://{os.path.abspath(outside)}/marker.ts"),
        "concat.mp4": f"ffconcat version 1.0\nfile {outside}/marker.avi\n",
        "concat_hls.avi": "ffconcat version 1.0\nfile list.m3u8\n",
        "concat_hls_url.mkv": "ffconcat version 1.0\nfile list_url.m3u8\n",
        "concat_beside.mov": "ffconcat version 1.0\nfile good.avi\n",
        "hls.mp4": hls.format(f"{outside}/marker.ts"),
        "sdp.mpg": "v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 32\n",
        "dash.mp4": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        f"<AdaptationSet><Representation><BaseURL>{outside}/marker.avi</BaseURL>"
        "</Representation></AdaptationSet></Period></MPD>",
    }


@pytest.mark.parametrize("source", ["video_dir", "archive"])
def test_no_other_file_is_opened(tmp_path: Path, capsys, monkeypatch, source: str):
    """A list of files that is named like a video brings none of them into the dataset."""
    folder = tmp_path / "videos/train/A"
    write_video(folder / "good.avi")
    for suffix in ("avi", "ts"):
        write_video(tmp_path / f"outside/marker.{suffix}")
    outside = os.path.relpath(tmp_path / "outside", folder)
    for name, text in playlists(outside).items():
        (folder / name).write_text(text)
    path = tmp_path / "videos"
    if source == "archive":
        (tmp_path / "tmp").mkdir()  # from where the same relative names lead outside
        path = tmp_path / "videos.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "videos", "videos")
    bad = [name for name in playlists(outside) if not name.endswith(".m3u8")]
    # The second lock holds on its own.
    lists = converter.ONE_FILE | {"format_whitelist": converter.CONTAINERS + ",concat,hls,dash"}
    for options in (converter.ONE_FILE, lists):
        monkeypatch.setattr(converter, "ONE_FILE", options)
        assert main(source, path, tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert all(f"failed: train/A/{name}: " in error for name in bad)
        (record,) = records(tmp_path / "out", "train")
        assert record["conversations"][0]["images"] == [f"train/A/good.{i}.jpg" for i in range(8)]


def test_other_formats_fail(tmp_path: Path, capsys):
    """Of the formats that ffmpeg knows, only those of videos are tried, whatever the name says."""
    for name, codec, format in (("gif.mp4", "gif", "gif"), ("nut.avi", "mpeg4", "nut")):
        path = tmp_path / "videos/train/A" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format=format) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for _ in range(10):
                frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert main("video_dir", tmp_path / "videos", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "gif.mp4: its format is none of asf,avi," in error and "nut.avi: its format" in error


def test_huge_videos(videos: Path, tmp_path: Path, capsys):
    """A sparse terabyte is refused by its size, and the others are converted."""
    with (videos / "train/A/sparse.avi").open("wb") as file:
        file.truncate(1 << 40)
    assert main("video_dir", videos, tmp_path / "out") == 1
    assert "sparse.avi: larger than --max_video_gb 1: 1024 GB" in capsys.readouterr().err
    assert len(records(tmp_path / "out", "train")) == 2


def test_huge_frames(tmp_path: Path, monkeypatch):
    """Frames that would fill the memory are not decoded, also when they come later."""
    parts = []
    for width, height in ((64, 48), (640, 480)):
        data = io.BytesIO()
        with av.open(data, "w", format="mpeg1video") as container:
            stream = container.add_stream("mpeg1video", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(10):
                frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append(data.getvalue())
    monkeypatch.setattr(converter, "MAX_PIXELS", 10_000)
    (tmp_path / "grows.mpg").write_bytes(b"".join(parts))
    frames, warning = converter.pick_frames(tmp_path / "grows.mpg", 8)
    assert {frame.width for frame in frames} == {64} and "10 damaged packets" in warning
    (tmp_path / "large.mpg").write_bytes(parts[1])
    with pytest.raises(ValueError, match="its frames of 640 x 480 are larger than 8K"):
        converter.pick_frames(tmp_path / "large.mpg", 8)


def test_names_that_are_no_text(tmp_path: Path, capsys):
    """A video whose name jsonl cannot hold fails; a line break does not forge the summary."""
    folder = tmp_path / "videos/train/A"
    good = write_video(folder / "good.avi")
    shutil.copy(good, folder / os.fsdecode(b"caf\xe9.avi"))
    (folder / "a\nfailed: b.avi").touch()
    assert main("video_dir", tmp_path / "videos", tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines() == [
        r"failed: 'train/A/a\nfailed: b.avi': the file is empty",
        r"failed: 'train/A/caf\udce9.avi': its name is not UTF-8, as jsonl is: rename it",
    ]
    assert len(records(tmp_path / "out", "train")) == 1


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["<|end|>"], "holds '<|'"),
        (["<|image_1|>"], "holds '<|'"),
        (["a<s>"], "holds '<s>'"),
        (["  "], "white space"),
        (["A "], "white space"),
        (["a, b"], "holds ','"),
        (["a\nb"], r"holds '\n'"),
        ([os.fsdecode(b"caf\xe9")], r"holds '\udce9'"),
        (["Run", "run."], "differs from 'Run'"),
    ],
)
def test_class_names(videos: Path, tmp_path: Path, capsys, names: list[str], why: str):
    """A class that the recipe would refuse or confuse stops the run before the work starts."""
    for name in names:
        write_video(videos / "val" / name / "v.avi")
    assert main("video_dir", videos, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{names[-1]!r}: rename it" in error and why in error
    assert not (tmp_path / "out").exists()


def test_many_ignored_files(videos: Path, tmp_path: Path, capsys):
    """A folder full of subtitles does not bury the summary."""
    for i in range(30):
        (videos / f"train/A/{i:02d}.srt").touch()
    assert main("video_dir", videos, tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ignored: train/A/00.srt: not a video suffix"
    assert len(lines) == 11 and lines[-1] == "ignored: 20 more files"


@pytest.mark.parametrize("workers", [1, 2])
def test_strict(videos: Path, tmp_path: Path, capsys, workers: int):
    """The first bad video stops the run; once it is repaired the same command continues."""
    good = (videos / "train/B/b 1.avi").read_bytes()
    (videos / "train/B/b 1.avi").write_bytes(good[:3000])
    (videos / "test/C/c1.avi").write_bytes(b"")
    out = tmp_path / "out"
    flags = ("--video_dir", videos, "--out_dir", out, "--num_workers", workers)
    done = run(*flags, "--strict")
    assert done.returncode == 1 and not list(out.glob("*.jsonl"))
    line, last = done.stderr.splitlines()
    assert line.startswith("failed: train/B/b 1.avi: ") and "--strict" in last
    assert (out / "images/train/A/a1.7.jpg").exists()

    (videos / "train/B/b 1.avi").write_bytes(good)
    assert main("video_dir", videos, out, "--strict") == 1
    assert "failed: test/C/c1.avi: the file is empty\n" in capsys.readouterr().err
    (videos / "test/C/c1.avi").write_bytes(good)
    (videos / "test/C/notes.txt").touch()
    assert main("video_dir", videos, out, "--strict") == 1
    assert "ignored: test/C/notes.txt: not a video suffix\n" in capsys.readouterr().err
    (videos / "test/C/notes.txt").unlink()
    assert main("video_dir", videos, out, "--strict") == 0
    assert main("video_dir", videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")


# ---- Full disks ----


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
@pytest.mark.parametrize(
    ("folder", "index", "name"),
    [("", 0, ".convert_ucf101"), ("images/train/A", 3, "a1.3.jpg"), ("", 2, "ucf101_test.jsonl")],
)
def test_full_disk(videos: Path, tmp_path: Path, monkeypatch, capsys, call, folder, index, name):
    """One message with the path, nothing half written, and the same command continues."""
    out, original = tmp_path / "out", getattr(Path, call)

    def fails(self: Path, *args):
        if self.parent == out / folder and self.name.endswith(f".{index}.part"):
            raise OSError(28, "No space left on device")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fails)
        assert main("video_dir", videos, out) == 2
    error = capsys.readouterr().err
    assert f"cannot write {out / folder / name}: No space left on device\n" in error
    interrupted = tree(out)
    assert main("video_dir", videos, out) == 0
    assert main("video_dir", videos, tmp_path / "fresh") == 0
    fresh = tree(tmp_path / "fresh")
    assert tree(out) == fresh and interrupted.items() <= fresh.items()


@pytest.mark.parametrize("workers", [1, 2])
def test_writes_that_break_off(videos: Path, tmp_path: Path, workers: int):
    """The same with the system's own error, which comes when a file is half written."""
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--video_dir", videos, "--out_dir", out, "--no-tqdm"]
    done = subprocess.run(
        [*command, "--num_workers", str(workers)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )
    assert done.returncode == 2 and list(tree(out)) == OWN_FILES[:1]
    first, second = done.stderr.splitlines()
    assert first.startswith("convert_ucf101.py: error: cannot write") and "too large" in first
    assert "the same command continues" in second
    assert main("video_dir", videos, out) == 0


# ---- Workers that die ----


def test_worker_dies(tmp_path: Path):
    """A crash in a decoder costs that video only, not the run and not the videos beside it."""
    good, root = write_video(tmp_path / "good.avi"), tmp_path / "videos/train/A"
    root.mkdir(parents=True)
    for i in range(12):
        (root / f"v{i:02d}{'_dies' if i in (1, 7) else ''}.avi").write_bytes(good.read_bytes())
    script = tmp_path / "script.py"
    script.write_text(WORKER_SCRIPT)
    flags = ("--video_dir", root.parents[1], "--out_dir", tmp_path / "out", "--num_workers", 2)
    done = run(*flags, script=script)
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("failed")] == [
        f"failed: train/A/v{i:02d}_dies.avi: its worker process died" for i in (1, 7)
    ]
    expected = [f"train-{i:010d}" for i in range(12) if i not in (1, 7)]
    assert [record["id"] for record in records(tmp_path / "out", "train")] == expected


@needs_proc
def test_workers_end_with_a_killed_parent(tmp_path: Path):
    """A killed run leaves no processes behind, and no jsonl."""
    for name in ("sleeps1", "sleeps2"):
        write_video(tmp_path / "videos" / "train" / "A" / f"{name}.avi")
    script = tmp_path / "script.py"
    script.write_text(WORKER_SCRIPT)
    flags = (
        "--video_dir",
        tmp_path / "videos",
        "--out_dir",
        tmp_path / "out",
        "--num_workers",
        "2",
    )
    parent = subprocess.Popen([sys.executable, script, *flags], stderr=subprocess.DEVNULL)

    def pids() -> list[int]:
        return [int(path.suffix[4:]) for path in (tmp_path / "videos").rglob("*.pid*")]

    try:
        wait_until(lambda: len(pids()) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids()))
    assert not list((tmp_path / "out").glob("*.jsonl"))


# ---- To continue ----


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of 16 videos that take some 0.1 s each, and beside it the same as an archive."""
    folder = tmp_path_factory.mktemp("source")
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    for count in (9, 20):
        with av.open(str(folder / f"{count}.avi"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(np.roll(pixels, i, axis=1))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        for split, label in itertools.product(("train", "test"), ("A", "B")):
            (folder / "videos" / split / label).mkdir(parents=True, exist_ok=True)
            for copy in ("x", "y"):
                name = f"{copy}{count}.avi"
                shutil.copy(folder / f"{count}.avi", folder / "videos" / split / label / name)
    with tarfile.open(folder / "videos.tar", "w") as tar:
        tar.add(folder / "videos", "UCF101_subset")
    assert main("video_dir", folder / "videos", folder / "expected") == 0
    return folder


def start(source: Path, tmp_path: Path, kind: str, workers: int) -> subprocess.Popen:
    """The converter at work, in a process group of its own."""
    command = [sys.executable, SCRIPT, "--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp"]
    command += ["--num_workers", str(workers), "--no-tqdm", f"--{kind}"]
    command += [source / ("videos.tar" if kind == "archive" else "videos")]
    # Where this test runs in the background of a shell, its processes would ignore Ctrl-C.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        command, text=True, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=listen
    )


def workers_of(pid: int) -> list[int]:
    """The worker processes of a converter. Linux only."""
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def holds(pid: int, folder: Path) -> bool:
    """Whether a process has a folder open, and so the lock on it. Linux only."""
    return any(file.resolve() == folder for file in Path(f"/proc/{pid}/fd").iterdir())


def check_interrupted(out: Path, expected: dict[str, bytes]) -> None:
    """What has its final name is complete, and a jsonl is there only when all else is."""
    found = {path: data for path, data in tree(out).items() if not path.endswith(".part")}
    assert found.items() <= expected.items()
    assert not list(out.glob("*.jsonl")) or len(found) >= len(expected) - 1


@needs_proc
@pytest.mark.parametrize(("kind", "workers"), [("archive", 1), ("archive", 2), ("video_dir", 2)])
def test_killed_at_any_moment(source: Path, tmp_path: Path, kind: str, workers: int):
    """Killed three times, in three ways: the result is that of a run in peace, to the last byte."""
    random_moment = random.Random(f"{kind} {workers}").uniform
    expected = tree(source / "expected")
    for kill in (os.kill, os.killpg, os.kill):
        process = start(source, tmp_path, kind, workers)
        time.sleep(random_moment(0.1, 1.5))
        number = signal.SIGTERM if kill is os.killpg else signal.SIGKILL
        kill(process.pid, number)
        _, error = process.communicate(timeout=60)
        assert "Traceback" not in error and process.returncode in (0, -9, -15, 143)
        check_interrupted(tmp_path / "out", expected)
    process = start(source, tmp_path, kind, workers)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "tmp").exists() or not list((tmp_path / "tmp").iterdir())


@needs_proc
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals(source: Path, tmp_path: Path, number: signal.Signals, workers: int):
    """Ctrl-C and SIGTERM leave no process, lock or temporary file, and print one line."""
    out = tmp_path / "out"
    process = start(source, tmp_path, "archive", workers)
    wait_until(lambda: list(out.rglob("*.0.jpg")))
    assert list((tmp_path / "tmp").iterdir())
    pids = workers_of(process.pid)
    assert len(pids) == (workers if workers > 1 else 0)
    assert holds(process.pid, out)
    wait_until(lambda: not any(holds(pid, out) for pid in pids))
    kill = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches the workers, too
    kill(process.pid, number)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    line = f"convert_ucf101.py: stopped by {number.name}; the same command continues\n"
    assert error == line
    assert not any(map(is_running, pids))
    assert not list((tmp_path / "tmp").iterdir()) and not list(out.rglob("*.part"))
    check_interrupted(out, tree(source / "expected"))


@pytest.mark.parametrize("delay", [0.05, 0.2])
def test_stop_while_starting(source: Path, tmp_path: Path, delay: float):
    """Ctrl-C in the first moments, while modules are loaded, is no traceback either."""
    process = start(source, tmp_path, "video_dir", 2)
    wait_until(lambda: Path(f"/proc/{process.pid}/maps").read_text().count("fcntl") > 0)
    time.sleep(delay - 0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.count("\n") == 1 and "continues" in error


@needs_proc
def test_killed_worker(source: Path, tmp_path: Path):
    """A worker that is killed costs nothing but time."""
    process = start(source, tmp_path, "video_dir", 2)
    wait_until(lambda: list((tmp_path / "out").rglob("*.0.jpg")))
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert tree(tmp_path / "out") == tree(source / "expected")


@needs_proc
def test_continues(source: Path, tmp_path: Path):
    """What a killed run completed is neither decoded nor written again; its leavings are gone."""
    out = tmp_path / "out"
    process = start(source, tmp_path, "archive", 2)
    wait_until(lambda: len(list(out.rglob("*.7.jpg"))) >= 5)
    process.kill()
    process.communicate()
    (left,) = (tmp_path / "tmp").iterdir()
    (left / "train/A").mkdir(parents=True)
    (left / "train/A/left.avi").touch()
    (out / "images/train/A/.convert_ucf101.1.2.part").write_bytes(b"\xff\xd8")
    whole = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    done = [p for p in whole if p.name.endswith(".7.jpg")]
    flags = ("--archive", source / "videos.tar", "--out_dir", out, "--tmp_dir", tmp_path / "tmp")
    second = run(*flags)
    assert second.returncode == 0 and f"{len(done)} videos kept" in second.stdout
    for path in done:
        assert path.stat().st_mtime_ns == whole[path]
    assert tree(out) == tree(source / "expected")
    assert not list((tmp_path / "tmp").iterdir())


def test_all_done(videos: Path, tmp_path: Path, monkeypatch, capsys):
    """A second run touches no file and decodes nothing; its warnings are those of the first."""
    out = tmp_path / "out"
    write_video(videos / "train/A/short.avi", 3)
    assert main("video_dir", videos, out) == 0
    first = capsys.readouterr()
    files = {path: path.stat() for path in out.rglob("*")}
    monkeypatch.setattr(converter, "open_video", None)
    assert main("video_dir", videos, out) == 0
    second = capsys.readouterr()
    assert first.err == second.err and "short.avi: frames repeat" in second.err
    assert "6 videos kept, 0 images removed" in second.out
    changed = [path for path, old in files.items() if path.stat().st_mtime_ns != old.st_mtime_ns]
    assert not changed


def edit_image(path: Path) -> None:
    image = Image.open(path)
    ImageOps.invert(image).save(path, comment=image.info["comment"])


STALE = {
    "image deleted": lambda videos, out: (out / "images/train/A/a1.3.jpg").unlink(),
    "image torn": lambda videos, out: os.truncate(out / "images/train/A/a1.3.jpg", 500),
    "image empty": lambda videos, out: os.truncate(out / "images/train/A/a1.0.jpg", 0),
    "image edited": lambda videos, out: edit_image(out / "images/train/A/a1.0.jpg"),
    "image of another": lambda videos, out: shutil.copy(
        out / "images/train/B/b 1.0.jpg", out / "images/train/A/a1.0.jpg"
    ),
    "image not ours": lambda videos, out: (out / "images/train/A/a1.0.jpg").write_bytes(
        b"\xff" * 400
    ),
    "video changed": lambda videos, out: write_video(videos / "train/A/a1.avi", 20),
}


@pytest.mark.parametrize("kind", STALE)
def test_stale_images(videos: Path, tmp_path: Path, monkeypatch, kind: str):
    """What does not fit is made anew, and only that; the result is that of a fresh run."""
    out = tmp_path / "out"
    write_video(videos / "train/B/b 1.avi", 30)
    assert main("video_dir", videos, out) == 0
    STALE[kind](videos, out)
    pick_frames, picked_paths = converter.pick_frames, []
    monkeypatch.setattr(
        converter,
        "pick_frames",
        lambda path, num_frames: picked_paths.append(path) or pick_frames(path, num_frames),
    )
    assert main("video_dir", videos, out) == 0
    assert picked_paths == [videos / "train/A/a1.avi"]
    assert main("video_dir", videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")


def test_other_settings(videos: Path, tmp_path: Path, monkeypatch):
    """Frames of another --num_frames or another version are never mixed with those of this run."""
    out = tmp_path / "out"
    assert main("video_dir", videos, out, "--num_frames", 12) == 0
    assert main("video_dir", videos, out) == 0
    assert main("video_dir", videos, tmp_path / "fresh") == 0
    assert tree(out) == tree(tmp_path / "fresh")
    monkeypatch.setattr(converter, "MADE_BY", "convert_ucf101 next")
    assert main("video_dir", videos, out) == 0
    assert all(b"convert_ucf101 next" in data for data in tree(out / "images").values())


def test_no_jsonl_while_images_change(videos: Path, tmp_path: Path, monkeypatch):
    """The jsonl goes before the first image does, and stays if none does."""
    out = tmp_path / "out"
    assert main("video_dir", videos, out) == 0
    write_files = converter.write_files

    def look(files: dict[Path, bytes]) -> None:
        assert not list(out.glob("*.jsonl"))
        write_files(files)

    monkeypatch.setattr(converter, "write_files", look)
    write_video(videos / "test/C/c1.avi", 20)
    assert main("video_dir", videos, out) == 0
    shutil.rmtree(videos / "test/C")
    assert main("video_dir", videos, out) == 0


def test_videos_that_are_gone(videos: Path, tmp_path: Path, capsys):
    """Images of videos that are gone are removed, but only those that the converter wrote."""
    out = tmp_path / "out"
    assert main("video_dir", videos, out) == 0
    own = out / "images/test/C/own.0.jpg"
    Image.new("RGB", (8, 8)).save(own, comment=b'{"made_by": "me"}')
    (out / "images/test/C/notes.txt").touch()
    edit_image(out / "images/test/C/c1.5.jpg")
    shutil.rmtree(videos / "test/C")
    shutil.rmtree(videos / "val")
    assert main("video_dir", videos, out) == 0
    assert "3 videos kept, 15 images removed" in capsys.readouterr().out
    assert main("video_dir", videos, tmp_path / "fresh") == 0
    names = ("own.0.jpg", "notes.txt", "c1.5.jpg")
    kept = {f"images/test/C/{name}" for name in names}
    assert tree(out).keys() - tree(tmp_path / "fresh").keys() == kept
    assert not (out / "images/val/A").exists()


def test_stamp(videos: Path, tmp_path: Path):
    """The comment of an image says where it is from, and changes no pixel."""
    assert main("video_dir", videos, tmp_path / "out") == 0
    path = tmp_path / "out/images/train/A/a1.0.jpg"
    stamp = json.loads(Image.open(path).info["comment"])
    video = hashlib.sha256((videos / "train/A/a1.avi").read_bytes()).hexdigest()
    assert stamp["video"] == video and stamp["num_frames"] == 8 and stamp["warning"] == ""
    frames, _ = converter.pick_frames(videos / "train/A/a1.avi", 8)
    jpeg = converter.to_jpeg(frames[0])
    assert stamp["crc32"] == zlib.crc32(jpeg)
    assert np.array_equal(Image.open(path), Image.open(io.BytesIO(jpeg)))


@pytest.mark.parametrize("source", ["video_dir", "archive"])
def test_two_converters(videos: Path, tmp_path: Path, capsys, source: str):
    """A second converter for the same folder stops at once and touches nothing."""
    with tarfile.open(tmp_path / "videos.tar", "w") as tar:
        tar.add(videos, "UCF101_subset")
    path = videos if source == "video_dir" else tmp_path / "videos.tar"
    out = tmp_path / "out"
    part = out / ".convert_ucf101.1.0.part"
    out.mkdir()
    part.touch()
    file = os.open(out, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert main(source, path, out) == 2
    assert f"another convert_ucf101.py is writing to {out}" in capsys.readouterr().err
    assert list(tree(out)) == [part.name]
    os.close(file)
    assert main(source, path, out) == 0
    assert not part.exists()


def test_links(videos: Path, tmp_path: Path, capsys):
    """The output folder may be a link. The temporary one may not: its target would be emptied."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with tarfile.open(tmp_path / "videos.tar", "w") as tar:
        tar.add(videos, "UCF101_subset")
    assert main("archive", tmp_path / "videos.tar", tmp_path / "out") == 0
    key = hashlib.sha256(os.fsencode(tmp_path / "real")).hexdigest()[:16]
    (tmp_path / f"tmp/convert_ucf101.{key}.tmp").symlink_to(videos)
    before = tree(tmp_path)
    assert main("archive", tmp_path / "videos.tar", tmp_path / "out") == 2
    assert "Too many levels of symbolic links" in capsys.readouterr().err
    assert tree(tmp_path) == before


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
    assert main("archive", archive, tmp_path / "out") == 0
    assert main("video_dir", videos, tmp_path / "expected") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert list((tmp_path / "tmp").iterdir()) == []  # nothing stays behind


def test_archive_of_two_datasets(videos: Path, tmp_path: Path, capsys):
    """One of them would be left out without a word."""
    with tarfile.open(tmp_path / "videos.tar", "w") as tar:
        tar.add(videos, "a/first")
        tar.add(videos, "second")
    assert main("archive", tmp_path / "videos.tar", tmp_path / "out") == 2
    assert "has two datasets, a/first and second" in capsys.readouterr().err


def test_download(videos: Path, tmp_path: Path, monkeypatch):
    """Without a source the hub's archive is fetched."""
    archive = tmp_path / "hub.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(videos, "UCF101_subset")
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda **kwargs: calls.append(kwargs) or str(archive)
    )
    flags = ["--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp", "--num_workers", "1"]
    assert converter.main([*map(str, flags), "--no-tqdm"]) == 0
    repo = {"repo_id": "sayakpaul/ucf101-subset", "repo_type": "dataset"}
    assert calls == [repo | {"filename": "UCF101_subset.tar.gz"}]
    assert len(records(tmp_path / "out", "train")) == 2


def test_download_fails(tmp_path: Path, monkeypatch, capsys):
    """Offline, the message names the two ways out."""

    def offline(**kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert converter.main(["--out_dir", str(tmp_path / "out"), "--tmp_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no route to the hub" in error and "--archive" in error and "--video_dir" in error
    assert not (tmp_path / "out").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BAD_MEMBERS = {
    "parent": [member("../evil.avi")],
    "deep parent": [member("UCF101_subset/train/../../../evil.avi")],
    "absolute": [member("{outside}/evil.avi")],
    "symlink": [member("UCF101_subset/link", tarfile.SYMTYPE, "../../../outside")],
    "absolute symlink": [member("UCF101_subset/link", tarfile.SYMTYPE, "{outside}")],
    "hard link": [member("UCF101_subset/link.avi", tarfile.LNKTYPE, "../../outside/secret.avi")],
    "pipe": [member("UCF101_subset/train/A/pipe.avi", tarfile.FIFOTYPE)],
    "device": [member("UCF101_subset/train/A/device.avi", tarfile.CHRTYPE)],
}


def write_bad_archive(path: Path, videos: Path, members: list[tarfile.TarInfo], outside: Path):
    outside.mkdir()
    (outside / "secret.avi").write_bytes(b"secret")
    with tarfile.open(path, "w") as tar:
        tar.add(videos, "UCF101_subset")
        for info in members:
            info = info.replace(
                name=info.name.format(outside=outside),
                linkname=info.linkname.format(outside=outside),
            )
            tar.addfile(info, io.BytesIO())


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_bad_archive_is_refused(videos: Path, tmp_path: Path, capsys, kind: str):
    """No member of an archive gets out of its folder, and nothing stays of it."""
    archive, outside = tmp_path / "bad.tar", tmp_path / "outside"
    write_bad_archive(archive, videos, BAD_MEMBERS[kind], outside)
    before = tree(tmp_path)
    assert main("archive", archive, tmp_path / "out") == 2
    assert f"{archive} is refused" in capsys.readouterr().err
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


SPECIAL = {
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_archive_without_end(tmp_path: Path, monkeypatch, capsys, kind: str):
    """What is no file is not read: it may have no end, or never a beginning."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    SPECIAL[kind](tmp_path / "videos.tar")
    assert main("archive", tmp_path / "videos.tar", tmp_path / "out") == 2
    assert f"{tmp_path}/videos.tar is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["one file", "many files", "end", "zeros", "sparse"])
def test_archive_bombs(videos: Path, tmp_path: Path, monkeypatch, capsys, kind: str):
    """An archive does not fill the disk, and one that is small is not read for hours."""
    archive = tmp_path / "videos.tar"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(videos, "UCF101_subset")
        if kind == "one file":
            info = member("UCF101_subset/train/A/huge.avi")
            info.size = (1 << 30) + 1
            tar.addfile(info)
            tar.fileobj.write(b"\0" * 512)
        if kind == "end":
            tar.fileobj.write(bytes(20 << 20))
    if kind == "zeros":
        archive.write_bytes(b"")
    if kind in ("zeros", "sparse"):
        os.truncate(archive, 1 << 40)
    if kind == "many files":
        usage = shutil.disk_usage(tmp_path)._replace(free=5000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    why = {
        "one file": "'UCF101_subset/train/A/huge.avi' is larger than --max_video_gb 1",
        "many files": "there is not enough space",
        "end": "there is data behind its end",
        "zeros": "it is empty",
        "sparse": "there is not enough space",
    }
    assert main("archive", archive, tmp_path / "out") == 2
    assert why[kind] in capsys.readouterr().err
    assert tree(tmp_path / "tmp") == {}


def test_chain_of_links_is_refused(videos: Path, tmp_path: Path, capsys):
    """Links that are harmless one by one, and together lead outside, are stopped as well."""
    members = [
        member("d", tarfile.SYMTYPE, "."),
        member("d/e", tarfile.SYMTYPE, "d/.."),
        member("e/../evil.avi"),
    ]
    archive, outside = tmp_path / "bad.tar", tmp_path / "outside"
    write_bad_archive(archive, videos, members, outside)
    before = tree(tmp_path)
    assert main("archive", archive, tmp_path / "out") == 2
    assert f"{archive} is refused" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "empty", "missing", "huge size"])
def test_broken_archive(videos: Path, tmp_path: Path, capsys, mode: str):
    """A broken archive is an error with its name, not a traceback and not a smaller dataset."""
    archive = tmp_path / "broken.tar"
    if mode.startswith("w"):
        with tarfile.open(archive, mode) as tar:
            tar.add(videos, "UCF101_subset")
        half = archive.stat().st_size // 2
        archive.write_bytes(archive.read_bytes()[:half] + b"\xff" * half)
    elif mode == "empty":
        archive.touch()
    elif mode == "huge size":
        info = member("././@PaxHeader", tarfile.XHDTYPE)
        info.size = 1 << 70
        archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert main("archive", archive, tmp_path / "out") == 2
    assert f"{archive} cannot be extracted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and tree(tmp_path / "tmp") == {}


def test_damaged_header(videos: Path, tmp_path: Path, capsys):
    """A header that is damaged ends no archive early."""
    archive = tmp_path / "videos.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(videos, "UCF101_subset")
        offset = tar.getmembers()[-1].offset
    data = bytearray(archive.read_bytes())
    data[offset : offset + 8] = b"\xff" * 8
    archive.write_bytes(data)
    assert main("archive", archive, tmp_path / "out") == 2
    assert f"{archive} cannot be extracted" in capsys.readouterr().err


def test_missing_split(videos: Path, tmp_path: Path, capsys):
    """A split that is gone has no jsonl, not even that of an earlier run."""
    out = tmp_path / "out"
    assert main("video_dir", videos, out) == 0
    (videos / "val").rename(tmp_path / "elsewhere")
    assert main("video_dir", videos, out) == 0
    assert not (out / "ucf101_val.jsonl").exists()
    assert "val: 0 videos, 0 frames, 0 failed -> no jsonl" in capsys.readouterr().out
    assert [record["id"] for record in records(out, "test")] == [
        "test-0000000002",
        "test-0000000003",
    ]


@pytest.mark.parametrize("layout", ["missing", "empty", "train/a.avi", "A/a.avi", "dev/A/a.avi"])
def test_folder_without_videos(tmp_path: Path, layout: str):
    """A wrong folder is answered with what was expected and what is there."""
    root, out = tmp_path / "videos", tmp_path / "out"
    if layout != "missing":
        root.mkdir()
    if layout.endswith(".avi"):
        write_video(root / layout)
    done = run("--video_dir", root, "--out_dir", out)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Expected: {train,val,test}/<class>/<video>" in done.stderr
    found = {"missing": "no such folder", "empty": "nothing"}.get(layout, layout[:5])
    assert found in done.stderr.split("Found:")[1]
    assert not out.exists()


def test_two_videos_of_one_name(videos: Path, tmp_path: Path, capsys):
    """a1.avi and a1.mp4 would overwrite each other's frames: an error before anything is done."""
    write_video(videos / "train" / "A" / "a1.mp4")
    assert main("video_dir", videos, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "train/A/a1.avi" in error and "train/A/a1.mp4" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--archive", "a.tar", "--video_dir", "b"),
        ("--num_workers", "0"),
        ("--num_workers", "257"),
        ("--num_frames", "-1"),
        ("--num_frames", "1001"),
        ("--max_video_gb", "0"),
        ("--out_dir", ""),
        ("--video_dir", ""),
    ],
)
def test_wrong_arguments(flags: tuple[str, ...], capsys):
    """Flags that contradict each other or make no sense stop at once, with exit code 2."""
    with pytest.raises(SystemExit) as error:
        converter.main(list(flags))
    assert error.value.code == 2
    assert f"argument {flags[-2]}: " in capsys.readouterr().err


def test_out_dir_is_a_file(videos: Path, tmp_path: Path, capsys):
    """An output folder that cannot be made is an error message, not a traceback."""
    (tmp_path / "out").write_text("a file")
    (tmp_path / "loop").symlink_to("loop")
    with tarfile.open(tmp_path / "videos.tar", "w") as tar:
        tar.add(videos, "UCF101_subset")
    for out in (tmp_path / "out", tmp_path / "out/deeper", tmp_path / "loop"):
        assert main("archive", tmp_path / "videos.tar", out) == 2
        assert f"convert_ucf101.py: error: {tmp_path}" in capsys.readouterr().err


OTHERS_WORK = {
    "jsonl": lambda out: (out / "ucf101_val.jsonl").write_text("{}\n"),
    "image": lambda out: write_video(out / "images/train/A/a1.0.jpg.avi"),
    "link": lambda out: (out / "images").symlink_to("elsewhere"),
    "jsonl link": lambda out: (out / "ucf101_test.jsonl").symlink_to("elsewhere"),
    "jsonl pipe": lambda out: os.mkfifo(out / "ucf101_train.jsonl"),
}


@pytest.mark.parametrize("kind", OTHERS_WORK)
def test_work_of_others_is_not_replaced(videos: Path, tmp_path: Path, capsys, kind: str):
    """An --out_dir that holds a dataset of the user's own is refused, and stays as it is."""
    out = tmp_path / "out"
    out.mkdir()
    OTHERS_WORK[kind](out)
    (out / ".convert_ucf101.1.0.part").touch()
    before = {path: path.lstat() for path in out.rglob("*")}
    assert main("video_dir", videos, out) == 2
    assert "choose another --out_dir" in capsys.readouterr().err
    assert {path: path.lstat() for path in out.rglob("*")} == before


def test_edited_jsonl_is_not_replaced(videos: Path, tmp_path: Path, capsys):
    """Where a run of ours wrote, what somebody has changed in a jsonl since stays, too."""
    out = tmp_path / "out"
    assert main("video_dir", videos, out) == 0
    text = (out / "ucf101_val.jsonl").read_text().replace("Classify the", "What is in this")
    (out / "ucf101_val.jsonl").write_text(text)
    before = tree(out)
    write_video(videos / "val/A/new.avi")
    assert main("video_dir", videos, out) == 2
    assert f"{out}/ucf101_val.jsonl is not as this script wrote it" in capsys.readouterr().err
    assert tree(out) == before
    (out / "ucf101_val.jsonl").rename(tmp_path / "mine.jsonl")
    assert main("video_dir", videos, out) == 0


def test_out_dir_among_the_videos(videos: Path, tmp_path: Path, capsys):
    """Beside the splits there is room for the result, in them there is not."""
    before = tree(videos)
    (tmp_path / "link").symlink_to(videos / "val")
    for out in (videos / "train/A", videos / "test/../train", tmp_path / "link"):
        assert main("video_dir", videos, out) == 2
        assert "among the videos" in capsys.readouterr().err
    assert tree(videos) == before
    assert main("video_dir", videos, videos) == 0
    assert main("video_dir", videos, tmp_path / "out") == 0
    assert tree(videos) == before | tree(tmp_path / "out")
