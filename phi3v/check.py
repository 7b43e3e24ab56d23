"""
Check a file of conversations and its images, without training on it:

    python -m phi3v.check FILE --image_dir DIR

FILE holds JSON lines or a list of the recipes' own records, or of conversations as LLaVA, TRL or
ms-swift have them. All are read and every image decoded. Bad samples are listed with the reason,
and a summary with the lengths in tokens follows. With --write OUT, the good samples are written as
records. The exit status is 0 if all is good, 1 if a sample is bad, and 2 if the command is wrong.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from .data.formats import load_records
from .data.images import image_sizes, load_images
from .errors import DataError, RunError, phase, plain_message, quoted
from .model.image_processing_phi3_v import Phi3VImageProcessor


def main(argv: list[str] | None = None) -> int:
    """Check, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3v.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="one conversation per line, or a JSON list")
    add("--image_dir", metavar="DIR", required=True, help="that image paths are relative to")
    add(
        "--num_crops",
        type=int,
        metavar="N",
        default=16,
        help="as it will be trained, 1 to 16 (default: 16; the UCF-101 recipe has 4)",
    )
    add(
        "--model_name_or_path",
        metavar="PATH",
        help="whose tokenizer counts tokens: hub id or local folder; without it, only the tokens "
        "of images are counted",
    )
    add("--model_revision", metavar="REV", help="of a hub id: the branch, tag or commit")
    add("--write", metavar="OUT", help="write the good samples to this jsonl, as records")
    add("--no-tqdm", dest="tqdm", action="store_false", help="no progress bar")
    args = parser.parse_args(argv)
    if not 1 <= args.num_crops <= 16:
        parser.error(f"--num_crops must be 1 to 16, not {args.num_crops}.")
    if not os.path.isfile(args.file):
        parser.error(f"FILE {quoted(args.file)} is no file. Check the path.")
    if not os.path.isdir(args.image_dir):
        parser.error(f"--image_dir {quoted(args.image_dir)} is no folder. Check the path.")
    if args.write and os.path.lexists(args.write):
        parser.error(f"--write {quoted(args.write)} exists already. Choose another name.")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    try:
        bad = _check_file(args)
        sys.stdout.flush()
    except (DataError, RunError) as error:  # of a file as a whole
        print(plain_message(error))
        bad = 1
    except BrokenPipeError:  # of `| head`; Python would print what is left when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        bad = 1
    return 1 if bad else 0


def _check_file(args: argparse.Namespace) -> int:
    """Print what is wrong with each sample, and a summary. Returns how many are bad."""
    image_processor, count, counted = _token_counter(args)
    records = load_records(args.file, args.image_dir)
    bad = records.find_bad()
    for error in bad:
        print(plain_message(error))
    turns, images, lengths, written = 0, 0, [], []
    hidden = None if args.tqdm else True  # None: hidden where nobody watches
    for index in tqdm(range(len(records)), "images", unit="sample", leave=False, disable=hidden):
        try:
            record = records[index]
            images += len(load_images(record, image_processor))
            turns += len(record["conversations"])
            lengths.append(count(record))
            written += [_as_line(record, args.image_dir)] if args.write else []
        except DataError as error:
            bad.append(error)
            tqdm.write(f"{records.where(index)}: {plain_message(error)}")
    if args.write:
        with phase(f"--write {args.write}"):
            unfinished = Path(f"{args.write}.part")
            unfinished.write_text("".join(written), "utf-8")
            unfinished.replace(args.write)
    print(
        f"{args.file}: {len(lengths) + len(bad):,} samples, {len(bad):,} of them bad\n"
        f"the {len(lengths):,} good samples: {turns:,} turns, {images:,} images"
    )
    if lengths:
        lengths.sort()
        points = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
        found = [f"{name} {lengths[round(p * (len(lengths) - 1))]:,}" for name, p in points.items()]
        print(f"{counted} per sample: {', '.join(found)}")
    return len(bad)


def _as_line(record: dict, image_dir: str) -> str:
    """A record as its line of a jsonl, images relative to `image_dir`."""
    folder = os.path.realpath(image_dir)
    for turn in record["conversations"]:
        turn["images"] = [os.path.relpath(path, folder) for path in turn["images"]]
    return json.dumps(record, ensure_ascii=False) + "\n"


def _token_counter(
    args: argparse.Namespace,
) -> tuple[Phi3VImageProcessor, Callable[[dict], int], str]:
    """The image processor, what counts a record's tokens, and what it counts in words."""
    if args.model_name_or_path is not None:
        try:
            # Imported here: they bring the whole of training with them.
            from .data.packing import count_tokens
            from .training.loading import load_processor

            processor = load_processor(args)
            return processor.image_processor, lambda r: count_tokens(processor, r), "tokens"
        except Exception as error:  # no network, no such folder, a broken file
            print(
                f"--model_name_or_path {args.model_name_or_path} cannot be loaded, so only the "
                f"tokens of images are counted: {plain_message(error)}"
            )
    image_processor = Phi3VImageProcessor(num_crops=args.num_crops)
    of_size = image_processor.calc_num_image_tokens_from_image_size
    return image_processor, lambda r: sum(of_size(*s) for s in image_sizes(r)), "image tokens"


if __name__ == "__main__":
    sys.exit(main())
