"""Files of JSON lines that stay readable although their writer may be killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name", bound=tuple[object, ...])


class UnreadableLine(ValueError):
    """A complete line is no JSON object, which a killed writer cannot cause. The message names file and line."""


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
    """The complete lines of a file; none if it does not exist. Raises UnreadableLine."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # still being written, or truncated by a kill
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UnreadableLine(f"{path}, line {number} is not a JSON object: repair or remove it")
            yield row


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
