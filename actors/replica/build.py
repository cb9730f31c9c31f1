"""Builds a model role from its configuration: the engine, and the replica that serves it. Plain Python, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from actors.api.generation import Role
from actors.config import ModelConfig, ServiceConfig
from actors.engine.memory import AutoCache, held_rows
from actors.preflight import auto_cache, engine_of, session_limit
from actors.replica.engine_thread import Engine
from actors.replica.process import on_temporary_thread, spin_briefly
from actors.replica.replica import ModelReplica, ReplicaSettings
from actors.text.tokenizer import RoleTokenizer
from actors.wire.link import Limits
from actors.wire.tls import server_context

if TYPE_CHECKING:
    from actors.engine.loader import LoadProgress, ModelSource
    from actors.engine.parallel import StartFollower
    from actors.engine.step_engine import StepEngine

Load: TypeAlias = "Callable[[ServiceConfig, Role, Callable[[LoadProgress], None], StartFollower], Engine]"


def load_role(
    config: ServiceConfig,
    role: Role,
    report: Callable[[LoadProgress], None] = lambda progress: None,
    start: StartFollower | None = None,
) -> StepEngine[Any]:
    """Load the weights of a role and build its engine. Blocks. Raises LoadError, whose message has the fix.

    report: called with the progress. start: starts a further rank of a tensor-parallel model; None: as child processes.
    """
    spin_briefly()
    from actors.engine.loader import load_engine  # loads torch, which only model processes need

    model = config.models.role(role)
    source = source_of(
        model.model_copy(update={"dtype": "float32", "device": "cpu"}) if config.batch_invariant else model
    )
    cache, rows = cache_of(config, role), held_rows(config.coordinator.most_sessions)
    if model.tensor_parallel > 1:
        from actors.engine.parallel import FollowerProcess, Recipe, load_parallel

        recipe, limit = Recipe(source, cache, rows), config.deadlines
        start = start or FollowerProcess
        return load_parallel(recipe, start, load_s=limit.model_load_s, step_s=limit.step_s, report=report)
    if engine_of(model, config.batch_invariant) == "vllm":
        try:
            from actors.engine.vllm_runner import vllm_engine  # only the environment of such a role has vLLM
        except ImportError as error:
            from actors.engine.errors import LoadError

            out = "Run `make venv-vllm` on every node that can have the role, or name an image by runtime_env."
            raise LoadError("engine: vllm", f"its environment lacks a package: {error}", out) from error
        return on_temporary_thread(partial(vllm_engine, source, cache, report=report, max_held_rows=rows))
    backend = None if model.attention == "auto" else model.attention
    load = partial(load_engine, source, cache, batch_invariant=config.batch_invariant, backend=backend)
    return on_temporary_thread(partial(load, report=report, max_held_rows=rows))


def cache_of(config: ServiceConfig, role: Role) -> int | AutoCache:
    """The tokens of a role's cache, or what an engine needs to measure them.

    Raises ConfigError if nothing says how long a session may be.
    """
    model = config.models.role(role)
    if model.cache_tokens != "auto":
        return model.cache_tokens
    roles: set[Role] = {role, "target"}
    models = {each: config.models.role(each) for each in roles}
    tokenizers = {each: RoleTokenizer.load(models[each].path, models[each].revision) for each in roles}
    return auto_cache(config, role, tokenizers)


def source_of(model: ModelConfig) -> ModelSource:
    """The weights of a role, and how they are loaded. Raises LoadError for settings that cannot be combined.

    `device: auto` is what Ray reserves: a GPU if `num_gpus` is above 0, else the CPU, whatever the machine has.
    """
    from actors.engine.loader import ModelSource

    if model.device == "auto":
        model = model.model_copy(update={"device": "cuda" if model.num_gpus else "cpu"})
    return ModelSource(**{field.name: getattr(model, field.name) for field in fields(ModelSource)})


def serve_role(
    config: ServiceConfig,
    role: Role,
    engine: Engine,
    tokenizer: RoleTokenizer,
    *,
    incarnation: str,
    secret: bytes,
    host: str = "127.0.0.1",
) -> ModelReplica:
    """A replica of a loaded engine, not yet started. It will listen on `host` only."""
    config = config.with_cache(role, engine.cache_stats().tokens_total)
    settings = ReplicaSettings(
        max_position=session_limit(config, role, tokenizer),
        prefill_chunk=config.models.role(role).prefill_chunk,
        row_wait_s=config.deadlines.step_s,
        forward_timeout_s=2 * config.deadlines.step_s,
    )
    limits = Limits(peer_timeout_s=config.deadlines.peer_timeout_s)
    return ModelReplica(engine, role, incarnation, secret, settings, host=host, tls=server_context(), limits=limits)
