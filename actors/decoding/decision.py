"""Chooses tokens from complete rows: combine, adjust, estimate the unseen mass, sample. Vectorised over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import EXPLAINED, Role, Scores
from actors.api.sampling_params import Sampling
from actors.decoding.arithmetic import (
    Floats,
    RoleLogits,
    bounds_of_one_model,
    combine,
    guided_bounds,
    outside_mass,
    total_variation,
)
from actors.decoding.candidates import CandidateBlock
from actors.decoding.sampling import choose_filtered, filter_logits, noise_of
from actors.decoding.scoring import CandidateLogprobs

Adjust = Callable[[NDArray[np.int64], Floats], None]


@dataclass(frozen=True, slots=True)
class RowSamplingSpec:
    """Sampling parameters of one row. The noise depends on seed, position and token id.

    adjust: changes the row's logits in place by bias, penalties and bans (`penalties.adjust`); None if there are none.
    top: number of likeliest candidates to list with log-probabilities; None for no list. explain: list those of each
    model, too.
    """

    alpha: float
    sampling: Sampling
    seed: int
    position: int
    adjust: Adjust | None
    top: int | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """The tokens chosen for B rows, with W candidates each."""

    tokens: NDArray[Any]  # [B]
    target_tokens: NDArray[Any]  # [B], the target's own choice with the same noise
    outside: Floats  # [B], estimated probability mass outside the candidates
    settled: NDArray[np.bool_]  # [B], True if greed, top_p, top_k or min_p keep no id outside, whatever its logit
    uncovered: Floats  # [B], the largest mass that a single model has outside the candidates, exact
    no_legal_token: NDArray[np.bool_]  # [B], True if no candidate may be chosen
    ids: NDArray[Any]  # [B, W]
    filtered: Floats  # [B, W], combined, adjusted, over temperature; -inf where filtered
    inside: NDArray[np.bool_]  # [B, W], False in the padding
    scores: Sequence[Scores | None]  # by row, those of its token if the request wants them

    def row(self, index: int) -> Decisions:
        """The decision of one row."""
        return Decisions(*(getattr(self, field.name)[index : index + 1] for field in fields(self)))


def decide(
    block: CandidateBlock, rows: Sequence[int], specs: Sequence[RowSamplingSpec], primary: Role, guided: bool
) -> Decisions:
    """Choose the tokens of some rows of a block, all guided or all decoded by `primary` alone.

    rows: indices into the block; specs: one for each. Example of one row, alpha 1, greedy:

        candidates   z_target  z_guider  z_base     z     after `adjust` (token 9 is banned)
        3               2.0       1.0      1.5     1.5     1.5   -> the chosen token is 3
        7               1.0       2.0      2.0     1.0     1.0
        9               1.8       3.0      1.0     3.8    -inf

    The target alone would choose 3, too. Log-probabilities are those before `adjust`.
    """
    at = slice(None) if list(rows) == list(range(len(block))) else list(rows)
    ids, inside = block.ids[at], block.inside[at]
    alpha = np.array([spec.alpha for spec in specs])
    models = [
        RoleLogits(block.values(role)[at], inside, block.logsumexp[role][at])
        for role in ((primary, "guider", "guider_base") if guided else (primary,))
    ]
    own = np.where(inside, models[0].logits, -np.inf)
    logits = combine(models[0], models[1], models[2], alpha) if guided else own.copy()
    wanted = any(spec.top is not None for spec in specs)
    scored = CandidateLogprobs(ids, logits, alpha, *models) if wanted else None  # before anything is adjusted
    for index, spec in enumerate(specs):
        if spec.adjust is not None:
            count = int(np.count_nonzero(inside[index]))
            spec.adjust(ids[index, :count], logits[index, :count])
            spec.adjust(ids[index, :count], own[index, :count])
    no_legal_token: NDArray[np.bool_] = np.logical_not(np.any(np.isfinite(logits), axis=1))
    if no_legal_token.any():
        logits[no_legal_token] = own[no_legal_token] = 0.0  # a placeholder: the caller widens the row or gives up
    parameters = [spec.sampling for spec in specs]
    temperature = np.array([each.temperature for each in parameters])
    ceiling = block.ceiling[at]
    mass = outside_mass(alpha, *models, temperature=temperature, tempered=block.tempered[at], ceiling=ceiling)
    outside = np.where(no_legal_token, 1.0, mass.share(logits))
    uncovered = np.max([model.uncovered for model in models], axis=0)
    own_bounds = bounds = None
    if any(each.filters for each in parameters) or not guided:
        adjusted = np.array([spec.adjust is not None for spec in specs])
        own_bounds = bounds = bounds_of_one_model(mass, temperature, ceiling, adjusted)
        if guided:
            bounds = guided_bounds(mass, temperature, ceiling)
    filtered, settled = filter_logits(logits, parameters, bounds)
    seeds = np.array([spec.seed for spec in specs], np.uint64)
    positions = np.array([spec.position for spec in specs], np.uint64)
    noise = noise_of(ids, parameters, seeds, positions)
    tokens = target_tokens = choose_filtered(noise, ids, filtered, parameters)
    if guided:
        target_tokens = choose_filtered(noise, ids, filter_logits(own, parameters, own_bounds)[0], parameters)
    scores = [
        None
        if scored is None or spec.top is None
        else scored.scores(row, int(tokens[row]), spec.top, EXPLAINED if spec.explain else 0)
        for row, spec in enumerate(specs)
    ]
    settled = settled & ~no_legal_token if bounds is not None else np.zeros(len(specs), np.bool_)
    return Decisions(tokens, target_tokens, outside, settled, uncovered, no_legal_token, ids, filtered, inside, scores)


def compare(sliced: Decisions, whole: Decisions, sampling: Sampling) -> tuple[float, bool]:
    """Compare one row's decision from slices with that from full rows, as an audit does.

    Returns the total variation distance of the two distributions that the token is drawn from, and True if the tokens
    differ. A greedy distribution has one token.
    """
    differs = bool(sliced.tokens[0] != whole.tokens[0])
    if not sampling.temperature:
        return float(differs), differs
    inside = sliced.inside[0]
    spread = np.full(whole.filtered.shape, -np.inf)
    spread[0, np.searchsorted(whole.ids[0], sliced.ids[0, inside])] = sliced.filtered[0, inside]
    return float(total_variation(spread, whole.filtered, np.ones(1))[0]), differs
