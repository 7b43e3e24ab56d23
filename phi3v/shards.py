"""
Write a dataset of any size as parquet shards that hold the images too:

    python -m phi3v.shards train.jsonl --image_dir images --out_dir shards
    python -m phi3v.shards HuggingFaceM4/the_cauldron --config docvqa --out_dir shards \\
        --push_to_hub USER/NAME

The source is a file of conversations, in any form that `python -m phi3v.check` knows, or a dataset
with the columns of the_cauldron, on the hub or in a folder. Every recipe reads the result in place
of its data: the folder, or its name on the hub, there with --streaming if it should not be
downloaded. Runs then start in seconds, because all that they check is checked here: the form of
records, ids, and that images can be read.

    shards/train-00000-of-00042.parquet    records with their images' bytes, shuffled by --seed
    shards/train.order.npy, shards/train.shards.json    what there is, written last

A run that was killed goes on with the same command. With --ray, the nodes need the same paths.
The exit status is 0 if the shards are written, 2 if they cannot be, 130 after Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Image
from huggingface_hub import HfApi
from tqdm import tqdm

from .data.engine import run_all
from .data.formats import load_records, to_record
from .data.images import check_images, image_source
from .data.manifest import locked, write_file
from .data.records import Records, report_bad
from .data.rows import Lines
from .data.shard_rows import ENDING, FEATURES, ORDER, VERSION
from .data.sources import load_rows
from .errors import DataError, RunError, one_line, phase, quoted
from .model.image_processing_phi3_v import Phi3VImageProcessor
from .training.arguments import COUNT, number

RAY_HELP = "work on a Ray cluster, by default the one at hand, or else a local one; needs ray"
GROUP_BYTES, GROUP_ROWS = 1 << 20, 1000  # a row group ends at the first of them
SAMPLES = 1000  # of a source, by which it is known again
METADATA = b"phi3v"
DIED = None  # in place of a shard's errors
COLUMNS = {"images": [Image], "texts": [{"user": str, "assistant": str}]}
# With the most crops: an image that does not fit even those is bad.
PROCESSOR = Phi3VImageProcessor(num_crops=16)


class Plan(NamedTuple):
    """What is written. The same plan gives the same files."""

    folder: Path
    split: str
    records: Records  # not checked yet
    seed: int
    rows_per_shard: int
    skip_bad: bool
    source: str  # a hash of it

    @property
    def count(self) -> int:
        return -(-len(self.records.rows) // self.rows_per_shard)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05}-of-{self.count:05}.parquet"

    def rows(self, number: int) -> np.ndarray:
        """The rows of the source that a shard holds, shuffled."""
        order = np.random.default_rng(self.seed).permutation(len(self.records.rows))
        return order[number * self.rows_per_shard :][: self.rows_per_shard]

    @property
    def identity(self) -> str:
        content = [VERSION, self.split, self.seed, self.rows_per_shard, self.source]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def write_shards(
    records: Records,
    out_dir: str | Path,
    split: str = "train",
    seed: int = 42,
    rows_per_shard: int = 5000,
    skip_bad: bool = False,
    run: Callable[[Callable, Iterable], Iterable] = map,
    bar: Callable[[Iterable, int], Iterable] = lambda shards, count: shards,
) -> None:
    """
    Write all records, with their images, to a folder; shards that are there already are kept.

    Args:
        records: any, such as a recipe's `load_datasets` returns.
        skip_bad: leave bad records out, and print which.
        run: maps a function over shards, such as `run_all` does.
        bar: shows how far it is, of how many shards.

    Raises:
        DataError: a record is bad, or the id of two.
        RunError: the folder has shards of another dataset, or cannot be written.
    """
    folder = Path(out_dir)
    plan = Plan(folder, split, records, seed, rows_per_shard, skip_bad, _identity(records))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".shards.lock"):
        _make_way(plan)
        numbers = range(plan.count)
        for errors in bar(run(partial(_write_shard, plan=plan), numbers), plan.count):
            if errors is DIED:
                raise RunError("a process that wrote a shard died. Was its memory full?")
            if errors and not skip_bad:
                report_bad([DataError(text) for _, text in errors], plan.count, "", False)
        _finish(plan)


def _identity(records: Records) -> str:
    """A hash over the source: of json lines, all; and of SAMPLES records, in even steps."""
    digest, rows = hashlib.sha256(), records.rows
    if isinstance(rows, Lines):
        with open(rows.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    for row in range(0, len(rows), max(1, len(rows) // SAMPLES)):
        for record in records.read_row(row):
            if isinstance(record, dict):
                turns = [
                    [t["user"], t["assistant"], len(t["images"])] for t in record["conversations"]
                ]
                record = [record["id"], record.get("answers"), turns]
            digest.update(json.dumps(record, default=str).encode())
    return f"{len(rows)} {digest.hexdigest()}"


def _make_way(plan: Plan) -> None:
    """
    Remove what an unfinished run of another plan left, as when its source was mended since.

    Raises:
        RunError: there are files of another origin, or finished shards of another plan.
    """
    for path in plan.folder.glob(f".{plan.split}-*.part"):  # of a run that was killed
        path.unlink()
    finished = (plan.folder / f"{plan.split}{ENDING}").exists()
    for path in sorted(plan.folder.glob(f"{plan.split}-*.parquet")):
        theirs = _metadata(path).get("plan")
        if theirs and theirs != plan.identity and not finished:
            path.unlink()
        elif theirs != plan.identity:
            raise RunError(
                f"{path} is of another dataset, --seed or --rows_per_shard. Choose another "
                "--out_dir or --split, or delete what is there."
            )


def _metadata(path: Path) -> dict:
    """What `_write_shard` noted in a shard; {} of a file of another origin."""
    try:
        found = pyarrow.parquet.read_metadata(path).metadata or {}
        return json.loads(found.get(METADATA, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}


# ---- One shard ----


def _write_shard(number: int, plan: Plan) -> list[tuple[int, str]]:
    """Write a shard, if it is not there. Returns its bad rows, and why they are; or the first."""
    path = plan.path(number)
    if (known := _metadata(path)).get("plan") == plan.identity:
        return known["bad"]
    note = {"plan": plan.identity, "bad": [], "min_crops": 1}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    schema = FEATURES.arrow_schema
    # Images are compressed already, and statistics of texts serve nobody.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    try:
        with pa.parquet.ParquetWriter(part, schema, write_page_checksum=True, **options) as writer:
            for group in _groups(_good_records(number, plan, note)):
                writer.write_table(pa.Table.from_pylist(group, schema))
            writer.add_key_value_metadata({METADATA: json.dumps(note).encode()})
        if plan.skip_bad or not note["bad"]:
            os.replace(part, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)
    return note["bad"]


def _good_records(number: int, plan: Plan, note: dict) -> Iterator[dict]:
    """The records of a shard with their images' bytes. Bad ones go to `note`, as does min_crops."""
    for row in map(int, plan.rows(number)):
        for place, record in enumerate(plan.records.read_row(row)):
            try:
                if isinstance(record, DataError):
                    raise record
                record = _with_images(record)
                sizes = check_images(record, PROCESSOR)
            except (DataError, OSError) as error:
                where = "" if error is record else f"{plan.records.place(row)}: "
                note["bad"].append((row, f"{where}{one_line(error)}"))
                if not plan.skip_bad:
                    return
                continue
            crops = [_min_crops(*size) for size in sizes]
            note["min_crops"] = max([note["min_crops"], *crops])
            yield record | {"row": row, "number": place}


def _groups(records: Iterator[dict]) -> Iterator[list[dict]]:
    """Records by row group."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += sum(len(image["bytes"]) for t in record["conversations"] for image in t["images"])
        if size >= GROUP_BYTES or len(group) == GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _with_images(record: dict) -> dict:
    turns = [
        {**turn, "images": [_with_bytes(image) for image in turn["images"]]}
        for turn in record["conversations"]
    ]
    return {**record, "conversations": turns}


def _with_bytes(image: object) -> dict[str, bytes | str | None]:
    image = image_source(image)
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, str | Path):
        return {"bytes": Path(image).read_bytes(), "path": os.path.basename(image)}
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _min_crops(width: int, height: int) -> int:
    for crops in range(1, PROCESSOR.num_crops):
        with contextlib.suppress(ValueError):
            PROCESSOR.calc_hd_size(width, height, crops)
            return crops
    return PROCESSOR.num_crops


# ---- All of them ----


def _finish(plan: Plan) -> None:
    """Write the order of the records and the manifest."""
    files, tables, bad, min_crops = [], [], [], 1
    for path in map(plan.path, range(plan.count)):
        with pyarrow.parquet.ParquetFile(path) as file:
            tables.append(file.read(columns=["id", "row", "number"]))
            meta = file.metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        files.append({"name": path.name, "bytes": path.stat().st_size, "rows": rows})
        note = _metadata(path)
        bad += map(tuple, note["bad"])
        min_crops = max(min_crops, note["min_crops"])
    table = pa.concat_tables(tables)
    order = np.lexsort((table["number"].to_numpy(), table["row"].to_numpy()))
    ids = table["id"].take(pa.array(order))
    order, twice = _unique(order, ids, table["row"].to_numpy())
    for index, row in twice:
        why = f"id {quoted(ids[index].as_py())} is that of an earlier one too. Make ids unique."
        bad.append((row, f"{plan.records.place(row)}: {why}"))
    bad.sort()
    report_bad(
        [DataError(text) for _, text in bad],
        len(order) + len(bad),
        plan.records.origin,
        plan.skip_bad,
    )
    content = {
        "version": VERSION,
        "identity": hashlib.sha256(f"{plan.identity} {len(order)}".encode()).hexdigest()[:16],
        "records": len(order),
        "min_crops": min_crops,
        "seed": plan.seed,
        "files": files,
    }
    buffer = io.BytesIO()
    np.save(buffer, order)
    write_file(plan.folder / ORDER.format(split=plan.split), buffer.getvalue())
    text = json.dumps(content) + "\n"
    write_file(plan.folder / f"{plan.split}{ENDING}", text.encode())


def _unique(
    order: np.ndarray, ids: pa.ChunkedArray, rows: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The order without records whose id an earlier one has; the index and row of these."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    twice = [(int(i), int(rows[order[i]])) for i in np.flatnonzero(~first)]
    return order[first], twice


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m phi3v.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a file of conversations, a hub id or a folder")
    add("--image_dir", type=Path, metavar="DIR", help="of a file: what image paths are relative to")
    add("--config", help="of a hub id with several")
    add("--split", default="train", help="of the source, and of the shards (default: train)")
    add("--out_dir", type=Path, required=True, help="where the shards go")
    add("--seed", type=number(int, 0), default=42, help="of the order in them (default: 42)")
    add("--rows_per_shard", type=COUNT, default=5000, help="rows of a file (default: 5000)")
    add("--skip_bad_samples", action="store_true", help="leave bad ones out, and say which")
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=RAY_HELP)
    add("--num_workers", type=COUNT, help="processes at a time (default: all CPUs)")
    add("--push_to_hub", metavar="NAME", help="upload them to this dataset on the hub")
    add("--private", action="store_true", help="which is private, if it is made now")
    add("--no-tqdm", dest="tqdm", action="store_false", help="no progress bar")
    args = parser.parse_args(argv)
    if args.source.endswith((".json", ".jsonl")) != (args.image_dir is not None):
        parser.error("--image_dir goes with a file of conversations, which is .json or .jsonl.")
    if not args.split.isidentifier():
        parser.error(f"--split {args.split} is no name. All rows of a split are written.")
    # The nodes of a cluster have other working folders.
    args.out_dir, args.shared = args.out_dir.absolute(), [args.out_dir.absolute()]
    if os.path.exists(args.source):
        args.source = os.path.abspath(args.source)
        args.shared.append(Path(args.source))
    if args.image_dir is not None:
        args.image_dir = args.image_dir.absolute()
        args.shared.append(args.image_dir)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Write the shards, and return the exit status."""
    args = _parse(argv)
    try:
        if args.image_dir is None:
            rows = load_rows(
                args.source, COLUMNS, config=args.config, split=args.split, flag="SOURCE"
            )
            records = Records(rows, to_record)
        else:
            records = load_records(args.source, args.image_dir)
        if args.push_to_hub:
            with phase("--push_to_hub"):  # asked for before the work
                HfApi(token=True).create_repo(
                    args.push_to_hub, repo_type="dataset", private=args.private, exist_ok=True
                )
        write_shards(
            records,
            args.out_dir,
            args.split,
            args.seed,
            args.rows_per_shard,
            args.skip_bad_samples,
            run=partial(
                run_all,
                died=DIED,
                num_workers=args.num_workers,
                ray_address=args.ray,
                shared=args.shared,
            ),
            bar=lambda done, total: tqdm(done, total=total, unit="shard", disable=not args.tqdm),
        )
        print(f"Wrote {args.out_dir}")
        if args.push_to_hub:
            _push(args)
    except (DataError, RunError, OSError) as error:
        print(f"phi3v.shards: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("phi3v.shards: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def _push(args: argparse.Namespace) -> None:
    with phase(f"--push_to_hub {args.push_to_hub}: {args.out_dir} is complete"):
        HfApi(token=True).upload_folder(
            repo_id=args.push_to_hub,
            repo_type="dataset",
            folder_path=args.out_dir,
            allow_patterns=[f"{args.split}-*.parquet", f"{args.split}.*"],
            commit_message=f"Shards of {args.split}",
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C
    sys.exit(main())
