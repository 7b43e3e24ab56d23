"""A video -> evenly spaced frames; an archive -> its videos."""

import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from itertools import chain
from pathlib import Path

import av
import PIL
from PIL import Image

from phi3v.errors import DataError

JPEG_QUALITY = 95
# ffmpeg would open the files that playlists (concat, HLS, DASH) name, wherever they are. So only
# formats that hold a video whole are read, and no file or address is opened.
CONTAINERS = "asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,mpegvideo"
ONE_FILE = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
MAX_PIXELS = 1 << 25  # of a frame, which is 8K: dozens of them are held in memory
# Images that other versions made may differ in their pixels, and are made anew.
MADE_BY = f"PyAV {av.__version__}, Pillow {PIL.__version__}"


def frame_indices(count: int, num_frames: int) -> list[int]:
    """The frames to take of a video of `count` frames, (num_frames,); a short one repeats."""
    return [i * count // num_frames for i in range(num_frames)]


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


def guess_count(path: Path) -> int:
    """The number of frames as the header or, in mkv and webm, the number of packets has it."""
    with open_video(path) as (container, stream):
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def decode(path: Path, keep: set[int]) -> tuple[dict[int, av.VideoFrame], int, list[str]]:
    """
    Decode a video to its end. A damaged packet is skipped.

    Returns the frames whose index is in `keep`, the number of all frames, and what was wrong.
    """
    frames: dict[int, av.VideoFrame] = {}
    count = num_packets = num_damaged = 0
    with open_video(path) as (container, stream):
        promised = stream.frames
        if not promised and container.duration and stream.average_rate:
            promised = round(container.duration / av.time_base * stream.average_rate)
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
                if count in keep:
                    frames[count] = frame
                count += 1
    warnings = [f"{num_damaged} damaged packets skipped"] if num_damaged else []
    if num_packets < 0.9 * promised - 2:  # what it promises is not always exact
        warnings.append(f"cut off: about {promised} frames promised, {count} found")
    return frames, count, warnings


def read_frames(path: Path, num_frames: int) -> tuple[list[av.VideoFrame], str]:
    """
    Evenly spaced frames of a video, (num_frames,), and what is wrong with it, or "".

    They are exact: frame floor(i * n / num_frames) of the n that really decode, in the order of
    display. Seeking finds other frames where there are B-frames, and headers lie about n.

    Raises:
        ValueError: no frames that can be decoded. OSError, av.FFmpegError: it cannot be read.
    """
    # Sound videos, too, have a frame or two more or less than they say. So what any number near
    # it needs is kept, and only a video that is further off is decoded a second time.
    guess = guess_count(path)
    near = range(guess - 2, guess + 3)
    keep = {i for count in near for i in frame_indices(count, num_frames)}
    frames, count, warnings = decode(path, keep)
    if count == 0:
        raise ValueError("no frame can be decoded")
    if count < num_frames:
        warnings.append(f"frames repeat: it has {count}, fewer than {num_frames}")
    wanted = frame_indices(count, num_frames)
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
