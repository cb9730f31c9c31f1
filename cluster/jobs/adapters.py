"""Adapters of the guider that an evaluation goes through: the service with each of them, and what tells them apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from actors.config import ConfigError, ServiceConfig
from cluster.jobs.config import AS_CONFIGURED, Evaluation

WEIGHTS = "adapter_model.safetensors"


def service_with(service: ServiceConfig, evaluation: Evaluation, adapter: str) -> ServiceConfig:
    """The service whose guider has that adapter of the evaluation; as it is for AS_CONFIGURED."""
    return service if adapter == AS_CONFIGURED else service.with_adapter(evaluation.adapters[adapter])


def check_adapters(evaluation: Evaluation) -> None:
    """Raise ConfigError for an adapter that is neither a folder here nor the name of one on the hub."""
    for name, path in evaluation.adapters.items():
        if path is None or (Path(path) / WEIGHTS).is_file():
            continue
        if Path(path).exists() or len(Path(path).parts) != 2:
            raise ConfigError(f"adapters.{name}: {path} holds no {WEIGHTS}; cluster.jobs.train_dpo makes such a folder")


def digests(evaluation: Evaluation) -> dict[str, str]:
    """What is kept beside answers to know that an adapter is still the one that gave them."""
    return {
        name: hashlib.sha256((Path(path) / WEIGHTS).read_bytes()).hexdigest()[:16]
        for name, path in evaluation.adapters.items()
        if path is not None and (Path(path) / WEIGHTS).is_file()
    }
