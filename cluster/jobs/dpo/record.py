"""What a training run's folder was made for, and what came of it: `training.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.api.generation import ROLES
from actors.config import ServiceConfig
from cluster.jobs.dpo.journal import Line
from cluster.jobs.dpo.training import Training
from cluster.jobs.results import RunError

RECORD, ADAPTER = "training.json", "adapter"
OF_PLACE = ("run", "service", "workers", "gpus", "cpus", "label_selector", "max_failures", "micro_batch")


class Record:
    """What the run's folder was made for, and what came of it."""

    def __init__(self, run: Path) -> None:
        self._run, self._file = run, run / RECORD

    def open(self, training: Training, service: ServiceConfig) -> None:
        """Begin, or go on with the same. Raises RunError where the folder holds another training."""
        asked: dict[str, Any] = {
            "training": training.model_dump(mode="json", exclude=set(OF_PLACE)),
            "models": {role: service.models.role(role).path for role in ROLES},
            "pairs": _digest(training.pairs),
        }
        if self._file.is_file():
            held = _flat(json.loads(self._file.read_text(encoding="utf-8"))["asked"])
            now = _flat(asked)
            if differs := sorted(key for key in now.keys() | held.keys() if now.get(key) != held.get(key)):
                raise RunError(
                    f"{self._run} holds another training: {', '.join(differs)} differ; "
                    "give another --run, or --no-resume to throw it away"
                )
            return
        self._run.mkdir(parents=True, exist_ok=True)
        self._write({"asked": asked})

    def result(self) -> dict[str, Any] | None:
        """What the last line said, if the run is finished."""
        found: dict[str, Any] | None = json.loads(self._file.read_text(encoding="utf-8")).get("result")
        return found

    def finish(self, counts: Mapping[str, int], lines: Sequence[Line]) -> dict[str, Any]:
        """Keep and return the result."""
        ends = [line for line in lines if line.split == "validation"][-1]
        result = {
            "adapter": str(self._run / ADAPTER),
            "pairs": dict(counts),
            "steps": ends.step,
            "validation": {name: round(getattr(ends, name), 6) for name in ("loss", "margin", "accuracy")},
        }
        self._write(json.loads(self._file.read_text(encoding="utf-8")) | {"result": result})
        return result

    def _write(self, held: Mapping[str, Any]) -> None:
        fresh = self._file.with_suffix(".part")
        fresh.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self._file)


def _flat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with their part before them."""
    flat: dict[str, Any] = {}
    for part, values in asked.items():
        flat |= (
            {f"{part}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {part: values}
        )
    return flat


def _digest(folder: Path) -> str:
    """Of the pairs' own files."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.arrow")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
