"""Maps token ids of the primary to ids of a small model and back, if both have the same text tokens.

Text tokens match one to one by their string. Added tokens match by their content, never by id (151645 is
`<|im_end|>` in Qwen2.5 and the assistant's mark in R1-Distill). The end of a text is one event, however many ids a
model has for it. An added token that the other model lacks is encoded as text tokens of that model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class VocabularyError(ValueError):
    """The text tokens of two checkpoints differ, so their logits cannot be added. The message names ids."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One model's tokens: ids of text tokens and of added tokens by string, end ids, and the width of its rows."""

    text: Mapping[str, int]
    added: Mapping[str, int]
    eos_ids: tuple[int, ...]
    width: int

    def legal(self) -> NDArray[np.bool_]:
        """[width]: True for ids that may be chosen: no padding of the embedding, and only the first of the end ids."""
        legal = np.zeros(self.width, np.bool_)
        for tokens in (self.text, self.added):
            legal[[i for i in tokens.values() if i < self.width]] = True
        legal[list(self.eos_ids[1:])] = False
        return legal


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """Ids of the primary as ids of a role.

    to_role [primary width] and to_primary [role width] hold -1 where there is no counterpart. expansions: by primary id
    the several ids of a role that encode it. folds: by primary id all role ids that mean the same event; their
    probabilities add up. ascending: True if the map keeps the order of ids.
    """

    to_role: Ids
    to_primary: Ids
    expansions: dict[int, tuple[int, ...]] = field(default_factory=dict)
    folds: dict[int, tuple[int, ...]] = field(default_factory=dict)
    ascending: bool = True

    def tokens(self, token: int) -> tuple[int, ...]:
        """The role's ids of the primary's `token`."""
        mapped = int(self.to_role[token])
        return (mapped,) if mapped >= 0 else self.expansions[token]


def self_map(vocabulary: Vocabulary) -> VocabularyMap:
    """The map of the primary to itself, without illegal ids and with all end ids folded into the first."""
    ids = np.where(vocabulary.legal(), np.arange(vocabulary.width), -1)
    folds = {vocabulary.eos_ids[0]: vocabulary.eos_ids} if vocabulary.eos_ids else {}
    return VocabularyMap(ids, ids, {}, folds)


def map_vocabulary(primary: Vocabulary, role: Vocabulary, encode: Callable[[str], Sequence[int]]) -> VocabularyMap:
    """The map from `primary` to `role`. encode: encodes a text into ids of the role, added tokens included.

    Raises VocabularyError if the text tokens differ.
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
    added = {i: token for token, i in primary.added.items() if i < primary.width and to_role[i] < 0}
    expansions = {i: _read_as_text(token, role.width, encode) for i, token in added.items()}
    expansions |= {i: (role.eos_ids[0],) for i in primary.eos_ids[1:] if role.eos_ids}
    folds = {primary.eos_ids[0]: role.eos_ids} if primary.eos_ids and role.eos_ids else {}
    ascending = bool(np.all(np.diff(to_role[to_role >= 0]) > 0))
    return VocabularyMap(to_role, to_primary, expansions, folds, ascending)


def _read_as_text(token: str, width: int, encode: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """The ids of a token's text in a role, character by character if the role has the token and no row for it."""
    ids = tuple(encode(token))
    return ids if max(ids, default=0) < width else tuple(id_ for character in token for id_ in encode(character))


def marker_fold(
    primary: Vocabulary,
    role: Vocabulary,
    mapping: VocabularyMap,
    marker: str,
    encode_primary: Callable[[str], Sequence[int]],
) -> dict[int, tuple[int, ...]]:
    """The fold that lets a role's probability of a marker (the end of the thinking) count.

    If the marker is one added token of the role and text to the primary, its probability is added to the first token
    of the primary's encoding of it. Empty in all other cases.
    """
    theirs = role.added.get(marker)
    if theirs is None or theirs >= role.width or theirs in role.eos_ids or marker in primary.added:
        return {}
    first = next(iter(encode_primary(marker)), -1)
    if first < 0 or mapping.to_role[first] < 0:
        return {}
    return {first: (int(mapping.to_role[first]), theirs)}


def _check_text(primary: Vocabulary, role: Vocabulary) -> None:
    """Raise VocabularyError unless both models have the same text tokens."""
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


@dataclass(frozen=True, eq=False)
class RequiredLogits:
    """One role's ids whose exact logits every row of a session needs besides its top-k.

    The ids form g groups. The probabilities of a group add up to that of one event, an id of the primary.
    """

    ids: NDArray[np.int32]  # [n], group after group
    starts: Ids  # [g], index of each group's first id
    events: Ids  # [g], the primary id of each group

    @cached_property
    def groups(self) -> Ids:
        """Where the ids of each group begin, [g + 1], the number of all ids last."""
        return np.append(self.starts, len(self.ids)).astype(np.int64)


NO_REQUIRED_LOGITS = RequiredLogits(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))


def required_logits(
    folds: Mapping[int, tuple[int, ...]], mapping: VocabularyMap, forced: Sequence[int] = ()
) -> RequiredLogits:
    """The required logits of a role: folded events, and those of the `forced` primary ids that the role has."""
    groups = dict(folds)
    for event in sorted(set(forced) - groups.keys()):
        if mapping.to_role[event] >= 0:
            groups[event] = (int(mapping.to_role[event]),)
    starts = np.cumsum([0, *(len(ids) for ids in groups.values())])[:-1]
    flat = np.array([i for ids in groups.values() for i in ids], np.int32)
    return RequiredLogits(flat, starts.astype(np.int64), np.array(list(groups), np.int64))
