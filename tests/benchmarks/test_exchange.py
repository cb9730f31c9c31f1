from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from actors.api.generation import ROLES
from actors.coordinator.coordinator import Coordinator
from actors.directory import Endpoint
from benchmarks.exchange import Bench, NullModel, StampedTokenizer, Timings, connected, null_config, table

WIDTH, STEPS = 4_000, 30


async def test_steps_are_measured_between_the_tokens_of_each_session(tmp_path: Path) -> None:
    secret = secrets.token_bytes(32)
    models = [NullModel(role, WIDTH, secret) for role in ROLES]
    endpoints = [await model.start() for model in models]

    async def locate() -> Sequence[Endpoint]:
        return endpoints

    async def stats() -> list[object]:
        return [await model.stats() for model in models]

    async def call() -> list[bytes]:
        return [await model.call() for model in models]

    config = null_config(tmp_path, WIDTH)
    tokenizer = StampedTokenizer.load(str(tmp_path))
    assert isinstance(tokenizer, StampedTokenizer)
    coordinator = Coordinator(config, dict.fromkeys(ROLES, tokenizer), secret, locate)
    await coordinator.start()
    try:
        await connected(coordinator)
        timings = Timings(3)
        await Bench(coordinator, tokenizer, stats, call).round(timings, STEPS, calls=4)
    finally:
        await coordinator.stop()
        for model in models:
            await model.stop()
    assert len(timings.steps) == 3 * (STEPS - 11)
    assert len(timings.calls) == 4
    assert min(timings.steps) > 0
    result = timings.result()
    assert list(result) == [
        "sessions",
        "step_ms_p50",
        "step_ms_p99",
        "ray_actor_call_ms_p50",
        "step_over_ray_call",
        "coordinator_us_per_token",
        "bytes_per_token",
    ]
    assert result["coordinator_us_per_token"] > 0
    assert result["step_ms_p50"] <= result["step_ms_p99"]
    assert 3_000 < result["bytes_per_token"] < 8_000
    assert table([timings]).row_count == 1
