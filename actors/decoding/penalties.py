"""Turns a request's bias, penalties and bans into columns for `kernels.decide`, before any filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.sampling_params import Sampling
from actors.decoding.kernels import RowAdjustments, no_adjustments

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """Biases, penalties and bans of one row. Ids are ascending.

    biases [n]: added to the logits of bias_ids [n]. seen_counts [m]: how often each of seen_ids [m] is in the output,
    0 for ids of the prompt. banned: ids that are never chosen. allowed: if there are any, no other id is chosen. legal:
    one bit for each id of the vocabulary, as int32 words; without words every id is legal.
    """

    bias_ids: Ids
    biases: NDArray[np.float64]
    seen_ids: Ids
    seen_counts: Ids
    banned: Ids
    allowed: Ids
    legal: NDArray[np.int32]


def changes_rows(sampling: Sampling) -> bool:
    """True if rows can be changed with these parameters."""
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


def adjustments(
    sampling: Sampling,
    prompt: Collection[int],
    output: Mapping[int, int],
    banned: Iterable[int] = (),
    legal: NDArray[np.int32] | None = None,
) -> Adjustments:
    """The adjustments of a request's next row.

    output: how often each id was generated. banned: ids that this row alone excludes. legal: bits of the ids that a
    grammar allows.
    """
    biases = dict(sorted(sampling.logit_bias))
    seen: dict[int, int] = {}
    if sampling.repetition_penalty != 1:
        seen = dict.fromkeys(prompt, 0)
    if seen or sampling.presence_penalty or sampling.frequency_penalty:
        seen = dict(sorted((seen | dict(output)).items()))
    return Adjustments(
        _ids(biases),
        np.array(list(biases.values()), np.float64),
        _ids(seen),
        _ids(seen.values()),
        _ids(sorted(set(banned))),
        _ids(sorted(set(sampling.allowed_token_ids))),
        _EVERY_ID if legal is None else legal,
    )


def adjustment_columns(rows: Sequence[Adjustments | None]) -> RowAdjustments:
    """The adjustments of n rows as columns; None for a row without any."""
    present = [each for each in rows if each is not None]
    if not present:
        return no_adjustments(len(rows))
    sizes = np.array([_sizes(each) for each in rows])
    offsets = np.zeros((sizes.shape[1], len(rows) + 1), np.int64)
    np.cumsum(sizes.T, axis=1, out=offsets[:, 1:])
    columns = [np.concatenate([getattr(each, name) for each in present]) for name in Adjustments.__slots__]
    return RowAdjustments(offsets, *columns)


_EVERY_ID = np.zeros(0, np.int32)


def _sizes(row: Adjustments | None) -> tuple[int, ...]:
    """Lengths of the columns in the order of `RowAdjustments.offsets`."""
    if row is None:
        return (0,) * 5
    return tuple(len(each) for each in (row.bias_ids, row.seen_ids, row.banned, row.allowed, row.legal))


def _ids(tokens: Iterable[int] | Any) -> Ids:
    return np.array(list(tokens), np.int64)
