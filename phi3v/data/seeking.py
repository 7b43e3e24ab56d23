"""
Some frames of a video, without decoding all of it.

All packets are read, which costs 1 to 2 % of decoding them, and those from the key frame before a
wanted frame up to it are decoded. So neither an index of the file is believed nor a seek. Which
frames there are is known from the packets, if they leave no doubt: `NotSure` means to decode all.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import av

# Here every packet has a time stamp that the file holds, and gives one frame. Not so in avi, mpeg
# and ts (stamps that are guessed, several frames or half of one) and VP8 (frames that stay hidden).
FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
CODECS = {"h264", "hevc", "vp9", "libdav1d"}
MAX_REORDER = 16  # packets by which display and decoding differ: the most that H.264 and HEVC can
WORTH = 0.75  # of the packets: where more are to be decoded, to decode all is as fast


class NotSure(Exception):
    """The packets do not tell which frames there are."""


class Index(NamedTuple):
    """The n frames of a video, in the order of display."""

    stamps: list[int]  # (n,), rising, in units of the stream's time base
    starts: list[int]  # frames from which those that follow can be decoded, rising
    packets: list[int]  # in which packet each of these is, rising

    def start_before(self, number: int) -> int:
        """Which of `starts` is the last one that is not after a frame."""
        return bisect_right(self.starts, number) - 1

    def saves(self, wanted: list[int]) -> bool:
        """Whether few enough packets are to be decoded for these frames, which rise."""
        ends = {self.start_before(number): number for number in wanted}
        needed = sum(end - self.starts[start] + 1 for start, end in ends.items())
        return needed < WORTH * len(self.stamps)


class NalUnits(NamedTuple):
    """NAL units of H.264 or HEVC: table 7-1 of either standard, and ISO 14496-15 for mp4."""

    shift: int  # of the type, in the first byte
    mask: int
    header: int  # bytes before a slice's own, whose first bit says that a picture begins
    length_at: int  # where the configuration of mp4 and mkv tells the size of the units' lengths
    slices: set[int]
    starts: set[int]  # slices of pictures after which, in display, nothing needs what was before
    parameters: set[int]


NAL_UNITS = {
    "h264": NalUnits(
        shift=0,
        mask=31,
        header=1,
        length_at=4,
        slices={1, 5},
        starts={5},  # IDR; other key frames need not reset all of the decoder
        parameters={7, 8},
    ),
    "hevc": NalUnits(
        shift=1,
        mask=63,
        header=2,
        length_at=21,
        slices={*range(10), 19, 20, 21},
        starts={19, 20, 21},  # IDR and CRA, of whose leading pictures the decoder drops some
        parameters={32, 33, 34},
    ),
}


def split_units(data: memoryview, length_size: int, shortest: int) -> Iterator[memoryview]:
    """The NAL units of a packet; each stands behind its length."""
    while data:
        length = int.from_bytes(data[:length_size], "big")
        unit, data = data[length_size : length_size + length], data[length_size + length :]
        if len(unit) < max(length, shortest):  # the short ones end a sequence
            raise NotSure
        yield unit


class StartFinder:
    """
    Tells the packets at which decoding can start. Those of H.264 and HEVC are looked into: not all
    that files call key frames are, and one picture each, of never changing parameters, is expected.
    """

    def __init__(self, codec: av.VideoCodecContext):
        self.kinds = NAL_UNITS.get(codec.name)
        self.parameters: bytes | None = None
        configuration = codec.extradata or b""
        if self.kinds:
            if len(configuration) <= self.kinds.length_at:
                raise NotSure
            self.length_size = (configuration[self.kinds.length_at] & 3) + 1

    def is_start(self, packet: av.Packet) -> bool:
        if self.kinds is None:
            return packet.is_keyframe
        pictures, start, parameters = 0, False, b""
        for unit in split_units(memoryview(packet), self.length_size, self.kinds.header + 1):
            kind = unit[0] >> self.kinds.shift & self.kinds.mask
            if kind in self.kinds.slices:
                pictures += unit[self.kinds.header] >> 7
                start = kind in self.kinds.starts
            elif kind in self.kinds.parameters:
                parameters += bytes(unit)
        if start and self.parameters is None:
            self.parameters = parameters
        if pictures != 1 or parameters != (self.parameters if start else b""):
            raise NotSure
        return start


def read_index(container: av.container.InputContainer, stream: av.VideoStream) -> Index:
    """
    The frames that the packets of a video hold. Does not decode.

    Raises:
        NotSure: file or packets leave it open. av.FFmpegError: the file cannot be read.
    """
    codec = stream.codec_context
    if container.format.name not in FORMATS or codec.name not in CODECS:
        raise NotSure
    finder = StartFinder(codec)
    stamps: list[int] = []
    packets: list[int] = []
    latest = -1 << 63
    for packet in container.demux(stream):
        if packet.size == 0:  # the last one, which PyAV adds
            continue
        if packet.is_corrupt or packet.is_discard or packet.has_sidedata("new_extradata"):
            raise NotSure
        if packet.pts is None:
            raise NotSure
        if finder.is_start(packet) and packet.pts > latest:
            packets.append(len(stamps))
        latest = max(latest, packet.pts)
        stamps.append(packet.pts)
    rising = sorted(stamps)
    numbers = {stamp: number for number, stamp in enumerate(rising)}
    far = any(abs(numbers[stamp] - i) > MAX_REORDER for i, stamp in enumerate(stamps))
    if far or len(numbers) < len(stamps) or stream.frames not in (0, len(stamps)):
        raise NotSure
    starts = [numbers[stamps[i]] for i in packets]
    if starts[:1] != [0]:
        raise NotSure
    return Index(rising, starts, packets)


def decode_wanted(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: Index,
    wanted: list[int],
) -> list[av.VideoFrame]:
    """
    The frames of the numbers `wanted`, which rise. The container is at its beginning.

    Raises:
        NotSure: another frame came out than the index has. av.FFmpegError: something is damaged.
    """
    codec = stream.codec_context
    codec.options = {**codec.options, "err_detect": "explode"}  # conceal nothing
    frames: list[av.VideoFrame] = []
    missing = deque(wanted)
    first = number = None  # where decoding started, and the frame that comes next; None: it rests
    for i, packet in enumerate(chain(container.demux(stream), [None])):
        start = index.start_before(missing[0])
        if number is None and i == index.packets[start]:
            if codec.is_open:
                codec.flush_buffers()
            first = number = index.starts[start]
        if number is None or (packet is not None and packet.size == 0):
            continue
        for frame in codec.decode(packet):
            if frame.pts is None or frame.is_corrupt or frame.interlaced_frame:
                raise NotSure
            if number == first and frame.pts < index.stamps[first]:
                continue  # shown before the key frame; made of frames before it, perhaps
            if number == len(index.stamps) or frame.pts != index.stamps[number]:
                raise NotSure
            if missing and number == missing[0]:
                frames.append(frame)
                missing.popleft()
            number += 1
        if not missing:
            return frames
        if index.packets[index.start_before(missing[0])] > i:
            number = None
    raise NotSure
