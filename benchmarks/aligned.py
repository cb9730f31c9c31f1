"""Reads one small model's rows as probabilities of a target's tokens, without a service, for measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.decoding.candidates import Floats, RowSlice
from actors.decoding.cross_vocab.logprobs import CrossingRows, RoleRowInput, TokenEventLogprobs
from actors.decoding.cross_vocab.translators import Alignment, RetokenizingTranslator
from actors.decoding.stream import Stream

LanguageModel = Callable[[Sequence[int]], Floats]  # tokens so far -> the next one's logits [role width]


class AlignedModel:
    """A small model beside a target of another family."""

    def __init__(self, alignment: Alignment, model: LanguageModel, prompt: Sequence[int] = ()) -> None:
        """prompt: in the small model's tokens."""
        self._alignment, self._model = alignment, model
        self.stream = Stream(0, prompt)
        self._reader = RetokenizingTranslator(alignment, self.stream)
        self._every = np.arange(len(alignment.tables.events.starts) - 1)[None]

    def push(self, token: int) -> None:
        """Append one of the target's tokens."""
        self._reader.append(token)

    def masses(self) -> Floats:
        """[target width] log-probability of each target token as the next one; NaN where there is no such event."""
        boundaries = self._reader.translate_drafts(()).boundaries_by_row[0]
        crossing = None
        if boundaries is not None:
            crossing = CrossingRows(boundaries)
            for number in range(crossing.rows):
                logits, total = self._row(boundaries.first + number)
                mine = crossing.at == number
                crossing.values[mine] = logits[crossing.ids[mine]]
                crossing.sums[number] = total
        logits, total = self._row(len(self.stream))
        whole = RowSlice(np.arange(len(logits)), logits, np.zeros(0), total)
        inside: NDArray[np.bool_] = np.ones(self._every.shape, np.bool_)
        events = TokenEventLogprobs(self._alignment.tables, self._every, inside, [RoleRowInput(whole, crossing)])
        masses: Floats = events.masses()[0]
        return masses

    def _row(self, length: int) -> tuple[Floats, float]:
        logits = np.asarray(self._model(self.stream.tokens[:length]), np.float64)
        return logits, float(np.logaddexp.reduce(logits))


def difference(guider: Floats, guider_base: Floats) -> Floats:
    """The guider's masses less those of its base; 0 where either has no probability for an event."""
    delta: Floats = np.nan_to_num(guider - guider_base, nan=0.0)
    return delta
