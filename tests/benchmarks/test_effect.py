from __future__ import annotations

from collections.abc import Mapping

import pytest

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from benchmarks.effect import ADAPTER, MODES, measure, run, table
from tests.support.local_service import local_service, trio_config


async def test_every_question_is_asked_in_every_mode_and_guidance_helps(trio_engines: Mapping[Role, Engine]) -> None:
    answered: list[None] = []
    async with local_service(trio_config(), trio_engines) as service:
        effect = await measure(service, [2, 3], 6, 1.0, lambda: answered.append(None))
    assert len(answered) == len(MODES) * 2 * 6
    result = effect.result()
    assert (result["n"], result["hops"]) == (12, [2, 3])
    assert {"n", "hops", "target", "guider", "guider_base", "guided", "by_hops"} <= result.keys()
    assert all(0 <= result[mode] <= 1 for mode in MODES)
    assert result["guided"] > max(result["target"], result["guider"], result["guider_base"])
    assert table(effect).row_count == 2


async def test_another_familys_target_is_guided_better_than_one_to_one() -> None:
    effect = await run([3, 4], 20, 1.0, "other")
    result = effect.result()
    assert table(effect).row_count == 2
    assert result["guided"] >= 0.85
    assert result["guided"] > 0.3 + max(result["target"], result["guider"], result["one_to_one"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
async def test_the_committed_adapter_reduces_over_confidence() -> None:
    result = (await run([3, 4], 24, 1.5)).result()
    assert result["guided_dpo"] > result["guided"] + 0.02
    assert sum(file.stat().st_size for file in ADAPTER.iterdir()) < 2**20
