"""
Samples that are too long, and short ones that share a row.

Lengths are known without decoding an image: an image's tokens follow from its size.
"""

import argparse
from bisect import bisect_left, insort
from collections.abc import Sequence

from torch.utils.data import Dataset
from tqdm import tqdm

from ..distributed import print_first, rank, share_out
from ..errors import DataError
from ..model.processing_phi3_v import Phi3VProcessor
from .images import image_sizes
from .records import Records, to_messages


def fit_lengths(
    records: Records, processor: Phi3VProcessor, args: argparse.Namespace
) -> "Records | PackedRecords":
    """
    The training set under --max_length and --pack_length; as it is without them.

    Samples of more than `max_length` tokens are left out, and their number is printed; none is ever
    cut. With `pack_length`, samples share rows of at most so many tokens, and a longer one has a
    row of its own. The ranks share the counting of tokens.

    Raises:
        DataError: no sample is left.
    """
    max_length, pack_length = args.max_length, args.pack_length
    if max_length is None and pack_length is None:
        return records
    counted = share_out(
        lambda index: count_tokens(processor, records[index]),
        records.reading_order(),
        each_machine=False,
        progress=lambda indices: tqdm(
            indices, "counting tokens", unit="sample", disable=not args.tqdm or rank() != 0
        ),
    )
    lengths = list(counted.values())
    for error in lengths:
        if isinstance(error, DataError):
            raise error
    kept = [i for i, length in enumerate(lengths) if max_length is None or length <= max_length]
    if len(kept) < len(lengths):
        print_first(
            f"{records.origin}: --max_length {max_length}: {len(lengths) - len(kept)} of "
            f"{len(lengths)} samples are longer (up to {max(lengths)} tokens) and left out"
        )
    if not kept:
        raise DataError(
            f"{records.origin}: no training sample has at most --max_length {max_length} tokens; "
            f"the shortest has {min(lengths)}. Raise it, or lower --num_crops."
        )
    if pack_length is None:
        return records.select(kept)
    rows = pack([lengths[i] for i in kept], pack_length)
    print_first(
        f"{records.origin}: --pack_length {pack_length}: {len(kept)} samples in {len(rows)} rows"
    )
    return PackedRecords(records, [[kept[i] for i in members] for members in rows])


def count_tokens(processor: Phi3VProcessor, record: dict) -> int:
    """Tokens of a record as it is trained: prompt, images and answers."""
    return sum(count_parts(processor, record))


def count_parts(processor: Phi3VProcessor, record: dict) -> tuple[int, int]:
    """Tokens of a record up to its last question, images included, and of the last answer."""
    *prompt, answer = to_messages(record)
    text = processor.tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    images = [
        processor.calc_num_image_tokens_from_image_size(*size) for size in image_sizes(record)
    ]
    end = processor.tokenizer(
        f"{answer['content']}<|end|>\n<|endoftext|>", add_special_tokens=False
    )
    return len(processor.tokenize([text], images)[0]), len(end.input_ids)


def pack(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """
    Sample numbers by row. Best fit, the longest first: each goes where the least room is left over.
    Rows are full, and the same in every run.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by the room that they have
    rooms: list[int] = []  # those that occur, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row = max(pack_length, length), len(rows)
            rows.append([])
        rows[row].append(index)
        if left := room - length:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return [sorted(members) for members in rows]


class PackedRecords(Dataset):
    """Lists of records that share a row."""

    def __init__(self, records: Sequence[dict], rows: list[list[int]]):
        self.records = records
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.records[i] for i in self.rows[index]]
