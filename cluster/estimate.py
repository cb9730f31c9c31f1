"""What each role costs, and whether it fits where the configuration puts it: arithmetic on files, nothing is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE

from actors.api.generation import Role
from actors.config import ModelConfig, ServiceConfig
from actors.engine.sizing import cache_bytes_per_token, weight_bytes
from actors.preflight import Finding, position_limit
from actors.text.tokenizer import RoleTokenizer
from cluster.weights import Weights, WeightsError, cached_folder, local_weights, remote_bytes

USABLE = 0.92  # of a GPU: the rest is the CUDA context, activations and rows in flight


@dataclass(frozen=True, slots=True)
class Estimate:
    """One role's costs. here: whether its weights are on this machine; gpus: of one rank of a replica.

    Weights and cache are of all ranks together, each of which holds its share of both.
    """

    role: Role
    path: str
    here: bool
    weights_bytes: int
    dtype: str
    cache_token_bytes: int
    cache_tokens: int
    position_limit: int
    gpus: float
    ranks: int = 1  # of tensor_parallel

    @property
    def cache_bytes(self) -> int:
        """Of the whole cache."""
        return self.cache_tokens * self.cache_token_bytes

    @property
    def share(self) -> str:
        """Of GPUs, for a person: 0.7, or 2 x 1 for two ranks of one each."""
        return f"{self.gpus:g}" if self.ranks == 1 else f"{self.ranks} x {self.gpus:g}"

    def sessions(self, context: int) -> int:
        """How many sessions of `context` tokens the configured cache holds."""
        return self.cache_tokens // context

    def fitting_tokens(self, gpu_bytes: int) -> int:
        """Cache tokens that this role's share of GPUs of `gpu_bytes` each has room for, beside its weights."""
        room = int(self.ranks * self.gpus * gpu_bytes * USABLE) - self.weights_bytes
        return max(0, room // max(1, self.cache_token_bytes))


def estimate(config: ServiceConfig, role: Role, tokenizer: RoleTokenizer) -> tuple[Estimate, list[Finding]]:
    """A role's costs, and what is wrong with its files."""
    model = config.models.role(role)
    settings = _model_config(model)
    dtype = "float32" if config.batch_invariant else model.dtype
    dummy = model.load_format == "dummy"
    here, size, stored_dtype, found = _dummy_weights(role, settings, dtype) if dummy else _weights(model, role, dtype)
    try:
        token_bytes = cache_bytes_per_token(settings, dtype)
    except ValueError as error:
        token_bytes = 0
        found.append(Finding("error", role, f"{model.path}: {error}"))
    limit = position_limit(config, role, tokenizer)
    shown = stored_dtype if dtype == "auto" else dtype
    costs = Estimate(role, model.path, here, size, shown, token_bytes, model.cache_tokens, limit, model.num_gpus)
    return replace(costs, ranks=model.tensor_parallel), found


def memory_findings(estimates: Sequence[Estimate], gpus: Sequence[int]) -> list[Finding]:
    """Roles whose weights and cache exceed their share of this machine's GPUs (bytes each; none: nothing is said)."""
    found = []
    for costs in estimates if gpus else ():
        if not costs.gpus:
            continue
        gpu = min(gpus)
        room = int(costs.ranks * costs.gpus * gpu * USABLE)
        if costs.weights_bytes + costs.cache_bytes > room:
            found.append(
                Finding(
                    "error",
                    costs.role,
                    f"{size(costs.weights_bytes)} of weights and {costs.cache_tokens:,} tokens x "
                    f"{size(costs.cache_token_bytes)} = {size(costs.cache_bytes)} of cache exceed its share of "
                    f"{size(room)} ({costs.share} x {size(gpu)} x {USABLE}); " + _way_out(costs.fitting_tokens(gpu)),
                )
            )
    return found


def disk_findings(estimates: Sequence[Estimate], free: int) -> list[Finding]:
    """Weights that are still to be fetched, and whether the disk of the cache folder has room for them."""
    away = [costs for costs in estimates if not costs.here]
    found = [
        Finding(
            "warning",
            costs.role,
            f"its weights ({size(costs.weights_bytes)}) are not here; a start fetches them. Sooner: "
            f"`hf download {costs.path}`, or this check with --download",
        )
        for costs in away
    ]
    needed = sum({costs.path: costs.weights_bytes for costs in away}.values())
    if needed > free:
        where = f"{size(needed)} are to be fetched and {size(free)} are free in {HF_HUB_CACHE}"
        found.append(Finding("error", away[0].role, f"{where}; set HF_HOME to a larger disk"))
    return found


def free_disk() -> int:
    """Bytes free where the hub's cache is, or will be."""
    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size(count: int) -> str:
    """Bytes for a person: 65.5 GB, 3.1 MB, 262.1 kB, in powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _way_out(tokens: int) -> str:
    if tokens < 64:
        return "give it more num_gpus, or quantization"
    return f"lower cache_tokens to {tokens:,}, or give it more num_gpus"


def _weights(model: ModelConfig, role: Role, dtype: str) -> tuple[bool, int, str, list[Finding]]:
    """Whether they are here, their bytes in memory, the dtype that they are stored in, and what is wrong."""
    local = Path(model.path).expanduser()
    folder = local if local.is_dir() else cached_folder(model.path, model.revision)
    if folder is None:
        listed = remote_bytes(model.path, model.revision)
        found = [] if listed else [Finding("error", role, _unreachable(model))]
        return False, listed or 0, "unknown", found
    try:
        weights: Weights = local_weights(folder)
    except WeightsError as error:
        return True, 0, "unknown", [Finding("error", role, str(error))]
    loaded = weights.stored_bytes if model.quantization else weights.bytes_as(dtype)
    return True, loaded, weights.dtype, []


def _dummy_weights(role: Role, settings: Mapping[str, Any], dtype: str) -> tuple[bool, int, str, list[Finding]]:
    """As `_weights`, of random ones: they are made at the start, so none is missing."""
    try:
        return True, weight_bytes(settings, dtype), "dummy", []
    except ValueError as error:
        return True, 0, "dummy", [Finding("error", role, str(error))]


def _unreachable(model: ModelConfig) -> str:
    revision = f" --revision {model.revision}" if model.revision else ""
    return (
        f"the weights of {model.path} are not here and the hub lists no safetensors for them; "
        f"run `hf auth login` if they are gated, then `hf download {model.path}{revision}`"
    )


def _model_config(model: ModelConfig) -> Mapping[str, Any]:
    """The model's config.json; its tokenizer was loaded before, so it is here."""
    local = Path(model.path).expanduser()
    file = local / "config.json"
    if not local.is_dir():
        file = Path(hf_hub_download(model.path, "config.json", revision=model.revision))
    settings: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings
