"""Videos of which only a part is decoded: the frames and warnings of decoding all."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.data import seeking, video
from phi3v.data.sampling import Sampling

MISSING = {"libx264", "libx265", "libvpx", "libvpx-vp9", "libsvtav1"} - av.codecs_available
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"PyAV without {MISSING}")

# One thread each: these start many, and the videos are small.
OPTIONS = {
    "libx264": {"preset": "fast", "threads": "1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libvpx": {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "libvpx-vp9": {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}
MILLISECOND = Fraction(1, 1000)
EIGHT = Sampling()


def write(
    path: Path,
    num_frames: int = 70,
    codec: str = "libx264",
    gop: int = 12,
    stamps: list[int] | None = None,
    seed: int = 0,
    **options: str,
) -> Path:
    """A picture of random squares that moves: no two frames are alike. `stamps` are in ms."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(0, 256, (12, 16, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=OPTIONS.get(codec, {}) | options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec in ("mpeg4", "mpeg2video"):
            stream.bit_rate, stream.codec_context.max_b_frames = 400_000, 2
        if stamps:
            stream.codec_context.time_base = MILLISECOND
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, (i, 2 * i), (0, 1)))
            if stamps:
                frame.pts, frame.time_base = stamps[i], MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(
    source: Path, path: Path, change: Callable[[list], None] = lambda packets: None, **options: str
) -> Path:
    """The packets of a video in another file, changed in between."""
    if path.suffix == ".mkv":
        options["avoid_negative_ts"] = "disabled"
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.size]
        change(packets)
        for i, packet in enumerate(packets):
            if path.suffix == ".mkv":  # which has no dts: so these allow any pts
                packet.dts = i - 1_000_000
            packet.stream = stream
            new.mux(packet)
    return path


def both_ways(path: Path, sampling: Sampling = EIGHT) -> bool:
    """
    Compares the frames and warnings of a video with those of decoding all of it, to the bit; these
    may be errors. Returns whether only a part was decoded.
    """

    def read():
        try:
            frames, warning = video.read_frames(path, sampling)
        except (ValueError, av.FFmpegError) as error:
            return repr(error)
        return [frame.to_ndarray().tobytes() for frame in frames], warning

    sought = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeking, "WORTH", 10)  # however little is saved
        seek = video.seek
        patch.setattr(video, "seek", lambda *args: sought.append(seek(*args)) or sought[-1])
        partly = read()
        patch.setattr(video, "seek", lambda *args: None)
        assert partly == read()
    return bool(sought and sought[0])


def index_of(path: Path) -> seeking.Index:
    with video.open_video(path) as opened:
        return seeking.read_index(*opened)


# ---- Sound videos ----

SOUND = {
    "H.264.mp4": {},
    "H.264.mkv": {},
    "no B-frames.mp4": {"bf": "0"},
    "one key frame.mp4": {"gop": 1000},
    "all key frames.mp4": {"gop": 1},
    "open GOP.mp4": {"x264-params": "open-gop=1:bframes=3:b-adapt=0"},
    "open GOP.mkv": {"x264-params": "open-gop=1:bframes=3:b-adapt=0"},
    "slices.mp4": {"x264-params": "slices=4:aud=1"},
    "in-band parameters.mkv": {"x264-params": "repeat-headers=1"},
    "gradual refresh.mp4": {"x264-params": "intra-refresh=1"},
    "late start.mp4": {"stamps": [5000 + 40 * i for i in range(70)]},
    "variable rate.mp4": {"stamps": [i * i + 20 * i for i in range(70)]},
    "variable rate.mkv": {"stamps": [40 * i + 7 * i * i % 39 for i in range(70)]},
    "leading frames that decode.mp4": {
        "codec": "libx265",
        "x265-params": OPTIONS["libx265"]["x265-params"]
        + ":open-gop=0:radl=2:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0",
    },
    "HEVC.mp4": {"codec": "libx265"},
    "HEVC.mkv": {"codec": "libx265"},
    "VP9.webm": {"codec": "libvpx-vp9"},
    "VP9.mp4": {"codec": "libvpx-vp9"},
    "AV1.mp4": {"codec": "libsvtav1"},
    "AV1.mkv": {"codec": "libsvtav1"},
}
SAMPLINGS = [EIGHT, Sampling(21), Sampling(fps=Fraction(7)), Sampling(8, Fraction(9, 2), 5)]


@pytest.mark.parametrize("name", SOUND)
def test_sound_videos(tmp_path: Path, name: str):
    """Decoded in part, whatever the codec's way to order frames and to refer to others."""
    path = write(tmp_path / name, **SOUND[name])
    for sampling in SAMPLINGS:
        assert both_ways(path, sampling)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num_frames=st.integers(6, 90),
    gop=st.integers(1, 40),
    b_frames=st.integers(0, 4),
    codec=st.sampled_from(["libx264", "libx265"]),
    more=st.sampled_from(["open-gop=1", "open-gop=0", "b-adapt=2", "scenecut=0:ref=4"]),
    suffix=st.sampled_from(["mp4", "mkv", "mov"]),
    stamps=st.lists(st.integers(1, 79), min_size=90, max_size=90),
    sampling=st.sampled_from(SAMPLINGS),
)
def test_any_structure(
    tmp_path_factory, num_frames, gop, b_frames, codec, more, suffix, stamps, sampling
):
    """GOPs of all lengths, closed and open, with B-frames in every depth and any frame rate."""
    key = f"{codec[3:]}-params"
    params = f"{more}:bframes={b_frames}:min-keyint=1:{OPTIONS[codec].get(key, '')}"
    path = tmp_path_factory.mktemp("any") / f"v.{suffix}"
    times = np.cumsum(stamps).tolist()
    write(path, num_frames, codec, gop, times, **{key: params.rstrip(":")})
    repeats = sampling.fps is None and num_frames < sampling.num_frames
    sought = both_ways(path, sampling)
    # An mkv has no number of frames. It may promise too many, by its duration and usual rate.
    assert sought != repeats or suffix == "mkv"


def test_leading_frames_of_an_open_gop(tmp_path: Path):
    """Frames that are decoded after a key frame and shown before it are those of the GOP before."""
    params = OPTIONS["libx265"]["x265-params"] + ":open-gop=1:bframes=3:b-adapt=0"
    path = write(tmp_path / "v.mkv", codec="libx265", **{"x265-params": params})
    index = index_of(path)
    leading = [
        number
        for start, packet in zip(index.starts, index.packets, strict=True)
        for number in range(packet, start)
    ]
    assert len(leading) > 4
    numbers = iter(leading)
    for number in numbers:
        choose = lambda self, times, number=number: [number]  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampling, "choose", choose)
            assert both_ways(path)


def test_h264_starts_at_idr_frames_only(tmp_path: Path):
    """An open GOP's key frame of H.264 does not reset the decoder: not all of it is told there."""
    params = {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}
    path = write(tmp_path / "v.mp4", **params)
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 3
    assert index_of(path).starts == [0]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_what_is_decoded(tmp_path: Path, monkeypatch, name: str):
    """One frame of each GOP, if 8 of 16 GOPs are hit at their start, not all 400 packets."""
    path = write(tmp_path / name, 400, gop=25, **{"x264-params": "scenecut=0"})

    class Counting:
        options, count = {}, 0

        def __init__(self, codec):
            self.codec = codec

        def __getattr__(self, name):
            return getattr(self.codec, name)

        def decode(self, packet):
            self.count += 1
            return self.codec.decode(packet)

    index = index_of(path)
    assert index.starts == list(range(0, 400, 25))
    assert index.saves([0, 50, 350]) and not index.saves([*range(20, 400, 25)])
    with video.open_video(path) as (container, stream):
        codec = Counting(stream.codec_context)
        opened = SimpleNamespace(demux=lambda _: container.demux(stream))
        counted = SimpleNamespace(codec_context=codec)
        found = seeking.decode_wanted(opened, counted, index, [0, 50, 350])
    assert len(found) == 3
    assert 3 <= codec.count < 30


# ---- Videos that leave a doubt ----


def change_bytes(path: Path, number: int, change: Callable[[bytearray], None]) -> Path:
    """Change the bytes of a packet where they lie in the file."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        place = slice(packet.pos, packet.pos + packet.size)
    data = bytearray(path.read_bytes())
    part = data[place]
    change(part)
    data[place] = part
    path.write_bytes(data)
    return path


def spoil(part: bytearray) -> None:
    """The picture of a packet, not its first headers."""
    part[6:] = bytes(byte ^ 0xFF for byte in part[6:])


def misplace(part: bytearray) -> None:
    """Another place in the order of display, in the header of a slice of HEVC."""
    part[7] ^= 0xFF


def break_header(part: bytearray) -> None:
    """A slice of H.264 of no type that there is."""
    part[5:12] = b"\x80" + bytes(6)


def cut(path: Path, share: float) -> Path:
    os.truncate(path, int(share * path.stat().st_size))
    return path


def swap_stamps(packets: list) -> None:
    packets[5].pts, packets[6].pts = packets[6].pts, packets[5].pts


def misplace_end(packets: list) -> None:
    """The stamps of the last five say that they are shown in the middle."""
    for i, packet in enumerate(packets[-5:], start=1):
        packet.pts = packets[30].pts + i * packet.duration // 8


def repeat_stamp(packets: list) -> None:
    packets[45].pts = packets[44].pts


def put_together(packets: list) -> None:
    """Two frames in a packet, as in XVID's avi."""
    one, other = packets[9], packets.pop(10)
    packets[9] = av.Packet(bytes(one) + bytes(other))
    packets[9].pts, packets[9].dts, packets[9].time_base = one.pts, one.dts, one.time_base


def shift_stamps(by: int) -> Callable[[list], None]:
    """Of the second half, by as many frames."""

    def shift(packets: list) -> None:
        for packet in packets[35:]:
            packet.pts -= int(by * packet.duration)

    return shift


def cut_start(packets: list) -> None:
    """As an editor cuts a video without encoding it: what comes before is there, but not shown."""
    for packet in packets:
        packet.pts -= 10 * packet.duration
        packet.dts -= 10 * packet.duration


def add_empty_unit(packets: list) -> None:
    packets[4:4] = [av.Packet(b"\x12\x00")]  # AV1's mark that a frame begins, without a frame
    packets[4].pts = packets[4].dts = packets[3].pts + 10
    packets[4].time_base = packets[3].time_base


def empty_sample(path: Path) -> Path:
    """An mp4 that says of frame 20 that it has no bytes."""
    data = path.read_bytes()
    entry = data.index(b"stsz") + 16 + 4 * 20
    path.write_bytes(data[:entry] + bytes(4) + data[entry + 4 :])
    return path


def two_in_one(folder: Path, codec: str, suffix: str) -> Path:
    """Two videos of different parameters one after the other, each with its own in the stream."""
    parts = [
        write(folder / "1.ts", codec=codec, **{"refs": "1", "bf": "0"}),
        write(folder / "2.ts", codec=codec, seed=1, **{"refs": "4", "bf": "0"}),
    ]
    opened = [av.open(str(part)) for part in parts]
    with av.open(str(folder / f"v.{suffix}"), "w") as new:
        stream = new.add_stream_from_template(opened[0].streams.video[0])
        for i, container in enumerate(opened):
            for packet in container.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts = packet.pts + i * 270_000, packet.dts + i * 270_000
                    packet.stream = stream
                    new.mux(packet)
            container.close()
    return folder / f"v.{suffix}"


NO_B = {"bf": "0"}  # With B-frames, x264 writes other bits each time in so small a video.
HEVC, VP9, AV1 = ({"codec": codec} for codec in ("libx265", "libvpx-vp9", "libsvtav1"))
DOUBTFUL: dict[str, Callable[[Path], Path]] = {
    "MPEG-4 in avi": lambda f: write(f / "v.avi", codec="mpeg4"),
    "MPEG-4 in mp4": lambda f: write(f / "v.mp4", codec="mpeg4"),
    "MPEG-2": lambda f: write(f / "v.mpg", codec="mpeg2video"),
    "ts": lambda f: write(f / "v.ts"),
    "flv": lambda f: write(f / "v.flv"),
    "VP8, with hidden frames": lambda f: write(f / "v.webm", codec="libvpx"),
    "interlaced": lambda f: write(f / "v.mp4", flags="+ilme+ildct"),
    "decoded packet damaged": lambda f: change_bytes(write(f / "v.mp4", **NO_B), 4, spoil),
    "decoded packet damaged, HEVC": lambda f: change_bytes(write(f / "v.mp4", **HEVC), 4, spoil),
    "decoded packet damaged, VP9": lambda f: change_bytes(write(f / "v.mp4", **VP9), 4, spoil),
    "decoded packet damaged, AV1": lambda f: change_bytes(write(f / "v.mp4", **AV1), 1, spoil),
    "leading frame damaged, HEVC": lambda f: change_bytes(write(f / "v.mp4", **HEVC), 22, misplace),
    "other packet empty": lambda f: change_bytes(
        write(f / "v.mp4", **NO_B), 10, lambda part: part.__setitem__(slice(None), bytes(len(part)))
    ),
    "cut off mp4": lambda f: cut(remux(write(f / "a.mp4"), f / "v.mp4", movflags="faststart"), 0.7),
    "mp4 without index": lambda f: cut(write(f / "v.mp4"), 0.7),
    "cut off mkv": lambda f: cut(write(f / "v.mkv"), 0.7),
    "late start of mkv, whose duration has it": lambda f: write(
        f / "v.mkv", stamps=[5000 + 40 * i for i in range(70)]
    ),
    "stamps swapped": lambda f: remux(write(f / "a.mp4", **NO_B), f / "v.mkv", swap_stamps),
    "two frames in a packet": lambda f: remux(
        write(f / "a.mp4", **NO_B), f / "v.mkv", put_together
    ),
    "end misplaced": lambda f: remux(write(f / "a.mp4", **NO_B), f / "v.mkv", misplace_end),
    "one stamp twice": lambda f: remux(write(f / "a.mp4", **NO_B), f / "v.mkv", repeat_stamp),
    "stamps twice": lambda f: remux(write(f / "a.mp4", **NO_B), f / "v.mkv", shift_stamps(10)),
    "stamps fall": lambda f: remux(write(f / "a.mp4", **NO_B), f / "v.mkv", shift_stamps(20.5)),
    "edit list": lambda f: remux(write(f / "a.mp4"), f / "v.mp4", cut_start),
    "starts late": lambda f: remux(write(f / "a.mp4"), f / "v.mkv", lambda all: all.pop(0)),
    "packet of no frame": lambda f: remux(write(f / "a.mp4", **AV1), f / "v.mp4", add_empty_unit),
    "packet of no bytes": lambda f: empty_sample(write(f / "v.mp4")),
    "two in one, H.264": lambda f: two_in_one(f, "libx264", "mkv"),
    "two in one, HEVC": lambda f: two_in_one(f, "libx265", "mkv"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubtful_videos(tmp_path: Path, name: str):
    """All is decoded where packets do not tell which frames there are, or a frame is damaged."""
    path = DOUBTFUL[name](tmp_path)
    for sampling in SAMPLINGS:
        assert not both_ways(path, sampling)


def hide_cues(path: Path) -> Path:
    """An mkv whose index cannot be found."""
    path.write_bytes(path.read_bytes().replace(b"\x1c\x53\xbb\x6b", b"\x1c\x53\xbb\x6c"))
    return path


def test_index_of_the_file_is_not_used(tmp_path: Path):
    """An mkv is read from its beginning to its end, with an index or without."""
    assert both_ways(hide_cues(write(tmp_path / "v.mkv", 200)))


def test_damage_that_is_not_decoded(tmp_path: Path):
    """The frames are those of the sound video, and there is no warning: nobody looked there."""
    path = write(tmp_path / "v.mp4", 400, gop=50, **NO_B)
    frames, _ = video.read_frames(path, EIGHT)
    change_bytes(path, 45, break_header)
    again, warning = video.read_frames(path, EIGHT)
    for one, other in zip(frames, again, strict=True):
        assert np.array_equal(one.to_ndarray(), other.to_ndarray())
    assert warning == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "seek", lambda *args: None)
        assert "damaged" in video.read_frames(path, EIGHT)[1]
