"""Compares checkpoints and adapters on this machine with their configs, in a process of its own that loads torch.

    python -m actors.engine.inspection < sources.json

Reads a JSON object of model sources by role, and prints the findings by role as JSON: pairs of severity and message.
`python -m cluster.check` runs it as a child. No tensor is loaded and nothing is fetched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from actors.engine.errors import LoadError
from actors.engine.loader import ModelSource, read_config, require_quantization, verify_files
from actors.engine.weight_files import adapter_folder, cached_folder


def inspect_sources(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """By role the findings about the files of its source: severity and message. sources: fields of ModelSource."""
    return {role: _inspect(fields) for role, fields in sources.items()}


def _inspect(fields: Mapping[str, Any]) -> list[list[str]]:
    try:
        source = ModelSource(**fields)
        if not source.local and cached_folder(source.path, source.revision) is None:
            return []  # it has not been downloaded, which is a finding of another check
        adapter = None if source.adapter is None else adapter_folder(source.adapter, local_only=True)
        config = read_config(source)
        found = [["warning", warning] for warning in verify_files(source, config, adapter)]
        try:
            require_quantization(source, config)
        except LoadError as error:  # other nodes may have it
            found.append(["warning", str(error)])
    except LoadError as error:
        return [["error", str(error)]]
    if source.adapter is not None and adapter is None:
        found.append(["warning", f"adapter {source.adapter} is not on this machine: hf download {source.adapter}"])
    return found


if __name__ == "__main__":
    json.dump(inspect_sources(json.load(sys.stdin)), sys.stdout)
