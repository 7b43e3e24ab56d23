"""Files of json lines, read strictly: what two parsers could read differently is an error."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError, quoted
from .bad_samples import no_file

# A longer one is no record: a file without line ends, or not a text at all.
MAX_LINE_BYTES = 64 * 2**20

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """
    The numbers, from 1 on, and the bytes of all lines that are not blank.

    Raises:
        DataError: no such file, not a file, not readable, a line beyond all measure, or no
            lines at all.
    """
    empty = True
    try:
        if found := no_file(path.stat().st_mode):
            raise DataError(f"{path} is {found}. Give a file of json lines.")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB. Write "
                        "one record a line."
                    )
                if line.strip():
                    empty = False
                    yield number, line
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(_unreadable(path, error)) from None
    if empty:
        raise DataError(f"{path}: the file has no records. Write one record a line.")


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        parent = Path(os.path.abspath(path)).parent
        missing = "" if parent.is_dir() else f", nor its folder {parent}"
        return f"{path}: there is no such file{missing}. Check the path."
    if isinstance(error, PermissionError):
        return f"{path} cannot be read: permission denied. Change its permissions (chmod +r)."
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{quoted(str(path))} cannot be read: {reason}. Check the path."


def parse_line(line: bytes, where: str) -> object:
    """
    The json value of a line.

    Raises:
        DataError: not UTF-8, not JSON, or JSON beyond the standard: NaN, a key twice,
            nested without end. The message begins with `where`.
    """
    if line.startswith(UTF16_MARKS) or b"\0" in line:
        raise DataError(
            f"{where}: not UTF-8, but perhaps UTF-16 (it has bytes that no UTF-8 text has). Save "
            "it as UTF-8."
        )
    if line.startswith(UTF8_MARK):
        raise DataError(f"{where}: begins with a byte order mark. Save it as UTF-8 without BOM.")
    try:
        return json.loads(
            line.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}). Save it as UTF-8.") from None
    except RecursionError:
        raise DataError(
            f"{where}: nested too deeply for JSON of a record. Remove what is not its fields."
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}). Write one record a line.") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    """An object; json.loads alone would take the last of two equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {quoted(key)} twice")
    return content


def _integer(digits: str) -> int:
    # Beyond this, int() fails with advice that is of no use here.
    if len(digits) > 4000:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def kind(value: object) -> str:
    """What a json value is, in words."""
    names = {
        **{type(None): "null", dict: "an object", list: "a list", str: "a string"},
        **{bool: "a bool", int: "a whole number", float: "a number"},
    }
    return names.get(type(value), str(type(value)))
