"""Memory and disk that each role needs, and whether its place has them: arithmetic on files, no model is loaded."""

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
from actors.engine.memory import USABLE, Reserve, estimated_reserve
from actors.engine.sizing import cache_bytes_per_token, weight_bytes
from actors.engine.weight_files import INDEX, SINGLE, WeightsError, cached_folder, ignored_shards
from actors.preflight import Finding, auto_cache, position_limit
from actors.text.tokenizer import RoleTokenizer
from cluster.weights import Weights, local_weights, remote_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory that one replica of a role needs. Weights and cache are sums over its tensor-parallel ranks.

    here: True if the weights are on this machine. cache_tokens: where they are measured at load, those of the longest
    session. gpus: GPUs of one rank, a fraction if roles share one. reserve: of each rank on a GPU.
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
    reserve: Reserve
    ranks: int = 1  # of tensor_parallel
    measured: bool = False  # cache_tokens: auto

    @property
    def cache_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.cache_tokens * self.cache_token_bytes

    @property
    def share(self) -> str:
        """GPUs of a replica as text: 0.7, or 2 x 1 for two ranks with one GPU each."""
        return f"{self.gpus:g}" if self.ranks == 1 else f"{self.ranks} x {self.gpus:g}"

    def fitting_tokens(self, gpu_bytes: int) -> int:
        """Cache tokens that fit beside the weights and the reserve if each GPU has `gpu_bytes`."""
        return max(0, (self.room(gpu_bytes) - self.weights_bytes) // max(1, self.cache_token_bytes))

    def room(self, gpu_bytes: int) -> int:
        """Bytes for weights and cache if each GPU has `gpu_bytes`."""
        return self.ranks * (int(self.gpus * gpu_bytes * USABLE) - self.reserve.total)


def estimate(
    config: ServiceConfig, role: Role, tokenizers: Mapping[Role, RoleTokenizer]
) -> tuple[Estimate, list[Finding]]:
    """The costs of a role, and findings about its files."""
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
    limit, auto = position_limit(config, role, tokenizers[role]), auto_cache(config, role, tokenizers)
    measured = model.cache_tokens == "auto"
    tokens = auto.longest if model.cache_tokens == "auto" else model.cache_tokens
    shown = stored_dtype if dtype == "auto" else dtype
    reserve = estimated_reserve(settings, auto)
    costs = Estimate(role, model.path, here, size, shown, token_bytes, tokens, limit, model.num_gpus, reserve)
    return replace(costs, ranks=model.tensor_parallel, measured=measured), found


def memory_findings(estimates: Sequence[Estimate], gpus: Sequence[int]) -> list[Finding]:
    """An error for each role that needs more than its share of the GPUs, whose bytes `gpus` lists."""
    found = []
    for costs in estimates if gpus else ():
        if not costs.gpus:
            continue
        gpu = min(gpus)
        room = costs.room(gpu)
        if costs.weights_bytes + costs.cache_bytes > room:
            found.append(
                Finding(
                    "error",
                    costs.role,
                    f"{size(costs.weights_bytes)} of weights and {costs.cache_tokens:,} tokens x "
                    f"{size(costs.cache_token_bytes)} = {size(costs.cache_bytes)} of cache exceed its share of "
                    f"{size(room)} ({costs.share} x {size(gpu)} x {USABLE}, less {costs.reserve}); "
                    + _remedy(costs, costs.fitting_tokens(gpu)),
                )
            )
    return found


def disk_findings(estimates: Sequence[Estimate], free: int) -> list[Finding]:
    """A warning for each role whose weights must be downloaded, an error if the cache folder's disk is too small."""
    missing = [costs for costs in estimates if not costs.here]
    found = [
        Finding(
            "warning",
            costs.role,
            f"its weights ({size(costs.weights_bytes)}) are not on this machine; the service downloads them when it "
            f"starts. To download them now: `hf download {costs.path}`, or this check with --download",
        )
        for costs in missing
    ]
    needed = sum({costs.path: costs.weights_bytes for costs in missing}.values())
    if needed > free:
        shortage = f"{size(needed)} must be downloaded and {size(free)} are free in {HF_HUB_CACHE}"
        found.append(Finding("error", missing[0].role, f"{shortage}; set HF_HOME to a larger disk"))
    return found


def free_disk() -> int:
    """Free bytes on the disk of the hub's cache folder, which may not exist yet."""
    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size(count: int) -> str:
    """Bytes as text, in powers of ten: 65.5 GB, 3.1 MB, 262.1 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _remedy(costs: Estimate, tokens: int) -> str:
    if tokens < 64:
        return "raise its num_gpus, or use quantization"
    key = "max_position" if costs.measured else "cache_tokens"
    return f"lower {key} to {tokens:,}, or raise its num_gpus"


def _weights(model: ModelConfig, role: Role, dtype: str) -> tuple[bool, int, str, list[Finding]]:
    """(on this machine, bytes in memory, stored dtype, findings)."""
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
    return True, loaded, weights.dtype, _ignored_files(folder, role)


def _ignored_files(folder: Path, role: Role) -> list[Finding]:
    """A warning if an index names files that are not read."""
    ignored = ignored_shards(folder)
    if not ignored:
        return []
    message = f"{folder} holds {SINGLE}, which is read alone, and {INDEX}, which names {len(ignored)} other files"
    return [Finding("warning", role, f"{message} ({ignored[0]} the first): delete the one that is not meant")]


def _dummy_weights(role: Role, settings: Mapping[str, Any], dtype: str) -> tuple[bool, int, str, list[Finding]]:
    """As `_weights`, for random weights: the replica makes them when it starts, so none are missing."""
    try:
        return True, weight_bytes(settings, dtype), "dummy", []
    except ValueError as error:
        return True, 0, "dummy", [Finding("error", role, str(error))]


def _unreachable(model: ModelConfig) -> str:
    revision = f" --revision {model.revision}" if model.revision else ""
    return (
        f"the weights of {model.path} are not on this machine, and the hub lists no safetensors files for them; "
        f"run `hf auth login` if the model is gated, then `hf download {model.path}{revision}`"
    )


def _model_config(model: ModelConfig) -> Mapping[str, Any]:
    """The model's config.json. Loading the tokenizer before has downloaded it."""
    local = Path(model.path).expanduser()
    file = local / "config.json"
    if not local.is_dir():
        file = Path(hf_hub_download(model.path, "config.json", revision=model.revision))
    settings: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings
