"""
Check a jsonl file of conversations and its images, without training on it:

    python -m phi3v.check FILE --image_dir DIR

Every line is read and every image decoded. Bad samples are listed with the reason, and a summary
with the lengths in tokens follows. The exit status is 0 if all is good, 1 if a sample is bad, and 2
if the command is wrong.
"""

import argparse
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from .data.conversations import LineChecker, image_sizes
from .data.images import images_of, read_image
from .data.json_lines import parse_line, read_lines
from .errors import DataError, plain_message, quoted
from .model.image_processing_phi3_v import Phi3VImageProcessor


def main(argv: list[str] | None = None) -> int:
    """Check, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3v.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="one conversation a line")
    parser.add_argument(
        "--image_dir",
        type=Path,
        metavar="DIR",
        required=True,
        help="the folder that image paths are relative to",
    )
    parser.add_argument(
        "--num_crops",
        type=int,
        metavar="N",
        default=16,
        help="as it will be trained, 1 to 16 (default: 16; the UCF-101 recipe has 4)",
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="PATH",
        help="whose tokenizer counts tokens: hub id or local folder; without it, only the tokens "
        "of images are counted",
    )
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="no progress bar")
    args = parser.parse_args(argv)
    if not 1 <= args.num_crops <= 16:
        parser.error(f"--num_crops must be 1 to 16, not {args.num_crops}.")
    if not os.path.isfile(args.file):
        parser.error(f"FILE {quoted(str(args.file))} is no file. Check the path.")
    if not os.path.isdir(args.image_dir):
        parser.error(f"--image_dir {quoted(str(args.image_dir))} is no folder. Check the path.")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    try:
        status = _status(args)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`; Python would print what is left when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    return status


def _status(args: argparse.Namespace) -> int:
    try:
        return _check_file(args)
    except DataError as error:  # of the file as a whole
        print(plain_message(error))
        return 1


def _check_file(args: argparse.Namespace) -> int:
    image_processor, count, counted = _token_counter(args)
    checker = LineChecker(args.file, args.image_dir)
    counts, lengths = Counter(), array("L")
    hidden = None if args.tqdm else True  # None: hidden where nobody watches
    bar = tqdm(read_lines(args.file), "checking", unit="sample", leave=False, disable=hidden)
    for number, line in bar:
        counts["samples"] += 1
        try:
            record = checker.check(number, line)
            for field, image in images_of(record):
                where = f"{args.file}, line {number}: sample {quoted(record['id'])}, {field}"
                read_image(image, where, image_processor)
            lengths.append(count(record))
        except DataError as error:
            counts["bad"] += 1
            counts["no answer"] += _unanswered(line)
            tqdm.write(plain_message(error))
            continue
        images = len(images_of(record))
        counts["turns"] += len(record["conversations"])
        counts["images"] += images
        counts["no image"] += images == 0
    good = counts["samples"] - counts["bad"]
    print(
        f"{args.file}: {counts['samples']:,} samples, {counts['bad']:,} of them bad\n"
        f"turns without an answer: {counts['no answer']:,}\n"
        f"the {good:,} good samples: {counts['turns']:,} turns, {counts['images']:,} images, "
        f"{counts['no image']:,} samples without an image"
    )
    if lengths:
        print(f"{counted} a sample: {_distribution(lengths)}")
    return 1 if counts["bad"] else 0


def _token_counter(
    args: argparse.Namespace,
) -> tuple[Phi3VImageProcessor, Callable[[dict], int], str]:
    """The image processor, what counts a record's tokens, and what it counts in words."""
    image_processor = Phi3VImageProcessor(num_crops=args.num_crops)

    def count_image_tokens(record: dict) -> int:
        count = image_processor.calc_num_image_tokens_from_image_size
        return sum(count(*size) for size in image_sizes(record))

    only_images = image_processor, count_image_tokens, "image tokens"
    path = args.model_name_or_path
    if path is None:
        return only_images
    try:
        # Imported here: they bring the whole of training with them.
        from .data.packing import count_tokens
        from .training.loading import load_processor

        processor = load_processor(args)
    except Exception as error:  # no network, no such folder, a broken file
        print(
            f"--model_name_or_path {path} cannot be loaded, so only the tokens of images are "
            f"counted: {plain_message(error)}"
        )
        return only_images
    return processor.image_processor, lambda record: count_tokens(processor, record), "tokens"


def _unanswered(line: bytes) -> int:
    """How many turns of a bad line have no assistant's text, as far as it can be read."""
    try:
        turns = parse_line(line, "")["conversations"]
        return sum(not str(turn.get("assistant") or "").strip() for turn in turns)
    except (DataError, AttributeError, KeyError, TypeError):
        return 0


def _distribution(lengths: array) -> str:
    lengths = sorted(lengths)
    points = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
    return ", ".join(
        f"{name} {lengths[round(share * (len(lengths) - 1))]:,}" for name, share in points.items()
    )


if __name__ == "__main__":
    sys.exit(main())
