"""The guider's adapters in an evaluation: the service with each of them, and the digests of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from actors.config import ConfigError, ServiceConfig
from cluster.jobs.config import AS_CONFIGURED, Evaluation

WEIGHTS = "adapter_model.safetensors"


def service_with(service: ServiceConfig, evaluation: Evaluation, adapter: str) -> ServiceConfig:
    """The service with that adapter of the evaluation on its guider; unchanged for AS_CONFIGURED."""
    return service if adapter == AS_CONFIGURED else service.with_adapter(evaluation.adapters[adapter])


def check_adapters(evaluation: Evaluation) -> None:
    """Raise ConfigError for an adapter that is neither a local folder nor the name of one on the hub."""
    for name, path in evaluation.adapters.items():
        if path is None or (Path(path) / WEIGHTS).is_file():
            continue
        if Path(path).exists() or len(Path(path).parts) != 2:
            raise ConfigError(
                f"adapters.{name}: {path} holds no {WEIGHTS}; cluster.jobs.train_dpo creates such a folder"
            )


def digests(evaluation: Evaluation) -> dict[str, str]:
    """Digests of local adapters. The run's folder stores them, to detect an adapter that changed meanwhile."""
    return {
        name: hashlib.sha256((Path(path) / WEIGHTS).read_bytes()).hexdigest()[:16]
        for name, path in evaluation.adapters.items()
        if path is not None and (Path(path) / WEIGHTS).is_file()
    }
