"""The folder of a run: one line a sample, appended as it finishes, whole whatever happens.

    samples.jsonl    what was said: a function of configuration and models alone
    timings.jsonl    what it took: differs from run to run
    config.yaml      the configuration as it was resolved
    problems.jsonl   question and right answer of every problem

A sample counts once its line in samples.jsonl is complete. Its timing is written before it, so that a sample that
counts has one; a timing without a sample is what a killed run leaves, and does not count. A line that a kill cut short
is cut away when the folder is opened again, and asked again. `finish` sorts both files by key: from then on
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

from cluster.jobs.jsonl import LineFile, replace, rows
from cluster.jobs.sample import Key, Sample, Timing

_writing: set[Path] = set()  # folders that this process writes to: a record lock binds other processes only


class RunError(RuntimeError):
    """A run's folder cannot be used; the message says why and what to do."""


class InUse(RunError):
    """Another process, or this one, writes to the folder."""


class OtherRun(RunError):
    """The folder holds samples of another configuration or of other problems; the message names what differs."""


@dataclass(frozen=True, slots=True)
class ProblemRow:
    """What was asked, and what is right."""

    task: str
    problem: str  # its id within the task
    question: str
    answer: str


class Results:
    """A run's folder. Reading takes no lock and sees all samples that are complete; one process at a time may write.

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
        """Open the folder to append; made if it is missing. Use as a context manager, or call `close`.

        config: plain data, as resolved; of a folder that has one, all must be equal but the dotted keys in
        `may_differ`, which change no sample. resume: False throws away what the folder holds. Raises InUse, OtherRun,
        and UnreadableLine of `cluster.jobs.jsonl`.
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
        """Let another writer in. What was appended stays; closing twice is fine."""
        self._samples.close()
        self._timings.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            _writing.discard(self.folder.resolve())

    def append(self, sample: Sample, timing: Timing) -> None:
        """Write one sample. Raises ValueError where the run has its key already, OSError if the disk is full."""
        if sample.key != timing.key:
            raise ValueError(f"the timing is of {timing.key}, the sample of {sample.key}")
        if sample.key in self._done:
            raise ValueError(f"{sample.key} is in the run already")
        self._timings.append(_row(timing))
        self._samples.append(_row(sample))
        self._done.add(sample.key)

    def finish(self) -> None:
        """Sort both files by key, each replaced as a whole; timings of samples that do not count are left out."""
        assert self._lock is not None, "finish() is for a folder that is open for writing"
        self._timings.sort(_key, keep=self._done)
        self._samples.sort(_key, keep=self._done)

    def done(self) -> set[Key]:
        """The keys of all complete samples."""
        return {_key(row) for row in rows(self._samples.path)}

    def samples(self) -> Iterator[Sample]:
        """All complete samples, in the file's order: by key once the run has finished."""
        return (Sample(**_keyed(row)) for row in rows(self._samples.path))

    def timings(self) -> Iterator[Timing]:
        """What samples took, in the file's order. Of a run that was killed the same key may come twice, the last is
        the one that counts; the sample of the very last may be missing."""
        return (Timing(**_keyed(row)) for row in rows(self._timings.path))

    def problems(self) -> Iterator[ProblemRow]:
        """What was asked, sorted by task and id."""
        return (ProblemRow(**row) for row in rows(self.folder / "problems.jsonl"))

    def config(self) -> dict[str, Any]:
        """The configuration as it was resolved. Raises RunError where the folder is no run's."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise RunError(f"{self.folder} has no config.yaml: it is not the folder of a run")
        return _loaded(path)

    def _take_lock(self) -> None:
        """A record lock: it ends with this process, even where a child that it forked lives on."""
        folder = self.folder.resolve()
        if folder in _writing:
            raise InUse(f"{self.folder} is being written to by this process already")
        lock = (self.folder / ".lock").open("ab")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InUse(f"{self.folder} is being written to by another process: wait for it, or stop it") from None
        self._lock = lock
        _writing.add(folder)

    def _clear(self) -> None:
        """Samples first: without them nothing else counts."""
        for name in ("samples.jsonl", "timings.jsonl", "problems.jsonl", "config.yaml"):
            (self.folder / name).unlink(missing_ok=True)


def _row(what: Sample | Timing) -> dict[str, Any]:
    """Flat: the key's fields, then the others, for tools that read tables."""
    fields = asdict(what)
    del fields["key"]
    return what.key._asdict() | fields


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[field] for field in Key._fields))


def _keyed(row: dict[str, Any]) -> dict[str, Any]:
    return {"key": _key(row)} | {field: value for field, value in row.items() if field not in Key._fields}


def _loaded(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def _check_config(path: Path, config: Mapping[str, Any], may_differ: Collection[str]) -> None:
    """Write it where there is none, else hold it against what is there."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    if not path.exists():
        replace(path, text.encode())
        return
    found = list(_differences(_loaded(path), yaml.safe_load(text), "", may_differ))
    if found:
        raise OtherRun(
            f"{path.parent} holds a run of another configuration ({'; '.join(found)}): choose another folder, "
            "or start it over without resuming"
        )


def _differences(there: Any, here: Any, at: str, may_differ: Collection[str]) -> Iterator[str]:
    """Every leaf that differs as "dotted.key: there X, here Y"."""
    if at in may_differ or there == here:
        return
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys((*there, *here)):
            inner = f"{at}.{name}" if at else str(name)
            yield from _differences(there.get(name), here.get(name), inner, may_differ)
    else:
        yield f"{at}: there {json.dumps(there, default=str)}, here {json.dumps(here, default=str)}"


def _check_problems(path: Path, problems: Iterable[ProblemRow]) -> None:
    """Write them where there are none, else hold them against what is there."""
    wanted = sorted((asdict(problem) for problem in problems), key=lambda row: (row["task"], row["problem"]))
    if not path.exists():
        replace(path, b"".join(json.dumps(row).encode() + b"\n" for row in wanted))
        return
    there = {(row["task"], row["problem"]): row for row in rows(path)}
    here = {(row["task"], row["problem"]): row for row in wanted}
    found = [" ".join(name) for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if found:
        raise OtherRun(
            f"{path.parent} holds answers to other problems ({len(found)} differ, the first is {found[0]}): "
            "the task's data changed; choose another folder (--run), or start over (--no-resume)"
        )
