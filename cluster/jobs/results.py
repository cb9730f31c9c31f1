"""The folder of an evaluation run, which stays consistent whenever its writer is killed.

    samples.jsonl    one line a sample, appended when it finishes: depends on configuration and models only
    timings.jsonl    durations of the samples: differ from run to run
    config.yaml      the resolved configuration
    problems.jsonl   question and right answer of every problem

A sample counts once its line in samples.jsonl is complete. Its timing is written first, so that every counted sample
has one. A killed run may leave a timing without a sample, which does not count, and an incomplete line. That line is
removed when the folder is opened again, and its sample is generated again. `finish` sorts both files by key: after it,
samples.jsonl has the same bytes however often the run was interrupted.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import yaml

from actors.config import as_this_release_reads
from cluster.jobs.jsonl import LineFile, rows, write_file
from cluster.jobs.sample import Key, Sample, Timing

_writing: set[Path] = set()  # folders that this process writes to: a record lock excludes only other processes


class RunError(RuntimeError):
    """A run's folder cannot be used. The message says why and what to do."""


class InUse(RunError):
    """A process is writing to the folder."""


class OtherRun(RunError):
    """The folder holds samples of another configuration or of other problems. The message names the differences."""


@dataclass(frozen=True, slots=True)
class ProblemRow:
    """A problem and its right answer."""

    task: str
    problem: str  # its id within the task
    question: str
    answer: str


class Results:
    """A run's folder. Readers take no lock and see all complete samples. One process at a time may write.

    with Results(folder).writing(config, problems) as results:
        missing = wanted - results.done()
        ...
        results.append(sample, timing)
        results.finish()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._samples = LineFile(folder / "samples.jsonl")
        self._timings = LineFile(folder / "timings.jsonl")
        self._lock: BinaryIO | None = None
        self._done: set[Key] = set()

    def writing(
        self,
        config: Mapping[str, Any],
        problems: Iterable[ProblemRow],
        *,
        resume: bool = True,
        may_differ: Collection[str] = (),
    ) -> Self:
        """Open the folder to append, and create it if necessary. Use as a context manager, or call `close`.

        config: the resolved configuration as plain data. It must equal that of an existing folder, except for the
        dotted keys in `may_differ`, which change no sample. resume: False deletes what the folder holds. Raises InUse,
        OtherRun, and UnreadableLine of `cluster.jobs.jsonl`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            if not resume:
                self._clear()
            _check_config(self.folder / "config.yaml", config, may_differ)
            _check_problems(self.folder / "problems.jsonl", problems)
            self._samples.open()
            self._timings.open()
            self._done = self.done()
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder for other writers. Closing twice is allowed."""
        self._samples.close()
        self._timings.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            _writing.discard(self.folder.resolve())

    def append(self, sample: Sample, timing: Timing) -> None:
        """Append one sample. Raises ValueError if the run already has its key, OSError if the disk is full."""
        if sample.key != timing.key:
            raise ValueError(f"the timing has the key {timing.key}, the sample {sample.key}")
        if sample.key in self._done:
            raise ValueError(f"{sample.key} is already in the run")
        self._timings.append(_row(timing))
        self._samples.append(_row(sample))
        self._done.add(sample.key)

    def finish(self) -> None:
        """Sort both files by key, atomically, and drop timings without a sample."""
        assert self._lock is not None, "finish() needs a folder that is open for writing"
        self._timings.sort(_key, keep=self._done)
        self._samples.sort(_key, keep=self._done)

    def done(self) -> set[Key]:
        """The keys of all complete samples."""
        return {_key(row) for row in rows(self._samples.path)}

    def samples(self) -> Iterator[Sample]:
        """All complete samples in the order of the file, which is by key after `finish`."""
        return (Sample(**_keyed(row)) for row in rows(self._samples.path))

    def timings(self) -> Iterator[Timing]:
        """All timings in the order of the file. After a kill a key may repeat, and then its last timing counts. The
        sample of the last line may be missing."""
        return (Timing(**_keyed(row)) for row in rows(self._timings.path))

    def problems(self) -> Iterator[ProblemRow]:
        """The problems of the run, sorted by task and id."""
        return (ProblemRow(**row) for row in rows(self.folder / "problems.jsonl"))

    def config(self) -> dict[str, Any]:
        """The resolved configuration. Raises RunError if the folder does not belong to a run."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise RunError(f"{self.folder} is not the folder of a run: it has no config.yaml")
        return _loaded(path)

    def _take_lock(self) -> None:
        """Take a record lock. It ends with this process, even if a forked child lives on."""
        folder = self.folder.resolve()
        if folder in _writing:
            raise InUse(f"this process is already writing to {self.folder}")
        lock = (self.folder / ".lock").open("ab")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InUse(f"another process is writing to {self.folder}: wait for it, or stop it") from None
        self._lock = lock
        _writing.add(folder)

    def _clear(self) -> None:
        """Delete the run's files, samples first: without them nothing else counts."""
        for name in ("samples.jsonl", "timings.jsonl", "problems.jsonl", "config.yaml"):
            (self.folder / name).unlink(missing_ok=True)


def _row(record: Sample | Timing) -> dict[str, Any]:
    """A flat row for tools that read tables: the key's fields, then the others."""
    fields = asdict(record)
    del fields["key"]
    return record.key._asdict() | fields


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[field] for field in Key._fields))


def _keyed(row: dict[str, Any]) -> dict[str, Any]:
    return {"key": _key(row)} | {field: value for field, value in row.items() if field not in Key._fields}


def _loaded(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def _check_config(path: Path, config: Mapping[str, Any], may_differ: Collection[str]) -> None:
    """Write the configuration, or compare it with the stored one. Raises OtherRun."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    if not path.exists():
        write_file(path, text.encode())
        return
    stored = _loaded(path)
    if "service" in stored:
        stored["service"] = as_this_release_reads(stored["service"])
    found = list(_differences(stored, yaml.safe_load(text), "", may_differ))
    if found:
        raise OtherRun(
            f"{path.parent} holds a run of another configuration ({'; '.join(found)}): "
            "choose another folder (--run), or start over (--no-resume)"
        )


def _differences(stored: Any, given: Any, at: str, may_differ: Collection[str]) -> Iterator[str]:
    """Every differing leaf as "dotted.key: stored X, given Y"."""
    if at in may_differ or stored == given:
        return
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in dict.fromkeys((*stored, *given)):
            inner = f"{at}.{name}" if at else str(name)
            yield from _differences(stored.get(name), given.get(name), inner, may_differ)
    else:
        yield f"{at}: stored {json.dumps(stored, default=str)}, given {json.dumps(given, default=str)}"


def _check_problems(path: Path, problems: Iterable[ProblemRow]) -> None:
    """Write the problems, or compare them with the stored ones. Raises OtherRun."""
    wanted = sorted((asdict(problem) for problem in problems), key=lambda row: (row["task"], row["problem"]))
    if not path.exists():
        write_file(path, b"".join(json.dumps(row).encode() + b"\n" for row in wanted))
        return
    stored = {(row["task"], row["problem"]): row for row in rows(path)}
    given = {(row["task"], row["problem"]): row for row in wanted}
    found = [" ".join(name) for name in sorted({*stored, *given}) if stored.get(name) != given.get(name)]
    if found:
        raise OtherRun(
            f"{path.parent} holds answers to other problems ({len(found)} differ, the first is {found[0]}): "
            "the data of the task have changed; choose another folder (--run), or start over (--no-resume)"
        )
