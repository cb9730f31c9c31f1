"""Context limits of the roles, and the length of an answer that fits into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.api.generation import Role
from actors.config import ServiceConfig
from actors.text.tokenizer import RoleTokenizer
from router.backend import BadRequest


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """Maximum tokens of a role, prompt and answer together. reason: what sets the limit, for error messages."""

    role: Role
    tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Length of an answer in tokens: as requested in field `param` (None: not given), and the default."""

    requested: int | None
    default: int | None
    param: str = "max_tokens"


def context_limits(
    service: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer], primary: Role, roles: Sequence[Role]
) -> list[ContextLimit]:
    """The limits of a session with these roles.

    A small role's positions are a limit only if `beyond_context` is "error". A role's cache is a limit in every mode
    in which the role continues to run. A measured one holds every session of its positions, and coordinators know it.
    """
    found = []
    for role in roles:
        model = service.models.role(role)
        positions = model.max_position or tokenizers[role].max_position
        if positions is not None and (role == primary or service.beyond_context == "error"):
            found.append(ContextLimit(role, positions, "positions of its model"))
        if model.cache_tokens != "auto" and (role == primary or service.beyond_context != "stop_guidance"):
            found.append(ContextLimit(role, model.cache_tokens, "tokens of its cache"))
    return found


def max_model_len(service: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer], name: str) -> int:
    """Maximum tokens of a served model, prompt and answer together."""
    served = service.served_names[name]
    primary: Role = "target" if served == "guided" else served
    bounds = context_limits(service, tokenizers, primary, [primary] if served != "guided" else [*tokenizers])
    return min(bound.tokens for bound in bounds)


def resolve_max_tokens(prompts: Mapping[Role, Sequence[int]], bounds: Sequence[ContextLimit], budget: Budget) -> int:
    """max_tokens of an answer: as requested, else the smaller of the default and the remaining context.

    Raises BadRequest if the requested length, or a single token, does not fit.
    """
    requested, param = budget.requested, budget.param
    tightest = min(bounds, key=lambda bound: bound.tokens - len(prompts[bound.role]))
    prompt = len(prompts[tightest.role])
    left = tightest.tokens - prompt
    if left < max(requested or 0, 1):
        total = f" + {requested} of {param} = {prompt + requested}" if requested else ""
        raise BadRequest(
            f"{prompt} prompt tokens{total}, but the {tightest.role} takes {tightest.tokens} ({tightest.reason}): "
            + (
                f"ask for at most {left} tokens" if left > 0 else f"shorten the prompt to {tightest.tokens - 1} or less"
            ),
            param=param if requested and left > 0 else "prompt",
            code="context_length_exceeded",
        )
    if requested is not None:
        return requested
    return left if budget.default is None else min(budget.default, left)
