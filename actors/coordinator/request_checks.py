"""Checks of a request before a coordinator accepts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from actors.api.generation import ROLES, Generate, Rejected, Role
from actors.text.vocabularies import VocabularyRegistry


def rejection(request: Generate, vocabularies: VocabularyRegistry) -> Rejected | None:
    """Rejection of a request that cannot be decoded; None if it can."""
    legal = vocabularies.legal(request.primary)
    sampling = request.sampling
    chosen = [*(i for i, _ in sampling.logit_bias), *sampling.allowed_token_ids]
    stray = [i for i in chosen if vocabularies.canonical(request.primary, i) not in legal]
    stray += [i for i in sampling.stop_token_ids if i < 0]
    if stray:
        return Rejected("invalid", f"the request names token ids that do not exist: {stray[:8]}")
    if any(not tokens for tokens in request.prompts.values()):
        return Rejected("invalid", "the prompt is empty")
    if request.primary != "target" and not (
        request.guidance.never_guides() and set(request.prompts) == {request.primary}
    ):
        return Rejected(
            "invalid", f"{request.primary} alone is not guided: it takes alpha 0 and no other role's prompt"
        )
    needed = (request.primary,) if request.guidance.never_guides() else ROLES
    if any(role not in request.prompts for role in needed):
        return Rejected("invalid", f"the request needs a prompt for each of {', '.join(needed)}")
    for role, tokens, field in _read_tokens(request, vocabularies):
        width = vocabularies.width(role)
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= width:
            beyond = sorted({i for i in tokens if not 0 <= i < width})
            why = f"{field} has the token ids {beyond[:8]} of the {role}, whose model has rows for {width} tokens only"
            return Rejected("invalid", why)
    return None


def _read_tokens(request: Generate, vocabularies: VocabularyRegistry) -> Iterator[tuple[Role, Sequence[int], str]]:
    """The tokens that the models will read whatever is sampled: role, ids, and the field that they come from."""
    thinking = request.thinking
    forced = vocabularies.vocabulary(request.primary, tuple(request.prompts), thinking).forced_texts
    for role, tokens in request.prompts.items():
        yield role, tokens, "the prompt"
        if thinking.max_tokens is not None:
            yield role, forced[role].closing, "thinking.closing"
            yield role, forced[role].end, "thinking.end"
        if thinking.min_tokens:
            yield role, forced[role].wait, "thinking.wait"


def too_long(request: Generate, caches: Mapping[Role, int | None], beyond_context: str) -> Rejected | None:
    """Rejection of a prompt that fits no replica's cache; None if it may fit.

    caches: tokens of each role's largest cache, None if unknown. A small model's cache does not count where decoding
    goes on without guidance (`beyond_context: stop_guidance`).
    """
    for role, tokens in request.prompts.items():
        most = caches[role]
        optional = role != request.primary and beyond_context == "stop_guidance"
        if most is not None and len(tokens) > most and not optional:
            return Rejected(
                "invalid", f"the prompt has {len(tokens)} tokens, the {role}'s cache takes {most}: shorten it"
            )
    return None


def canonical(request: Generate, vocabularies: VocabularyRegistry) -> Generate:
    """The request with each end id in its sampling replaced by the canonical one, whose own bias takes precedence."""
    sampling, role = request.sampling, request.primary
    bias: dict[int, float] = {}
    for token, number in sampling.logit_bias:
        event = vocabularies.canonical(role, token)
        if event == token or event not in bias:
            bias[event] = number
    stops = sorted({vocabularies.canonical(role, i) for i in sampling.stop_token_ids})
    allowed = sorted({vocabularies.canonical(role, i) for i in sampling.allowed_token_ids})
    changed = replace(
        sampling, logit_bias=tuple(bias.items()), stop_token_ids=tuple(stops), allowed_token_ids=tuple(allowed)
    )
    return replace(request, sampling=changed)
