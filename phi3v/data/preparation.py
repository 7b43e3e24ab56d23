"""All that is looked at in the data before a GPU is touched."""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from ..distributed import print_first, rank, share_out
from ..errors import DataError
from ..model.processing_phi3_v import Phi3VProcessor
from .images import check_images, load_images
from .mixing import Mixture, each_part
from .packing import PackedRecords, fit_lengths
from .records import Records, report_bad

# More images are not all looked at before the start, which would grow with the dataset.
MAX_CHECKED = 20_000
# So few are decoded, all of them: that takes seconds, and finds what a header does not show.
MAX_DECODED = 500


def prepare(
    train_dataset: Sequence[dict],
    eval_dataset: Sequence[dict],
    processor: Phi3VProcessor,
    args: argparse.Namespace,
) -> tuple[Records | PackedRecords | Mixture, Records | Mixture]:
    """
    The two datasets as they will be used, checked: the form of records, their ids, and whether
    images can be read and fit --num_crops; and with --max_length and --pack_length applied to
    training. With --skip_bad_samples bad samples are left out, and printed. Of a mixture, all this
    is done to each dataset: samples of two never share a row.

    Args:
        train_dataset: [`Records`], any sequence of records, or a [`Mixture`]; so is `eval_dataset`,
            whose samples all count once, whatever weights it has.

    Raises:
        DataError: the first bad sample, or that no good one is left; the message says where it is,
            what is wrong, and what to do.
    """
    train, evaluation = (
        _named(records, name)
        for records, name in ((train_dataset, "training data"), (eval_dataset, "evaluation data"))
    )
    for dataset in (train, evaluation):
        each_part(dataset, lambda records: records.check(args.skip_bad_samples))
    train, evaluation = (
        each_part(dataset, lambda records: check_all_images(records, processor, args))
        for dataset in (train, evaluation)
    )
    train = each_part(train, lambda records: fit_lengths(records, processor, args))
    if isinstance(evaluation, Mixture):
        evaluation = Mixture(evaluation.parts, evaluation.names)
    if isinstance(train, Mixture):
        train = Mixture(train.parts, train.names, train.weights, args.seed)
        print_first(train.describe("packed rows" if args.pack_length else "samples"))
    return train, evaluation


def _named(dataset: Sequence, name: str) -> Records | Mixture:
    if isinstance(dataset, Mixture):
        parts = zip(dataset.parts, dataset.names, strict=True)
        named = [_named(part, f"{name}, {own}") for part, own in parts]
        return Mixture(named, dataset.names, dataset.weights)
    records = dataset if isinstance(dataset, Records) else Records(dataset)
    records.origin = records.origin or name
    return records


def check_all_images(
    records: Records, processor: Phi3VProcessor, args: argparse.Namespace
) -> Records:
    """
    The records whose images can be read and fit --num_crops. The ranks share the work.

    Up to 500 images are decoded; of more than 20,000, an even sample is looked at, and that is
    said. All are looked at where every one has to be good: to leave bad samples out, or to count
    tokens.

    Raises:
        DataError: of the first bad sample; with --skip_bad_samples, that none is left.
    """
    if records.shards and records.shards.min_crops <= processor.image_processor.num_crops:
        return records  # looked at when they were written
    images = _count_images(records)
    look = load_images if images <= MAX_DECODED else check_images
    indices = records.reading_order()
    if images > MAX_CHECKED and not (args.skip_bad_samples or args.max_length or args.pack_length):
        count = max(1, int(len(records) * MAX_CHECKED / images))
        indices = [len(records) * i // count for i in range(count)]
        print_first(
            f"{records.origin}: looked at the images of {count:,} of {len(records):,} samples, "
            "evenly spaced. All of them: --skip_bad_samples, or of a jsonl, python -m phi3v.check"
        )

    def check(index: int) -> None:
        record = records[index]
        try:
            look(record, processor.image_processor)
        except DataError as error:
            raise DataError(f"{records.where(index)}: {error}") from None

    checked = share_out(
        check,
        indices,
        first_error=not args.skip_bad_samples,
        progress=lambda indices: tqdm(
            indices,
            f"{records.origin}: images",
            unit="sample",
            delay=3,
            disable=not args.tqdm or rank() != 0,
        ),
    )
    bad = {index: error for index, error in checked.items() if error is not None}
    report_bad(list(bad.values()), len(records), records.origin, args.skip_bad_samples)
    return records.select([i for i in range(len(records)) if i not in bad]) if bad else records


def _count_images(records: Records) -> float:
    """About how many images all records have, by some fifty of them."""
    some = range(0, len(records), max(1, len(records) // 50))
    turns = [turn for index in some for turn in records[index]["conversations"]]
    return sum(len(turn["images"]) for turn in turns) / len(some) * len(records)
