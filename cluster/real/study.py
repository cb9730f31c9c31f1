"""The service of the real models as a file, and the short evaluation that `make real` runs.

The models lie in the user's cache folder, so each machine writes its own file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.jobs.config import load_evaluation
from cluster.jobs.evaluate import run
from cluster.real.models import ADAPTER, GEMMA3, SMOLLM2, RealModelError, fetched
from cluster.serve_file import IMPORT_PATH

SHORT = Path(__file__).parent / "configs" / "short.yaml"
# float32 is the fastest dtype of most processors, and exact. Each model computes in one thread, all at the same time.
MODEL: dict[str, Any] = {"dtype": "float32", "device": "cpu", "cache_tokens": 6_144, "max_position": 2_048}


def service(adapter: Path = ADAPTER, root: Path | None = None, engine: str = "auto") -> dict[str, Any]:
    """The content of a Serve config file: SmolLM2-135M-Instruct with an adapter of its guider guides Gemma 3 270M.

    root: the folder of the real models. engine: of every role. Raises RealModelError if a model or the adapter is
    missing.
    """
    target, small = fetched(GEMMA3, root), fetched(SMOLLM2, root)
    if target is None or small is None:
        raise RealModelError("the real models are not here: `python -m cluster.real --fetch` brings them")
    if not (adapter / "adapter_config.json").is_file():
        raise RealModelError(f"{adapter} holds no adapter: `python -m cluster.real.train sft` trains one")
    common = MODEL | {"engine": engine}
    models = {
        "target": common | {"path": str(target)},
        "guider": common | {"path": str(small), "adapter": str(adapter.resolve())},
        "guider_base": common | {"path": str(small)},
    }
    args = {"version": 1, "name": "real", "models": models, "coordinator": {"max_sessions": 32}}
    return {"applications": [{"name": "real", "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}]}


def write_service(file: Path, adapter: Path = ADAPTER, engine: str = "auto") -> None:
    """Write the service's file. Raises RealModelError."""
    text = yaml.safe_dump(service(adapter, engine=engine), sort_keys=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m cluster.real --service {file} --adapter {adapter} --engine {engine}"
    file.write_text(f"# Written by `{command}`.\n{text}", "utf-8")


def evaluate_shortly(console: Console, engine: str = "auto") -> dict[str, Any]:
    """Run the short evaluation, and write its report. Returns the last line's object. Raises RealModelError."""
    evaluation = load_evaluation(SHORT)
    if engine != "auto":
        evaluation = evaluation.at(evaluation.run.with_name(f"{evaluation.run.name}-{engine}"))
    write_service(evaluation.service, engine=engine)
    console.print(f"The evaluation of {SHORT.name}, which can be resumed: {evaluation.machine} (estimated)")
    return run(evaluation, console)
