"""Log-probabilities of candidates in the combined distribution, in nats.

They follow from the guidance formula alone, before temperature, filters, penalties and biases.
"""

from __future__ import annotations

import numpy as np

from actors.api.generation import Candidates, Scores
from actors.decoding import kernels
from actors.decoding.candidates import Floats, Ids

_SORTED_FROM = 256  # from so many likeliest candidates on, sorting all is faster than inserting one by one


def scores_of(
    ids: Ids,
    counts: Ids,
    logits: Floats,
    sums: Floats,
    row: int,
    rule: int,
    alpha: float,
    token: int,
    top: int,
    alone: int,
) -> Scores:
    """Scores of a row's token, with its `top` likeliest candidates and the `alone` likeliest of each model.

    ids, counts, logits, sums, rule: as in `kernels.decide`.
    """
    count = int(counts[row])
    names = ids[row, :count]
    logprobs = combined_logprobs(logits, sums, row, count, rule, alpha)
    target = logits[0, row, :count] - sums[0, row]
    guider = logits[1, row, :count] - sums[1, row] if rule == kernels.GUIDED else None
    at = int(np.searchsorted(names, token))
    logprob = float(logprobs[at]) if at < count else -np.inf
    return Scores(
        logprob,
        logprob - float(target[at]) if at < count else 0.0,
        likeliest(names, logprobs, top),
        likeliest(names, target, alone),
        likeliest(names, guider, alone) if guider is not None else (),
    )


def combined_logprobs(logits: Floats, sums: Floats, row: int, count: int, rule: int, alpha: float) -> Floats:
    """Log-probabilities [count] of a row's candidates. logits [R, B, W], sums [R, B]: as in `kernels.decide`."""
    combined = np.empty(count)
    total = kernels.log_total(rule, logits, row, count, sums, alpha, combined)
    return np.asarray(combined - total)


def likeliest(ids: Ids, logprobs: Floats, count: int) -> Candidates:
    """At most `count` likeliest candidates of one row: ids, logprobs [W]. Of equal ones the lowest id is first.

    Entries with NaN or -inf are no candidates.
    """
    if count < _SORTED_FROM:
        places = np.empty(count, np.int64)
        places = places[: kernels.likeliest(logprobs, len(logprobs), count, places)]
    else:
        places = np.argsort(np.where(np.isnan(logprobs), np.inf, -logprobs), kind="stable")[:count]
        places = places[logprobs[places] > -np.inf]
    return tuple(zip(ids[places].tolist(), logprobs[places].tolist(), strict=True))
