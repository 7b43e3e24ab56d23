"""A video -> some of its frames; an archive -> its videos."""

import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from itertools import chain
from pathlib import Path

import av
import PIL
from PIL import Image

from phi3v.data.sampling import Sampling, Times
from phi3v.data.seeking import Index, NotSure, decode_wanted, read_index
from phi3v.errors import DataError

JPEG_QUALITY = 95
# ffmpeg would open the files that playlists (concat, HLS, DASH) name, wherever they are. So only
# formats that hold a video whole are read, and no file or address is opened.
CONTAINERS = "asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,mpegvideo"
ONE_FILE = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
MAX_PIXELS = 1 << 25  # of a frame, which is 8K: dozens of them are held in memory
# Images that other versions made may differ in their pixels, and are made anew.
MADE_BY = f"PyAV {av.__version__}, Pillow {PIL.__version__}"


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with ExitStack() as stack:
        # An open file, not a name: ffmpeg itself then opens nothing.
        file = stack.enter_context(path.open("rb"))
        try:
            container = av.open(file, options=ONE_FILE, metadata_errors="replace")
        except av.ArgumentError as error:
            raise ValueError(f"its format is none of {CONTAINERS}") from error
        stream = stack.enter_context(container).streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video stream that can be decoded")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"its frames of {stream.width} x {stream.height} are larger than 8K")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # where the size changes
        # The workers share the cores; threads inside one decoder do not pay.
        stream.codec_context.thread_count = 1
        yield container, stream


def promised_frames(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """The number of frames by the header, or by its duration; 0 if it has neither."""
    if not stream.frames and container.duration and stream.average_rate:
        return round(container.duration / av.time_base * stream.average_rate)
    return stream.frames


def cut_off(promised: int, num_packets: int) -> bool:
    """Whether a video ends early; what it promises is not always exact."""
    return num_packets < 0.9 * promised - 2


def average_duration(stream: av.VideoStream) -> Fraction:
    """Seconds of a frame; ffmpeg, too, takes 1 / 25 where nothing tells."""
    return 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))


def survey(path: Path) -> tuple[Index | None, list[Times]]:
    """
    What can be known of a video without decoding it: its frames, where packets and header agree and
    leave no doubt, and when these may be shown.
    """
    with open_video(path) as (container, stream):
        average, count = average_duration(stream), stream.frames
        with suppress(NotSure):
            index = read_index(container, stream)
            if not cut_off(promised_frames(container, stream), len(index.stamps)):
                return index, [Times(index.stamps, stream.time_base)]
    if not count:  # as in mkv and webm
        with open_video(path) as (container, stream):
            count = sum(packet.size > 0 for packet in container.demux(stream))
    # Sound videos, too, have a frame or two more or less than they say.
    return None, [Times(range(number), average) for number in range(count - 2, count + 3)]


def decode(path: Path, keep: set[int]) -> tuple[dict[int, av.VideoFrame], Times, list[str]]:
    """
    Decode a video to its end. A damaged packet is skipped.

    Returns the frames whose index is in `keep`, the times of all, and what was wrong.
    """
    frames: dict[int, av.VideoFrame] = {}
    stamps: list[int | None] = []
    num_packets = num_damaged = 0
    with open_video(path) as (container, stream):
        promised = promised_frames(container, stream)
        for packet in chain(container.demux(stream), [None]):  # None: give out what is held back
            num_packets += 1
            # An empty packet ends the decoding, so one in mid-file must not reach the decoder.
            if packet is not None and packet.size == 0:
                continue
            try:
                decoded = stream.codec_context.decode(packet)
            except av.FFmpegError:
                num_damaged += 1
                continue
            for frame in decoded:
                if len(stamps) in keep:
                    frames[len(stamps)] = frame
                stamps.append(frame.pts)
        times = Times.of_frames(stamps, stream.time_base, average_duration(stream))
    warnings = [f"{num_damaged} damaged packets skipped"] if num_damaged else []
    if cut_off(promised, num_packets):
        warnings.append(f"cut off: about {promised} frames promised, {len(stamps)} found")
    return frames, times, warnings


def seek(path: Path, index: Index, wanted: list[int]) -> list[av.VideoFrame] | None:
    """The frames `wanted`, decoded alone; None where that is not sure or saves too little."""
    if index.saves(wanted):
        with suppress(NotSure, av.FFmpegError), open_video(path) as (container, stream):
            return decode_wanted(container, stream, index, wanted)
    return None


def read_frames(path: Path, sampling: Sampling) -> tuple[list[av.VideoFrame], str]:
    """
    The frames of a video that `sampling` chooses, and what is wrong with it, or "".

    They are exact: chosen of the n frames that really decode, in the order of display. Headers lie
    about n, and a seek finds other frames where there are B-frames. So all is decoded, unless the
    packets leave no doubt and what leads to the wanted frames is much less. The frames are the
    same then; but elsewhere damage is not noticed, nor the frames that it takes away from n.

    Raises:
        ValueError: no frames that can be decoded. OSError, av.FFmpegError: it cannot be read.
    """
    index, guesses = survey(path)
    if index is not None and (found := seek(path, index, sampling.choose(guesses[0]))):
        return found, ""
    # What any guess needs is kept, and only a video that is further off is decoded a second time.
    keep = {i for times in guesses for i in sampling.choose(times)}
    frames, times, warnings = decode(path, keep)
    wanted, count = sampling.choose(times), len(times.ticks)
    if count == 0:
        raise ValueError("no frame can be decoded")
    if len(set(wanted)) < len(wanted):
        warnings.append(f"frames repeat: it has {count}, fewer than {sampling.num_frames}")
    if not keep.issuperset(wanted):
        frames, _, _ = decode(path, set(wanted))
    return [frames[i] for i in wanted], "; ".join(warnings)


def to_jpeg(frame: av.VideoFrame) -> bytes:
    rgb = frame.reformat(format="rgb24", threads=1)  # to start threads costs more than they gain
    buffer = BytesIO()
    Image.fromarray(rgb.to_ndarray()).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def reason(error: Exception) -> str:
    """The message of an error of the system, ffmpeg or a decompressor."""
    return getattr(error, "strerror", None) or str(error) or repr(error)


def extract_archive(archive: Path, folder: Path, max_gb: int) -> None:
    """
    Extract a tar into an empty folder. Nothing gets out of it.

    Raises:
        DataError: the archive is broken, or has members that lead out of the folder.
    """

    def check(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        if member.name.startswith("/"):  # the filter would only strip it
            raise tarfile.AbsolutePathError(member)
        if member.size > max_gb << 30:
            raise ValueError(f"{member.name!r} is larger than --max_video_gb {max_gb}")
        return tarfile.data_filter(member, path)

    try:
        if archive.exists() and not archive.is_file():  # a pipe or a device may have no end
            raise ValueError("not a regular file")
        with tarfile.open(archive, "r:*") as tar:
            tar.extractall(folder, filter=check)
            # tarfile takes a damaged header for the end: a smaller dataset, without a word.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is damaged or cut off")
    except Exception as error:  # those of tarfile and of all decompressors
        raise DataError(f"{archive} cannot be extracted to {folder}: {reason(error)}") from error
