"""Log-probabilities of candidates in the combined distribution, in nats.

They follow from the guidance formula alone, before temperature, filters, penalties and biases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Candidates, Scores
from actors.decoding.arithmetic import Floats, RoleLogits, log_total
from actors.decoding.candidates import Ids


class CandidateLogprobs:
    """Log-probabilities of the candidates of B rows in the combined distribution and in each model alone."""

    def __init__(self, ids: Ids, combined: Floats, alpha: Floats, target: RoleLogits, *small: RoleLogits) -> None:
        """ids, combined: [B, W], candidates and combined logits. small: guider and guider base if they take part."""
        self._ids = ids
        self._guided = combined - log_total(combined, alpha, target, *small)[:, None]
        self._target = target.logits - target.logsumexp[:, None]
        self._guider = small[0].logits - small[0].logsumexp[:, None] if small else None

    def scores(self, row: int, token: int, top: int, alone: int) -> Scores:
        """Scores of a row's token, with its `top` likeliest candidates and the `alone` likeliest of each model."""
        at = int(np.searchsorted(self._ids[row], token))
        logprob = float(self._guided[row, at])
        return Scores(
            logprob,
            logprob - float(self._target[row, at]),
            likeliest(self._ids[row], self._guided[row], top),
            likeliest(self._ids[row], self._target[row], alone),
            likeliest(self._ids[row], self._guider[row], alone) if self._guider is not None else (),
        )


def likeliest(ids: Ids, logprobs: Floats, count: int) -> Candidates:
    """At most `count` likeliest candidates of one row: ids, logprobs [W]. Of equal ones the lowest id is first.

    Entries with NaN or -inf are no candidates.
    """
    if not count:
        return ()
    ranked = np.where(np.isnan(logprobs), -np.inf, logprobs)
    if count < len(ranked):
        least = np.partition(ranked, -count)[-count]
        places: NDArray[np.intp] = np.nonzero(ranked >= least)[0]
    else:
        places = np.arange(len(ranked))
    order = places[np.argsort(-ranked[places], kind="stable")][:count]
    pairs = zip(ids[order].tolist(), ranked[order].tolist(), strict=True)
    return tuple((id_, logprob) for id_, logprob in pairs if logprob > -np.inf)
