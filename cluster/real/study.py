"""The service of the real models as a file, and the short evaluation that `make real` runs.

The models lie in the user's cache folder, so the file is written for each machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.jobs.config import load_evaluation
from cluster.jobs.evaluate import run
from cluster.real.models import GEMMA3, SMOLLM2, RealModelError, fetched
from cluster.serve_file import IMPORT_PATH

HERE = Path(__file__).parent
ADAPTER = HERE / "adapters" / "sft"
SHORT = HERE / "configs" / "short.yaml"
MODEL: dict[str, Any] = {"dtype": "float32", "device": "cpu", "cache_tokens": 12_288, "max_position": 2_048}


def service(root: Path | None = None) -> dict[str, Any]:
    """The content of the service's file: Gemma 3 270M, guided by SmolLM2-135M-Instruct with the adapter of `ADAPTER`.

    float32 is the fastest dtype of most processors, and exact. root: the folder of the real models. Raises
    RealModelError if one is missing.
    """
    target, small = fetched(GEMMA3, root), fetched(SMOLLM2, root)
    if target is None or small is None:
        raise RealModelError("the real models are not here: `python -m cluster.real --fetch` brings them")
    models = {
        "target": MODEL | {"path": str(target)},
        "guider": MODEL | {"path": str(small), "adapter": str(ADAPTER)},
        "guider_base": MODEL | {"path": str(small)},
    }
    args = {"version": 1, "name": "real", "models": models, "coordinator": {"max_sessions": 32}}
    return {"applications": [{"name": "real", "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}]}


def write_service(file: Path) -> None:
    """Write the service's file. Raises RealModelError."""
    text = yaml.safe_dump(service(), sort_keys=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# Written by `python -m cluster.real --service {file}`.\n{text}", encoding="utf-8")


def evaluate_shortly(console: Console) -> dict[str, Any]:
    """Run the short evaluation, with its report. Returns the JSON object of its last line."""
    evaluation = load_evaluation(SHORT)
    write_service(evaluation.service)
    return run(evaluation, console)
