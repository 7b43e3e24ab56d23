"""
Turn a video dataset into frames and jsonl for finetune_hf_trainer_ucf101.py.

    # the UCF101 subset from the hub (10 classes, about 400 videos)
    python convert_ucf101.py --out_dir /path/to/converted_ucf101
    # the same archive, already on disk (a tar, plain or compressed)
    python convert_ucf101.py --out_dir /path/to/converted_ucf101 --archive UCF101_subset.tar.gz
    # your own videos: my_videos/{train,val,test}/<class>/<video>.mp4
    python convert_ucf101.py --out_dir /path/to/converted --video_dir my_videos
    # of many lengths: a frame every two seconds, at most 16 of a video
    python convert_ucf101.py --out_dir /path/to/converted --video_dir my_videos \\
        --fps 1/2 --max_frames 16

gives

    out_dir/images/{train,val,test}/<class>/<video>.<0..7>.jpg     8 frames per video, or by --fps
    out_dir/ucf101_{train,val,test}.jsonl                          1 line per video
    out_dir/converted.jsonl                                        what came from which video

For a dataset of your own, edit find_videos and to_record: which videos there are, and what the
model is asked and answers.

On many machines, which all see out_dir and the videos below the same paths:

    ... --ray auto     by a Ray cluster (pip install ray)
    ... --shard i/n    by n jobs, i = 0..n-1: $SLURM_ARRAY_TASK_ID/n in a Slurm array, as in
                       examples/convert.sbatch, $JOB_COMPLETION_INDEX/n in an indexed Job,
    ... --finish       and then this, once, which lists what failed

Either way gives the bytes of one machine. See docs/large_data.md.

Frames   floor(i * n / 8), i = 0..7, of the n frames that really decode; RGB JPEG of quality 95.
         With --fps F, those on the screen 0, 1/F, 2/F, ... seconds after the first one, by their
         time stamps (without such, by the average rate), until the last one comes; none twice.
         Where they are more than --max_frames, that many of them, evenly spaced.
         An image is up to 781 tokens at --num_crops 4, so 8 are 6,248 and 32 are 24,992. The model
         takes 131,072; what a GPU can train on is less, and the recipe's --plan tells it.
Long     Of mp4, mov, mkv and webm in H.264, HEVC, VP9 or AV1, only what leads from a key frame to
         a wanted frame is decoded, if that saves a quarter. The frames are the same; but what is
         damaged in between is then not noticed. All is decoded where anything does not fit.
Ids      <split>-<the video's place among all, by split, class, name>. One that fails keeps its own.
Listed   failed: nothing of the video decodes. warning: damaged, cut off, or of fewer than 8 frames,
         which then repeat. ignored: no video. --strict stops at the first of these.
Resume   The same command continues after a kill, Ctrl-C or a full disk. Videos and images that
         changed since, or are of other flags, are made anew. There is no ucf101_*.jsonl before all
         is done. A run that was killed leaves what it extracted in --tmp_dir.
Refused  An out_dir with images or jsonl that this script did not write, or that an older version
         without converted.jsonl wrote (delete it). Files that point to others, such as playlists.

Exit code: 0 all videos converted, 1 some failed or --strict stopped, 2 the run cannot start or go
on, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import shlex
import signal
import sys
from contextlib import ExitStack, closing
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from phi3v.data import video_source
from phi3v.data.frame_folder import FrameFolder, Video
from phi3v.data.manifest import Shard
from phi3v.data.sampling import Sampling
from phi3v.data.video_source import LAYOUT, SPLITS, SUFFIXES
from phi3v.errors import DataError, RunError

HUB_REPO, HUB_FILE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"


def find_videos(root: Path) -> list[Video]:
    """The videos root/{train,val,test}/<class>/<video>, in the order of their ids."""
    videos: list[Video] = []
    for split in SPLITS:
        paths = [path for path in (root / split).glob("*/*") if path.suffix.lower() in SUFFIXES]
        for path in sorted(paths, key=lambda path: (path.parent.name, path.stem, path.suffix)):
            if not video_source.is_hidden(path.relative_to(root)):
                id, label = f"{split}-{len(videos):010d}", path.parent.name
                videos.append(Video(id, split, f"{split}/{label}/{path.stem}", label, path))
    return videos


def to_record(video: Video, frames: list[str], classes: list[str]) -> dict:
    """The line of the jsonl; the paths of the frames are relative to out_dir/images."""
    user = f"Classify the video into one of the following classes: {', '.join(classes)}."
    turn = {"images": frames, "user": user, "assistant": video.label}
    return {"id": video.id, "source": "ucf101", "conversations": [turn]}


def count(text: str) -> int:
    if not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 1000")
    return int(text)


def rate(text: str) -> Fraction:
    if text.endswith("/0") or not 0 < Fraction(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1000")
    return Fraction(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--out_dir", type=Path, default="./ucf101", help="the result (default: %(default)s)")
    add("--tmp_dir", type=Path, default="/tmp/ucf101", help="extract here (default: %(default)s)")
    source.add_argument("--archive", type=Path, help=f"a tar in place of the hub's {HUB_FILE}")
    source.add_argument("--video_dir", type=Path, help=f"folder with {LAYOUT}")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--num_frames", type=count, default=8, help="of each video (default: 8)")
    frames.add_argument("--fps", type=rate, help="frames a second instead: 1, 0.5, 1/10, ...")
    add("--max_frames", type=count, help="of a video, with --fps (default: 32)")
    add("--num_workers", type=count, help="processes at a time (default: all CPUs)")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="work on a Ray cluster")
    many.add_argument("--shard", type=Shard.parse, metavar="i/n", help="every n-th video only")
    many.add_argument("--finish", action="store_true", help="put the shards together")
    add("--max_video_gb", type=count, default=1, help="larger videos fail (default: 1)")
    add("--strict", action="store_true", help="stop at the first bad file")
    add("--no-tqdm", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.max_frames is not None and args.fps is None:
        parser.error("--max_frames needs --fps; --num_frames is for as many of every video")
    args.sampling = Sampling(args.num_frames, args.fps, args.max_frames or 32)
    return args


def convert(args: argparse.Namespace) -> int:
    """
    Convert all videos, print a summary, and return the exit code.

    Raises:
        DataError: the source is refused. RunError: the output cannot be written.
    """
    jsonl = {split: f"ucf101_{split}.jsonl" for split in SPLITS}
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        root = args.video_dir
        if root is None:
            archive = args.archive or video_source.download(HUB_REPO, HUB_FILE)
            gb = args.max_video_gb
            source = video_source.extracted(archive, args.tmp_dir, gb, find_videos)
            root = stack.enter_context(source)
        videos = find_videos(root)
        classes = video_source.check_videos(videos, root)
        ignored = video_source.list_ignored(root, videos)
        problems = [f"ignored: {len(ignored)} files: {', '.join(ignored[:10])}"] if ignored else []
        folder = stack.enter_context(FrameFolder(args.out_dir, jsonl.values(), args.shard))
        if args.shard:
            videos = videos[args.shard.number :: args.shard.count]
        if args.finish:
            lines = folder.join(videos, args.sampling)
        else:
            options = (args.sampling, args.num_workers, args.max_video_gb, args.ray)
            lines = folder.convert(videos, *options)
        stack.enter_context(closing(lines))
        for video, line in tqdm(lines, total=len(videos), unit="video", disable=args.no_tqdm):
            kind = "failed" if "error" in line else "warning"
            if why := line.get("error") or line.get("warning"):
                problems.append(f"{kind}: {video.path.relative_to(root)}: {why}")
            if args.strict and problems:
                print(f"{problems[0]}\nStopped by --strict.", file=sys.stderr)
                return 1
            if "error" not in line:
                record = to_record(video, video.images(len(line["files"])), classes)
                records[video.split].append(record)
        if not args.shard:
            folder.finish({jsonl[split]: each for split, each in records.items() if each})

    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    if args.shard:
        done = sum(map(len, records.values()))
        print(f"shard {args.shard}: {done} videos, {len(videos) - done} failed. Next: --finish")
        return 0  # or it would be started again in vain
    for split, each in records.items():
        failed = sum(video.split == split for video in videos) - len(each)
        print(f"{split}: {len(each)} videos, {failed} failed -> ", end="")
        print(args.out_dir / jsonl[split] if each else "no jsonl")
    out_dir = shlex.quote(str(args.out_dir))
    print("Next: torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir", out_dir)
    return int(len(videos) > sum(map(len, records.values())))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(argv)
    try:
        return convert(args)
    except (DataError, RunError, OSError) as error:
        print(f"convert_ucf101.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_ucf101.py: stopped; the same command continues", file=sys.stderr)
        return 130


def stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)  # as Ctrl-C: what is open is closed first


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    sys.exit(main())
