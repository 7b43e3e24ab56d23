"""
The output folder: files that are whole or not there, and the record of what our runs wrote.

The record, `.phi3v/run.json`, has the settings of the folder's run and the names of its files and
checkpoints. Only what it names is ever removed. A file of another origin whose name a run needs is
kept beside it as `<name>.bak`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import RunError

COMPLETE = "complete.json"
OWN = ".phi3v"
LAST_RESULT = "eval_after.json"  # a run that has written it is finished
REPORT_DATA, PAGE, PICTURE = "report.json", "report.html", "report.png"
# What shows that a folder holds the results of a run, ours or another.
RESULTS = ("eval_before.json", LAST_RESULT, "eval_step_*.json", "*.safetensors")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Seconds. Loader workers of a killed run hold its lock until they notice, after 5 at most.
PATIENCE = 8.0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# safetensors creates files that the owner alone can read, whatever the umask says (0.8).
MODE = 0o666 & ~_umask()

# Held until the process ends. One that runs twice in a folder has its lock already.
_locks: dict[str, FileLock] = {}


class OutputFolder:
    """The folder of `--output_dir`. Only the first rank writes through it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record_path = self.path / OWN / "run.json"

    # ---- The record ----

    @property
    def record(self) -> dict:
        """`settings`, `files` and `checkpoints`; empty where there is no record."""
        empty = {"settings": None, "files": [], "checkpoints": []}
        try:
            record = json.loads(self.record_path.read_text("utf-8"))
        except (OSError, ValueError):
            return empty
        return record if _is_record(record, empty) else empty

    def update(self, **changes: object) -> None:
        """Change fields of the record."""
        self.record_path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(self.record_path, self.record | changes)

    def add(self, field: str, name: str) -> None:
        """Add a name to the record's `files` or `checkpoints`."""
        names = self.record[field]
        if name not in names:
            self.update(**{field: [*names, name]})

    @property
    def finished(self) -> bool:
        """Whether the folder's run has come to its end."""
        return LAST_RESULT in self.record["files"] and (self.path / LAST_RESULT).is_file()

    def take_over(self, settings: dict[str, object], resumes: bool) -> None:
        """
        Make the folder that of a run with these settings.

        Args:
            resumes: what can be resumed from is this run's then, whatever became of the record.
        """
        known = {*self.record["checkpoints"]}
        if resumes:
            known |= {path.name for path in self.checkpoints() if not incompleteness(path)}
        if LAST_RESULT in self.record["files"]:
            (self.path / LAST_RESULT).unlink(missing_ok=True)
        self.update(settings=settings, checkpoints=sorted(known))

    def lock(self) -> None:
        """
        Keep other runs out of the folder until this process ends.

        Raises:
            RunError: another run has it.
            OSError: the folder cannot be written to.
        """
        (self.path / OWN).mkdir(parents=True, exist_ok=True)
        key = str(self.path.resolve())
        if key in _locks:
            return
        lock = FileLock(self.path / OWN / "lock", timeout=PATIENCE, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"--output_dir {self.path}: another run is writing to it. Wait for its end, or "
                "choose another folder."
            ) from None
        except (OSError, NotImplementedError):
            return  # this file system has no locks
        _locks[key] = lock

    # ---- What is in it ----

    def checkpoints(self) -> list[Path]:
        """All checkpoint folders, complete or not, the oldest step first."""
        found = [path for path in self.path.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(CHECKPOINT.fullmatch(path.name)[1]))

    def was_interrupted(self, checkpoint: Path) -> bool:
        """Whether a run of ours was stopped while it wrote this checkpoint."""
        return (
            checkpoint.name in self.record["checkpoints"] and not (checkpoint / COMPLETE).exists()
        )

    def results(self) -> list[Path]:
        """What there is of a run, ours or another."""
        found = [path for pattern in RESULTS for path in sorted(self.path.glob(pattern))]
        return found + self.checkpoints()

    def size(self) -> int:
        """Bytes of what `remove_run` would remove."""
        record = self.record
        names = [*record["files"]]
        for checkpoint in record["checkpoints"]:
            listed = complete_files(self.path / checkpoint) or {}
            names += [f"{checkpoint}/{name}" for name in listed]
        paths = [self.path / name for name in names]
        return sum(path.stat().st_size for path in paths if path.is_file())

    # ---- Writing and removing ----

    def write_json(self, name: str, content: dict) -> None:
        """Write a result, in one step for whoever reads it."""
        self._make_way(name)
        _write_json(self.path / name, content)

    @contextmanager
    def finished_files(self, subfolder: str = ".") -> Iterator[Path]:
        """A folder to write files into, which get to `subfolder` once all of them are written."""
        unfinished = self.path / OWN / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            for path in sorted(unfinished.rglob("*")):
                if path.is_file():
                    name = os.path.normpath(Path(subfolder, path.relative_to(unfinished)))
                    self._make_way(name)
                    path.chmod(MODE)
                    os.replace(path, self.path / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _make_way(self, name: str) -> None:
        """Note a file as ours before it is written. One of another origin is kept as .bak."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in self.record["files"]:
            _set_aside(target)
            self.add("files", name)

    def begin_checkpoint(self, name: str) -> Path:
        """
        The folder of a checkpoint, about to be written.

        Until `complete.json` is in it, it does not count. One of this step may be there, of a run
        that was resumed from an earlier one.
        """
        checkpoint = self.path / name
        if name in self.record["checkpoints"]:
            self.remove_checkpoint(name)
        else:
            _set_aside(checkpoint)
        self.add("checkpoints", name)
        return checkpoint

    def complete_checkpoint(self, name: str, step: int, settings: dict[str, object]) -> None:
        """Make a checkpoint count, whose files are all written."""
        checkpoint, files = self.path / name, {}
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                path.chmod(MODE)
                files[str(path.relative_to(checkpoint))] = identity(path)
        content = {"step": step, "settings": settings, "files": files}
        _write_json(checkpoint / COMPLETE, content)

    def remove_older_checkpoints(self, newest: str, limit: int, keep: str | None = None) -> None:
        """Remove our half-written checkpoints, and whole ones beyond `limit`, except for `keep`."""
        ours = self.record["checkpoints"]
        older = [p for p in self.checkpoints() if p.name in ours and p.name not in (newest, keep)]
        broken = [path for path in older if self.was_interrupted(path)]
        whole = [path for path in older if not incompleteness(path)]
        for path in broken + whole[: max(0, len(whole) + 1 - limit)]:
            self.remove_checkpoint(path.name)

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint of ours: the files that it lists; of a half-written one, all."""
        checkpoint = self.path / name
        files = complete_files(checkpoint)
        if files is None:
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            # First what makes it count: a half-deleted checkpoint is an incomplete one.
            (checkpoint / COMPLETE).unlink()
            _remove_files(checkpoint, files)
        self.update(checkpoints=[other for other in self.record["checkpoints"] if other != name])

    def remove_run(self) -> None:
        """Remove what the record names, and the record."""
        record = self.record
        for name in record["checkpoints"]:
            self.remove_checkpoint(name)
        _remove_files(self.path, record["files"])
        self.record_path.unlink(missing_ok=True)


def _is_record(record: object, like: dict) -> bool:
    """Whether this has the fields of a record, and no name that leads elsewhere."""
    if not isinstance(record, dict) or record.keys() != like.keys():
        return False
    files, checkpoints, settings = (record[k] for k in ("files", "checkpoints", "settings"))
    return (
        isinstance(files, list)
        and all(isinstance(name, str) for name in files)
        and isinstance(checkpoints, list)
        and all(isinstance(name, str) and CHECKPOINT.fullmatch(name) for name in checkpoints)
        and isinstance(settings, dict | None)
    )


def identity(path: Path) -> list[int | str]:
    """
    A file's size in bytes, and a hash of it; of one above 64 MiB, of 32 MiB at either end.

    So an edit is noticed, and neither saving nor resuming reads a large model once more.
    """
    size, part = path.stat().st_size, 1 << 25
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(part))
        if size > part:
            file.seek(max(part, size - part))
            digest.update(file.read(part))
    return [size, digest.hexdigest()[:16]]


def complete_files(checkpoint: Path) -> dict[str, list] | None:
    """`identity` by name of a checkpoint's files; None where its list is not there or broken."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, dict) else None


def incompleteness(checkpoint: Path, files: dict[str, list] | None = None) -> str | None:
    """Why a checkpoint cannot be loaded; None if it is whole, by its list or by `files`."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    files = files or complete_files(checkpoint)
    if files is None:
        return f"it is not complete (no whole {COMPLETE} in it)"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if identity(path) != expected:
            return f"{name} is not as it was written"
    return None


def file_system(path: Path) -> str:
    """What a path is on, as Linux knows it: a device or a server, and the kind."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if path.resolve().is_relative_to(mount[1])]
    device, _, kind = max(inside, key=lambda mount: len(mount[1]))
    return f"{device} ({kind})"


def _write_json(path: Path, content: dict) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    """Keep what somebody else wrote under another name."""
    if not path.exists() and not path.is_symlink():
        return
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in range(1000))
    kept = next(name for name in names if not name.exists())
    os.rename(path, kept)
    print(f"{path} was not written by a run of this recipe; it is kept as {kept.name}", flush=True)


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and the folders that are empty then. A name that leads elsewhere is left."""
    inside = folder.resolve()
    for name in names:
        path = folder / name
        if not path.parent.resolve().is_relative_to(inside):
            continue
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()
        with suppress(OSError):  # something else is in it
            for parent in path.relative_to(folder).parents:
                (folder / parent).rmdir()
