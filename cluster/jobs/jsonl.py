"""Files of JSON lines that stay readable although their writer may be killed at any moment."""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}
Name = TypeVar("Name", bound=tuple[object, ...])


class UnreadableLine(ValueError):
    """A complete line is no JSON object, which no killed writer causes. The message names file, line and reason."""


class LineFile:
    """A file with one writer. The caller must exclude other writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._size = 0  # bytes of complete lines

    def open(self) -> None:
        """Open to append. An incomplete last line, which a killed writer left, is removed."""
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = _whole(self._file)
        os.ftruncate(self._file, self._size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line in one write. Raises OSError if the disk is full, and leaves the file as before."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            while written < len(line):  # the disk is nearly full, or a signal arrived
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def sort(self, name: Callable[[Mapping[str, Any]], Name], keep: Collection[Name]) -> None:
        """Rewrite the file atomically, sorted by name, with the names in `keep`. Of equal names the last line stays.

        Only the lines' offsets are in memory, because the lines of a large run are gigabytes.
        """
        places: dict[Name, tuple[int, int]] = {}
        start = 0
        with self.path.open("rb") as lines:
            for line in lines:
                places[name(json.loads(line))] = (start, len(line))
                start += len(line)
            part = self.path.with_name(self.path.name + ".part")
            with part.open("wb") as sorted_lines:
                for key in sorted(key for key in places if key in keep):
                    lines.seek(places[key][0])
                    sorted_lines.write(lines.read(places[key][1]))
                sorted_lines.flush()
                os.fsync(sorted_lines.fileno())
        _rename(part, self.path)
        self.close()
        self.open()

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file that a `LineFile` wrote; none if it does not exist. Raises UnreadableLine."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # still being written, or truncated by a kill
            try:
                yield parsed_line(line)
            except ValueError as error:
                raise UnreadableLine(f"{path}, line {number}: {error}: repair or remove it") from None


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file that a user wrote, with the numbers of their lines from 1. Blank lines are skipped.

    A byte order mark of UTF-8 is skipped, and the last line needs no end. Raises UnreadableLine, OSError.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UnreadableLine(f"{path} is UTF-16: save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield number, parsed_line(line, strict=True)
            except ValueError as error:
                raise UnreadableLine(f"{path}, line {number}: {error}") from None


def parsed_line(line: bytes, *, strict: bool = False) -> dict[str, Any]:
    r"""The JSON object in a line.

    strict: refuse what only other programs write: a repeated key, and half of a surrogate pair (\ud800), which no
    tokenizer and no file can hold. Raises ValueError with the reason.
    """
    try:
        row = json.loads(line.decode(), object_pairs_hook=_once if strict else None)
        if strict and b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"\\u{ord(half):04x} is half of a surrogate pair and stands for no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {_KINDS[type(row)]}; each line must be one object")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} is repeated")
    return row


def write_file(path: Path, content: bytes) -> None:
    """Write or replace a file atomically: with all of its content, or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _rename(part, path)


def _rename(part: Path, path: Path) -> None:
    """Rename a file durably: the folder is synced too."""
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _whole(file: int) -> int:
    """Bytes up to and including the last line end."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65_536)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
