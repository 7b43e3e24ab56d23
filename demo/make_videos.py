"""Make videos of handwritten digits that move, in an archive laid out like UCF101_subset.

    python -m demo.make_videos --out demo_output/UCF101_subset.tar.gz

The digits are scikit-learn's 1,797 real scans of 8x8 pixels; they come with the package, so nothing
is downloaded. Each clip shows one scan, enlarged to most of the picture, bouncing around. The scans
are split before any clip is made: no scan of val or test is ever seen in train. The same arguments
give the same archive, byte for byte.

Layout (a plain tar in spite of its name, as on the hub):

    UCF101_subset/{train,val,test}/<class>/v_<class>_g<scan>_c<clip>.avi

`g` is the scan's number in scikit-learn's table; clips of one scan differ in size, colour and path.
"""

import argparse
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image
from sklearn.datasets import load_digits

ROOT = "UCF101_subset"
SPLITS = ("train", "val", "test")
CLASSES = (
    "DigitZero",
    "DigitOne",
    "DigitTwo",
    "DigitThree",
    "DigitFour",
    "DigitFive",
    "DigitSix",
    "DigitSeven",
    "DigitEight",
    "DigitNine",
)

VAL_SCANS = 10  # scans a class that only val shows
TEST_SCANS = 40  # scans a class that only test shows; train has the rest, 124 or more

FRAME_SIZE = 56  # pixels, width and height
NUM_FRAMES = 16
FPS = 25


@dataclass(frozen=True)
class Clip:
    """One video to be made: which scan it shows, and the seed of all that is random in it."""

    split: str
    label: int
    scan: int
    number: int  # counts the clips of one scan, from 1
    seed: tuple[int, ...]

    @property
    def path(self) -> str:
        name = CLASSES[self.label]
        return f"{ROOT}/{self.split}/{name}/v_{name}_g{self.scan:04d}_c{self.number:02d}.avi"


def split_scans(labels: np.ndarray, seed: int) -> dict[str, list[list[int]]]:
    """Deal the scans out: split -> label -> scan numbers. No scan is in two splits."""
    scans: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    rng = np.random.default_rng(seed)
    for label in range(len(CLASSES)):
        shuffled = rng.permutation(np.flatnonzero(labels == label)).tolist()
        scans["val"].append(shuffled[:VAL_SCANS])
        scans["test"].append(shuffled[VAL_SCANS : VAL_SCANS + TEST_SCANS])
        scans["train"].append(shuffled[VAL_SCANS + TEST_SCANS :])
    return scans


def plan_clips(labels: np.ndarray, clips_per_class: dict[str, int], seed: int) -> Iterator[Clip]:
    """Every clip, in the order of the archive. A scan comes again once all have had a turn."""
    scans = split_scans(labels, seed)
    for split_index, split in enumerate(SPLITS):
        for label in range(len(CLASSES)):
            pool = scans[split][label]
            for i in range(clips_per_class[split]):
                turn, position = divmod(i, len(pool))
                # A seed of its own: a clip stays the same when the number of clips changes.
                clip_seed = (seed, split_index, label, i)
                yield Clip(split, label, pool[position], turn + 1, clip_seed)


def bounce(position: np.ndarray, limit: float) -> np.ndarray:
    """Fold a straight path back into [0, limit], as a ball between two walls moves."""
    return limit - np.abs(np.mod(position, 2 * limit) - limit)


def draw_frames(scan: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The clip of a scan (8, 8) with values 0 to 16: uint8 frames (FRAME_SIZE, FRAME_SIZE, 3)."""
    size = int(rng.integers(42, 50))
    ink = Image.fromarray((scan * 255 / 16).astype(np.uint8)).resize((size, size), Image.BICUBIC)
    mask = np.asarray(ink, dtype=np.float64)[:, :, None] / 255  # (size, size, 1)
    background = rng.uniform(0, 70, size=3)
    colour = rng.uniform(170, 255, size=3)

    room = FRAME_SIZE - size
    start = rng.uniform(0, 2 * room, size=2)
    velocity = rng.uniform(-2, 2, size=2)  # pixels a frame
    times = np.arange(NUM_FRAMES)[:, None]
    for top, left in bounce(start + velocity * times, room).round().astype(int):
        frame = np.broadcast_to(background, (FRAME_SIZE, FRAME_SIZE, 3)).copy()
        place = frame[top : top + size, left : left + size]
        place += mask * (colour - place)
        yield frame.round().astype(np.uint8)


def encode_avi(frames: Iterator[np.ndarray]) -> bytes:
    """Encode as UCF-101 is: MPEG-4 part 2 with the XVID tag in an .avi container."""
    buffer = io.BytesIO()
    # Without bitexact, the versions of the muxer and the encoder are written into the file.
    with av.open(buffer, "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 400_000
        stream.codec_context.codec_tag = "XVID"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_archive(out: Path, clips_per_class: dict[str, int], seed: int) -> int:
    """Write the archive and return the number of its clips."""
    digits = load_digits()
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as archive:
            for clip in plan_clips(digits.target, clips_per_class, seed):
                frames = draw_frames(digits.images[clip.scan], np.random.default_rng(clip.seed))
                data = encode_avi(frames)
                # TarInfo's defaults hold no clock and no user: mtime 0, uid 0, mode 0644.
                entry = tarfile.TarInfo(clip.path)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
                count += 1
        unfinished.replace(out)  # a reader finds the whole archive or none
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output/UCF101_subset.tar.gz"))
    parser.add_argument("--train_clips", type=int, default=120, help="training clips a class")
    parser.add_argument("--val_clips", type=int, default=10, help="validation clips a class")
    parser.add_argument("--test_clips", type=int, default=30, help="test clips a class")
    parser.add_argument("--seed", type=int, default=0, help="other scans, sizes, colours, motion")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    clips = {"train": args.train_clips, "val": args.val_clips, "test": args.test_clips}
    count = write_archive(args.out, clips, args.seed)
    print(f"{args.out}: {count} clips of {len(CLASSES)} classes")


if __name__ == "__main__":
    main()
