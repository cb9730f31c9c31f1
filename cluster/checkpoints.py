"""Findings about the tensors of checkpoints and adapters, from a child process, since they need torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.api.generation import Role
from actors.config import ServiceConfig
from actors.preflight import Finding

_ROOT = Path(__file__).parent.parent
_FIELDS = ("path", "revision", "quantization", "adapter", "trust_remote_code", "load_format", "tensor_parallel")
_TIMEOUT_S = 300.0


def checkpoint_findings(config: ServiceConfig, roles: Sequence[Role]) -> list[Finding]:
    """Findings about tensors that the models of these roles lack, or have and do not take. Their files must be here."""
    if not roles:
        return []
    sources = {role: config.models.role(role).model_dump(include=set(_FIELDS)) for role in roles}
    try:
        found = inspect_in_child(sources)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        message = f"the tensors of the checkpoints were not checked: {text.strip().splitlines()[-1]}"
        return [Finding("warning", "config", message)]
    return [Finding(severity, role, message) for role in roles for severity, message in found[role]]


def inspect_in_child(sources: Mapping[Role, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Run `actors.engine.inspection` and return its findings. Raises SubprocessError or ValueError if it fails."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "actors.engine.inspection"],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
        env=os.environ | {"PYTHONPATH": path},
    )
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found
