"""Measures a pair of vocabularies over running text: shares of mapped ids, of tokens taken back, of mass attributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from actors.decoding.cross_vocab.translators import Alignment
from benchmarks.aligned import AlignedModel
from benchmarks.byte_tokenizer import ByteTokenizer

Floats = NDArray[np.float64]

WINDOW = 128  # tokens of the target
FOLLOWED = 400  # tokens of the target whose attribution is checked
_BEHIND = 64  # that follow them, so that the last is tokenised as in a longer text
_SURE = 80.0  # nats that a row has for the true token above all others


@dataclass(frozen=True, slots=True)
class Attribution:
    """Shares, for one kind of text.

    mapped: tokens with one of the same bytes in the small vocabulary. unmapped_windows: windows of WINDOW tokens that
    hold one without. rollbacks: tokens whose text takes back a token that the small model had read. attributed: places
    where a small model that is certain of the text gives most to the target's next token.
    """

    COLUMNS: ClassVar = ("mapped 1:1", f"unmapped in {WINDOW}", "rollbacks", "attributed")

    kind: str
    mapped: float
    unmapped_windows: float
    rollbacks: float
    attributed: float

    def cells(self) -> list[str]:
        """As COLUMNS names them."""
        return [f"{share:.2%}" for share in (self.mapped, self.unmapped_windows, self.rollbacks, self.attributed)]

    def values(self) -> dict[str, float]:
        """The shares by name."""
        return {name: round(share, 4) for name, share in asdict(self).items() if name != "kind"}


def attribute(
    kind: str, text: str, target: ByteTokenizer, small: ByteTokenizer, alignment: Alignment, followed: int = FOLLOWED
) -> Attribution:
    """All shares of one text, that of attribution over so many of its tokens."""
    ids = target.encode(text)
    mapped = np.array([(target.texts[id_] or b"") in small.ids for id_ in ids])
    windows = [mapped[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    taken_back = [
        back for start in range(0, len(ids), WINDOW) for back in _rollbacks(ids[start : start + WINDOW], target, small)
    ]
    return Attribution(
        kind,
        float(mapped.mean()),
        float(np.mean([not window.all() for window in windows])),
        float(np.mean(taken_back)),
        float(np.mean(_attributed(ids, target, small, alignment, followed))),
    )


def _rollbacks(ids: Sequence[int], target: ByteTokenizer, small: ByteTokenizer) -> list[bool]:
    """For each of the target's tokens, True if the small model's tokens of the text before it change."""
    ends = np.cumsum([len(target.texts[id_] or b"") for id_ in ids]).tolist()
    text = target.decode(ids)
    read = small.encode_all([text[:end].decode(errors="ignore") for end in ends])
    return [after[: len(before)] != before for before, after in pairwise(read)]


def _attributed(
    ids: Sequence[int], target: ByteTokenizer, small: ByteTokenizer, alignment: Alignment, followed: int
) -> list[bool]:
    """For each of the first tokens, True if the mass of the small model's true next token is counted towards it."""
    text = target.decode(ids[: followed + _BEHIND])
    follower = AlignedModel(alignment, Follower(small, text.decode(errors="ignore")))
    right = []
    for id_ in ids[:followed]:
        masses = np.nan_to_num(follower.masses(), nan=-np.inf)
        right.append(bool(masses[id_] > np.log(0.5)))
        follower.push(id_)
    return right


class Follower:
    """A small model that knows the text to come and is certain of its next token; where it reads tokens that are no
    beginning of the text's own, it knows nothing."""

    def __init__(self, tokenizer: ByteTokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        self._lengths = np.array([len(one or b"") for one in tokenizer.texts])
        starts = np.cumsum([0, *(self._lengths[ids])])
        self._nexts = dict(zip(starts.tolist(), ids, strict=False))

    def __call__(self, tokens: Sequence[int]) -> Floats:
        row = np.zeros(len(self._lengths))
        read = int(self._lengths[np.asarray(tokens, np.int64)].sum())
        if read in self._nexts:
            row[self._nexts[read]] = _SURE
        return row
