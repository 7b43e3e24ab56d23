"""Where the converter's videos lie, and whether they can become a dataset."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3v.data.frame_folder import Video
from phi3v.data.video import extract_archive
from phi3v.errors import DataError, RunError

SPLITS = ("train", "val", "test")
SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
LAYOUT = f"{{train,val,test}}/<class>/<video> with a video in {' '.join(SUFFIXES)}"
# What the recipe would refuse as a control token, what would divide the prompt's list, no text.
NOT_IN_CLASSES = re.compile(r"<\||\|>|<s>|<unk>|[,\x00-\x1f\x7f\ud800-\udfff]|^\s|\s$")


def download(repo: str, file: str) -> Path:
    """
    A file of a dataset on the hub.

    Raises:
        RunError: it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download  # slow, and the other sources do not need it

    try:
        return Path(hf_hub_download(repo_id=repo, filename=file, repo_type="dataset"))
    except Exception as error:  # offline, proxy, full disk, ...: the ways out are the same
        raise RunError(
            f"cannot download {file} of the hub dataset {repo}: {error}\n"
            "Give the file with --archive FILE, or a folder of videos with --video_dir DIR."
        ) from error


@contextmanager
def extracted(
    archive: Path, tmp_dir: Path, max_gb: int, find_videos: Callable[[Path], list[Video]]
) -> Iterator[Path]:
    """
    The folder of an archive's splits, for the time of the context.

    Raises:
        DataError: the archive is broken or refused.
    """
    tmp_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert_ucf101.", dir=tmp_dir) as name:
        extract_archive(archive, Path(name), max_gb)
        # The archive may have folders of its own above the splits.
        roots = {path.parent for split in SPLITS for path in Path(name).rglob(split)}
        roots = [r for r in roots if find_videos(r) and not is_hidden(r.relative_to(name))]
        yield roots[0] if len(roots) == 1 else Path(name)


def is_hidden(path: Path) -> bool:
    return any(name.startswith(".") or name == "__MACOSX" for name in path.parts)


def check_videos(videos: list[Video], root: Path) -> list[str]:
    """
    The classes, sorted.

    Raises:
        DataError: the videos cannot become a dataset.
    """
    if not videos:
        found = sorted(str(p.relative_to(root)) for g in ("*", "*/*") for p in root.glob(g))
        shown = ", ".join(found[:12] + ["..."] * (len(found) > 12)) or "nothing"
        raise DataError(f"no videos in {root}\nExpected: {LAYOUT}\nFound: {shown}")
    owners: dict[str, Video] = {}
    for video in videos:
        if (other := owners.setdefault(video.name, video)) is not video:
            raise DataError(f"rename {other.path} or {video.path}: their images are the same files")
    classes = sorted({video.label for video in videos})
    for label in classes:
        if found := NOT_IN_CLASSES.search(label):
            raise DataError(f"rename the class folder {label!r}: its name holds {found[0]!r}")
    return classes


def list_ignored(root: Path, videos: list[Video]) -> list[str]:
    """Files below the splits that are no videos, or not in a class."""
    known = {video.path for video in videos}
    paths = [path for split in SPLITS for path in (root / split).rglob("*") if path not in known]
    names = [path.relative_to(root) for path in paths if not path.is_dir()]
    return sorted(str(name) for name in names if not is_hidden(name))
