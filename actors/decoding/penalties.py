"""Adjusts a row by a request's bias, penalties and bans, before any filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.sampling_params import Sampling

Ids = NDArray[np.int64]


def changes_rows(sampling: Sampling) -> bool:
    """True if `adjust` can change a row with these parameters."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.allowed_token_ids
        or sampling.bad_words
    )


def lifted_ids(sampling: Sampling, prompt: Collection[int], output: Counter[int]) -> set[int]:
    """Ids whose logits the request raises: they may be chosen although no slice holds them."""
    lifted = {token for token, bias in sampling.logit_bias if bias > 0}
    if sampling.presence_penalty < 0 or sampling.frequency_penalty < 0:
        lifted |= output.keys()
    if sampling.repetition_penalty < 1:
        lifted |= {*output, *prompt}
    return lifted


def adjust(
    ids: Ids,
    logits: NDArray[Any],
    sampling: Sampling,
    prompt: Collection[int],
    output: Counter[int],
    banned: Iterable[int] = (),
) -> None:
    """Change one row in place, as vLLM does: ids [W] ascending, logits [W].

    1. logit_bias is added.
    2. The repetition penalty divides positive logits of ids in prompt and output and multiplies negative ones.
    3. Frequency and presence penalties are subtracted from ids in the output.
    4. `banned` ids become -inf, and so do all others than allowed_token_ids if there are any.
    """
    _add(ids, logits, dict(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        at = _places(ids, {*prompt, *output})
        seen, penalty = logits[at], sampling.repetition_penalty
        logits[at] = np.where(seen > 0, seen / penalty, seen * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        present, often = sampling.presence_penalty, sampling.frequency_penalty
        _add(ids, logits, {token: -present - often * count for token, count in output.items()})
    logits[_places(ids, banned)] = -np.inf
    if sampling.allowed_token_ids:
        logits[~np.isin(ids, sampling.allowed_token_ids)] = -np.inf


def _places(ids: Ids, wanted: Iterable[int]) -> NDArray[np.intp]:
    """Indices into `ids` of the wanted ids that it holds."""
    sought = np.array(sorted(set(wanted)), np.int64)
    place = np.searchsorted(ids, sought)
    within = place < len(ids)  # a row may have no candidate at all
    found: NDArray[np.intp] = place[within][ids[place[within]] == sought[within]]
    return found


def _add(ids: Ids, logits: NDArray[Any], addends: dict[int, float]) -> None:
    at = _places(ids, addends)
    logits[at] += [addends[int(token)] for token in ids[at]]
