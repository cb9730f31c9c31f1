"""The claims of `tests/coordinator` about tokens that stay the same, with the trio's target on vLLM.

The guiders are native: vLLM has no kernel for their heads. vLLM is not batch invariant, so that answers may part at
near ties; their number is printed with -rP.
"""

# ruff: noqa: F401 - imported tests and fixtures are this module's

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from actors.api.generation import Role
from actors.config import ServiceConfig
from actors.engine.step_engine import StepEngine
from actors.engine.vllm_runner import VllmRunner
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from tests.coordinator.test_loop import test_audits_come_by_the_count_and_change_no_token
from tests.coordinator.test_oracle import (
    concurrent,
    test_one_and_sixteen_sessions_decode_alike,
    test_other_sessions_change_no_token,
    test_slices_decode_as_whole_rows_do,
    test_the_chunks_of_a_prefill_change_no_token,
    test_whole_rows_decode_as_plain_forwards_do,
)
from tests.coordinator.test_prompt_scoring import (
    oracle,
    test_a_cache_lost_in_the_middle_of_a_prompt_changes_no_score,
    test_a_prompt_is_scored_at_the_requests_alpha_whatever_its_warm_up,
    test_a_prompt_is_scored_by_the_combined_whole_rows,
    test_a_resumed_prompt_is_scored_from_where_it_stopped,
    test_scoring_a_prompt_changes_no_token_of_its_answer,
)
from tests.coordinator.test_recovery import (
    test_a_forward_that_fails_changes_no_token,
    test_a_hanging_replica_is_dropped_and_its_sessions_resume_later,
    test_a_lost_cache_changes_no_token,
    test_a_replica_that_dies_and_is_replaced_changes_no_token,
    test_caches_lost_everywhere_at_once_change_no_token,
    test_sessions_wait_for_a_full_cache_without_a_disconnect,
)
from tests.coordinator.test_speculation import (
    test_a_replica_lost_while_drafts_are_checked_changes_no_token,
    test_caches_lost_while_drafts_are_checked_change_no_token,
    test_drafts_leave_nothing_in_any_cache,
    test_every_draft_length_gives_the_same_tokens_alone,
    test_forwards_that_fail_while_drafts_are_checked_change_no_token,
    test_rows_that_depend_on_earlier_tokens_are_decided_one_by_one,
    test_speculation_changes_no_token,
    test_the_last_position_of_a_model_ends_the_same_answer,
    trio,
)
from tests.support.local_service import LoadEngine, load_engines, trio_config
from tests.support.near_ties import recorded


@pytest.fixture(scope="module")
def load_engine() -> Iterator[LoadEngine]:
    """Loads targets on vLLM, and stops them."""
    targets: list[StepEngine[Any]] = []

    def load(config: ServiceConfig, role: Role) -> Engine:
        if role != "target":
            return load_role(config, role)
        targets.append(load_role(config.model_copy(update={"batch_invariant": False}).with_engine("vllm"), role))
        assert isinstance(targets[-1].runner, VllmRunner)
        return targets[-1]

    yield load
    for target in targets:
        target.runner.stop()


@pytest.fixture(scope="module")
def trio_engines(load_engine: LoadEngine) -> Mapping[Role, Engine]:
    return load_engines(trio_config(), load_engine)


@pytest.fixture(scope="module", autouse=True)
def near_ties() -> Iterator[None]:
    with recorded() as ties:
        yield
    print(f"The target on vLLM: {ties}")
