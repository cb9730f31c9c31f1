from collections.abc import Sequence
from typing import Any

import pytest

from actors.api.generation import ROLES, Role
from router.backend import BadRequest
from router.context import Budget, context_limits, resolve_max_tokens
from tests.support.scripted_service import config, tokenizers

TOKENIZERS = tokenizers()  # 512, 400 and 300 positions


def bounds(primary: Role = "target", roles: Sequence[Role] = ROLES, **more: Any) -> dict[tuple[str, str], int]:
    found = context_limits(config(**more), TOKENIZERS, primary, roles)
    return {(limit.role, limit.reason.split()[0]): limit.tokens for limit in found}


def test_every_roles_positions_count_if_beyond_context_is_an_error() -> None:
    assert bounds()["guider_base", "positions"] == 300
    assert bounds(models={"guider_base": {"max_position": 99}})["guider_base", "positions"] == 99


@pytest.mark.parametrize("beyond", ["continue", "stop_guidance"])
def test_only_the_primarys_positions_count_otherwise(beyond: str) -> None:
    found = bounds(beyond_context=beyond)
    assert {role for role, reason in found if reason == "positions"} == {"target"}
    assert (("guider", "tokens") in found) == (beyond == "continue")


def test_a_measured_cache_holds_all_positions_and_is_no_limit_of_its_own() -> None:
    models = {"guider": {"cache_tokens": "auto"}}
    assert ("guider", "positions") in bounds(models=models)
    assert ("guider", "tokens") not in bounds(models=models)


def refusal(requested: int | None, **lengths: int) -> BadRequest:
    prompts = {role: [1] * lengths.get(role, 10) for role in ROLES}
    with pytest.raises(BadRequest) as caught:
        resolve_max_tokens(prompts, context_limits(config(), TOKENIZERS, "target", ROLES), Budget(requested, None))
    return caught.value


def test_a_length_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    error = refusal(291)
    assert "10 prompt tokens + 291 of max_tokens = 301, but the guider_base takes 300" in error.message
    assert "at most 290" in error.message
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")


def test_a_prompt_without_room_for_one_token_is_refused() -> None:
    error = refusal(None, guider=400)
    assert "400 prompt tokens, but the guider takes 400" in error.message
    assert "399 or less" in error.message
    assert error.param == "prompt"


def test_a_default_length_shrinks_to_fit_and_a_requested_one_does_not() -> None:
    prompts = {role: [1] * 10 for role in ROLES}
    found = context_limits(config(), TOKENIZERS, "target", ROLES)
    assert resolve_max_tokens(prompts, found, Budget(None, None)) == 290
    assert resolve_max_tokens(prompts, found, Budget(None, 1000)) == 290
    assert resolve_max_tokens(prompts, found, Budget(None, 16)) == 16
    assert resolve_max_tokens(prompts, found, Budget(290, 16)) == 290
