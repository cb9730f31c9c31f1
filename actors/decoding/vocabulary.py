"""From the primary's token ids to a small model's and back, when both share their text tokens.

Text tokens match one to one by their spelling; added tokens match by their content, never by id (151645 is
`<|im_end|>` in Qwen2.5 and the assistant's mark in R1-Distill); the end of a text is one event, however many ids a
model has for it. An added token that the other model lacks is spelled out in its text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class VocabularyError(ValueError):
    """Two checkpoints whose text tokens differ, so that their logits cannot be added; the message names ids."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One model's tokens: text tokens and added tokens by spelling, its end ids, and the width of its rows."""

    text: Mapping[str, int]
    added: Mapping[str, int]
    eos_ids: tuple[int, ...]
    width: int

    def legal(self) -> NDArray[np.bool_]:
        """[width]: ids that may be chosen: no padding of the embedding, and only the first of the end ids."""
        legal = np.zeros(self.width, np.bool_)
        for tokens in (self.text, self.added):
            legal[[i for i in tokens.values() if i < self.width]] = True
        legal[list(self.eos_ids[1:])] = False
        return legal


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """Ids of the primary as ids of a role.

    to_role [primary width] and to_primary [role width] hold -1 where there is no counterpart. spelled: primary ids
    that a role reads as several of its ids. folds: role ids that mean the same event to the primary, by primary id;
    their probabilities add up. ascending: ascending ids of one model are ascending ids of the other.
    """

    to_role: Ids
    to_primary: Ids
    spelled: dict[int, tuple[int, ...]] = field(default_factory=dict)
    folds: dict[int, tuple[int, ...]] = field(default_factory=dict)
    ascending: bool = True

    def tokens(self, token: int) -> tuple[int, ...]:
        """What the role reads when the primary emits `token`."""
        mapped = int(self.to_role[token])
        return (mapped,) if mapped >= 0 else self.spelled[token]


def self_map(vocabulary: Vocabulary) -> VocabularyMap:
    """The map of the primary onto itself: illegal ids dropped, its end ids folded into the first."""
    ids = np.where(vocabulary.legal(), np.arange(vocabulary.width), -1)
    folds = {vocabulary.eos_ids[0]: vocabulary.eos_ids} if vocabulary.eos_ids else {}
    return VocabularyMap(ids, ids, {}, folds)


def map_vocabulary(
    primary: Vocabulary,
    role: Vocabulary,
    encode: Callable[[str], Sequence[int]],
) -> VocabularyMap:
    """The map from `primary` to `role`. encode: encodes a text into ids of the role, recognising added tokens.

    Raises VocabularyError when the text tokens differ.
    """
    _check_text(primary, role)
    to_role = np.full(primary.width, -1, np.int64)
    to_primary = np.full(role.width, -1, np.int64)
    pairs = [(i, role.text[token]) for token, i in primary.text.items()]
    pairs += [(i, role.added[token]) for token, i in primary.added.items() if token in role.added]
    ends = {*primary.eos_ids}, {*role.eos_ids}
    widths = primary.width, role.width
    pairs = [(p, r) for p, r in pairs if p < widths[0] and r < widths[1] and p not in ends[0] and r not in ends[1]]
    if primary.eos_ids and role.eos_ids:
        pairs.append((primary.eos_ids[0], role.eos_ids[0]))
    for ours, theirs in pairs:
        to_role[ours], to_primary[theirs] = theirs, ours
    spelled = {i: tuple(encode(token)) for token, i in primary.added.items() if i < primary.width and to_role[i] < 0}
    spelled |= {i: (role.eos_ids[0],) for i in primary.eos_ids[1:] if role.eos_ids}
    folds = {primary.eos_ids[0]: role.eos_ids} if primary.eos_ids and role.eos_ids else {}
    ascending = bool(np.all(np.diff(to_role[to_role >= 0]) > 0))
    return VocabularyMap(to_role, to_primary, spelled, folds, ascending)


def marker_fold(
    primary: Vocabulary,
    role: Vocabulary,
    mapping: VocabularyMap,
    marker: str,
    encode_primary: Callable[[str], Sequence[int]],
) -> dict[int, tuple[int, ...]]:
    """What to fold so that a role's wish to emit a marker (the thinking's end) is heard.

    Where the marker is one added token of the role and text to the primary, it counts towards the first token of the
    primary's spelling. Empty where there is nothing to fold.
    """
    theirs = role.added.get(marker)
    if theirs is None or theirs >= role.width or theirs in role.eos_ids or marker in primary.added:
        return {}
    first = next(iter(encode_primary(marker)), -1)
    if first < 0 or mapping.to_role[first] < 0:
        return {}
    return {first: (int(mapping.to_role[first]), theirs)}


def _check_text(primary: Vocabulary, role: Vocabulary) -> None:
    """Raise VocabularyError unless every text token of one model is one of the other."""
    ours = {token: i for token, i in primary.text.items() if i < primary.width}
    theirs = {token: i for token, i in role.text.items() if i < role.width}
    only_ours = sorted(ours[token] for token in ours.keys() - theirs.keys())
    only_theirs = sorted(theirs[token] for token in theirs.keys() - ours.keys())
    if only_ours or only_theirs:
        raise VocabularyError(
            f"the text tokens differ: {len(only_ours)} are only in the first model (ids {_first_ids(only_ours)}), "
            f"{len(only_theirs)} only in the second (ids {_first_ids(only_theirs)})"
        )


def _first_ids(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "") if ids else "none"


@dataclass(frozen=True, slots=True, eq=False)
class RequiredLogits:
    """Ids that every row of a session must know exactly, whatever its top-k, in one role's ids.

    ids [n]: flat, group after group. starts [g]: where each group begins. events [g]: the primary id that the group's
    probabilities add up to.
    """

    ids: NDArray[np.int32]
    starts: Ids
    events: Ids

    def fold(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """[rows, n] logits at `ids` -> [rows, g]: each group's logsumexp."""
        if len(self.ids) == len(self.events):
            return values.astype(np.float64)
        folded: NDArray[np.float64] = np.logaddexp.reduceat(values.astype(np.float64), self.starts, axis=1)
        return folded


NO_REQUIRED_LOGITS = RequiredLogits(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))


def required_logits(
    folds: Mapping[int, tuple[int, ...]], mapping: VocabularyMap, forced: Sequence[int] = ()
) -> RequiredLogits:
    """What a role's rows must know: folded events, and `forced` primary ids where the role has them."""
    groups = dict(folds)
    for event in sorted(set(forced) - groups.keys()):
        if mapping.to_role[event] >= 0:
            groups[event] = (int(mapping.to_role[event]),)
    starts = np.cumsum([0, *(len(ids) for ids in groups.values())])[:-1]
    flat = np.array([i for ids in groups.values() for i in ids], np.int32)
    return RequiredLogits(flat, starts.astype(np.int64), np.array(list(groups), np.int64))
