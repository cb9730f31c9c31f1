"""`training.json` in a training run's folder: the training that it belongs to, and its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.api.generation import ROLES
from actors.config import ServiceConfig
from cluster.jobs.dpo.journal import Line
from cluster.jobs.dpo.training import Training
from cluster.jobs.jsonl import write_file
from cluster.jobs.results import RunError

RECORD, ADAPTER = "training.json", "adapter"
# Keys that may differ when a run is resumed: they change where it trains, not what it learns.
PLACEMENT = ("run", "service", "workers", "gpus", "cpus", "label_selector", "max_failures", "micro_batch")


class Record:
    """The file `training.json` of one run."""

    def __init__(self, run: Path) -> None:
        self._run, self._file = run, run / RECORD

    def open(self, training: Training, service: ServiceConfig) -> None:
        """Begin or resume a training. Raises RunError if the folder holds another one."""
        asked: dict[str, Any] = {
            "training": training.model_dump(mode="json", exclude=set(PLACEMENT)),
            "models": {role: service.models.role(role).path for role in ROLES},
            "pairs": _digest(training.pairs),
        }
        if self._file.is_file():
            stored = _flat(json.loads(self._file.read_text(encoding="utf-8"))["asked"])
            now = _flat(asked)
            if differs := sorted(key for key in now.keys() | stored.keys() if now.get(key) != stored.get(key)):
                raise RunError(
                    f"{self._run} holds another training: {', '.join(differs)} differ; "
                    "pass another --run, or --no-resume to delete it"
                )
            return
        self._run.mkdir(parents=True, exist_ok=True)
        self._write({"asked": asked})

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, otherwise None."""
        found: dict[str, Any] | None = json.loads(self._file.read_text(encoding="utf-8")).get("result")
        return found

    def finish(self, counts: Mapping[str, int], lines: Sequence[Line]) -> dict[str, Any]:
        """Store and return the result."""
        ends = [line for line in lines if line.split == "validation"][-1]
        result = {
            "adapter": str(self._run / ADAPTER),
            "pairs": dict(counts),
            "steps": ends.step,
            "validation": {name: round(getattr(ends, name), 6) for name in ("loss", "margin", "accuracy")},
        }
        self._write(json.loads(self._file.read_text(encoding="utf-8")) | {"result": result})
        return result

    def _write(self, content: Mapping[str, Any]) -> None:
        write_file(self._file, (json.dumps(content, indent=1) + "\n").encode())


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all sections as dotted keys."""
    flat: dict[str, Any] = {}
    for part, values in sections.items():
        flat |= (
            {f"{part}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {part: values}
        )
    return flat


def _digest(folder: Path) -> str:
    """A hash of the pairs' files."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.arrow")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
