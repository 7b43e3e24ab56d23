"""
Images per second of one core: from a file, and from a decoded image, to the model's input.

    python -m benchmarks.preprocessing

Both sides give the same pixels to the last bit, which is checked first. One thread.
"""

import io
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks.baseline import preprocess
from benchmarks.side_by_side import in_turns, make_parser, ratios, report, spread
from phi3v import Phi3VImageProcessor

KINDS = {
    "letter page, PNG": (1700, 2200, "PNG"),
    "letter page, JPEG": (1700, 2200, "JPEG"),
    "photo, JPEG": (640, 480, "JPEG"),
    "video frame, JPEG": (320, 240, "JPEG"),
}


def make_file(width: int, height: int, file_format: str, seed: int) -> bytes:
    """
    A picture between a flat one and noise: a page is white with dark lines of letters, other
    pictures are smooth shapes with some grain.
    """
    rng = np.random.default_rng(seed)
    if height > width:
        page = np.full((height, width, 3), 255, dtype=np.uint8)
        for top in range(100, height - 100, 40):
            letters = rng.integers(0, 2, (12, (width - 200) // 6), dtype=np.uint8) * 200
            page[top : top + 24, 100 : 100 + letters.shape[1] * 6] = (
                255 - np.kron(letters, np.ones((2, 6), dtype=np.uint8))[..., None]
            )
        image = Image.fromarray(page)
    else:
        shapes = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(shapes).resize((width, height)), dtype=np.int16)
        grain = rng.integers(-8, 9, (height, width, 3))
        image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    content = io.BytesIO()
    image.save(content, file_format)
    return content.getvalue()


def read(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def ours(processor: Phi3VImageProcessor, image: Image.Image) -> torch.Tensor:
    return processor([image], return_tensors="pt")["pixel_values"]


def baseline(num_crops: int, image: Image.Image) -> torch.Tensor:
    return preprocess([image], num_crops)["pixel_values"]


def seconds(work: Callable[[Image.Image], torch.Tensor], source: Image.Image | bytes) -> float:
    """Of one image's preprocessing; of a file, decoding included."""
    start = time.perf_counter()
    work(read(source) if isinstance(source, bytes) else source)
    return time.perf_counter() - start


def main():
    parser = make_parser(__doc__, rounds=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, (width, height, file_format) in KINDS.items():
        file = make_file(width, height, file_format, seed=0)
        decoded = read(file)
        for num_crops in (16, 4):
            sides = {
                "ours": partial(ours, Phi3VImageProcessor(num_crops=num_crops)),
                "baseline": partial(baseline, num_crops),
            }
            assert torch.equal(sides["ours"](decoded), sides["baseline"](decoded))
            for start, source in (("decoded", decoded), ("file", file)):
                measured = in_turns(
                    {name: partial(seconds, work, source) for name, work in sides.items()},
                    args.rounds,
                )
                per_second = {
                    name: [1 / value for value in times] for name, times in measured.items()
                }
                rows.append(
                    [
                        *(kind, str(num_crops), start),
                        *(spread(per_second["ours"], 1), spread(per_second["baseline"], 1)),
                        ratios(measured["baseline"], measured["ours"]),
                    ]
                )
    header = ["image", "num_crops", "from", "ours, images/s", "baseline, images/s", "ratio"]
    report("Preprocessing on one core", header, rows, args.save)


if __name__ == "__main__":
    main()
