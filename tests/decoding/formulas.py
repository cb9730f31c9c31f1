"""The formulas of `actors.decoding.kernels` as numpy writes them, with which the compiled loops are compared.

z = z_target + alpha * (z_guider - z_guider_base): equation 1 of ThinkLogit (arXiv 2507.12759). z are logits in nats; B
is a number of rows and W a number of candidates. All arrays are float64. Sums run left to right (`cumsum`), so that
padding changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.sampling_params import Sampling
from actors.decoding.candidates import PADDING, CandidateBlock
from actors.decoding.decision import spec_columns
from actors.decoding.kernels import adjust_row
from actors.decoding.penalties import adjustment_columns
from tests.decoding.compiled import RowSamplingSpec

Ids = NDArray[Any]
Floats = NDArray[np.float64]
_NOISE = 1e-7  # a probability below this is lost in the float32 logsumexp
_COLDEST = 0.3  # the outside mass of a row below this temperature, such as a greedy one, is estimated at it
_FAR = 1e9  # beyond every logit
# Nats by which a logit and a mass outside a guided row's candidates may exceed their estimates. Guidance raises single
# ids by much more than the mean, so the margin of a logit is wide.
_LOGIT_MARGIN, _MASS_MARGIN = 3.0, 1.0


@dataclass(frozen=True, eq=False)
class RoleLogits:
    """One role's logits at the candidates of B rows."""

    logits: Floats  # [B, W], NaN where the role's vocabulary has no counterpart
    inside: NDArray[np.bool_]  # [B, W], False in the padding
    logsumexp: Floats  # [B], over the role's whole vocabulary

    @cached_property
    def uncovered(self) -> Floats:
        """[B]: 1 - the probability of the candidates. It is exact because slices carry the logsumexp of the row."""
        mass = np.exp(self.logits - self.logsumexp[:, None])
        return np.asarray(1.0 - np.cumsum(np.where(np.isnan(mass), 0.0, mass), 1)[:, -1])


def combine(target: RoleLogits, guider: RoleLogits, guider_base: RoleLogits, alpha: Floats) -> Floats:
    """Combined logits [B, W], -inf in the padding (arXiv 2507.12759, equation 1). alpha: [B].

    An id without a counterpart in a small model gets no guidance: its log-probability delta is 0, so its logit delta
    is the difference of the two logsumexp.
    """
    neutral = (guider.logsumexp - guider_base.logsumexp)[:, None]
    delta = guider.logits - guider_base.logits
    combined = target.logits + alpha[:, None] * np.where(np.isnan(delta), neutral, delta)
    return np.where(target.inside, combined, -np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class OutsideMass:
    """Estimated weight of the ids outside the candidates of B rows in softmax(combined / heat), from `outside_mass`."""

    heat: Floats  # [B], the temperature, at least .3
    log_mass: Floats  # [B], log of the sum of exp(combined / heat) over the ids outside
    log_lift: Floats  # [B], log of the factor by which guidance raises it
    target: RoleLogits  # its logits over the temperature

    def share(self, combined: Floats) -> Floats:
        """The probability mass [B] outside. combined: [B, W]."""
        log_inside = _log_sum(combined / self.heat[:, None], self.target.inside)
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(log_inside - self.log_mass, -700, 700))))


def outside_mass(
    alpha: Floats,
    target: RoleLogits,
    guider: RoleLogits | None = None,
    guider_base: RoleLogits | None = None,
    *,
    temperature: Floats,
    tempered: Floats,
    ceiling: Floats,
) -> OutsideMass:
    """Estimate, for each row [B], what the ids outside the candidates weigh.

    temperature: [B]. tempered: [B], the target's logsumexp of logits / temperature, or of logits in greedy rows.
    ceiling: [B], an upper bound on the target's logits outside the candidates. So the target's mass outside is known
    exactly; below a temperature of .3 it is bounded by that at .3. We use the larger of two estimators of the factor by
    which guidance raises it:
    1. the ratio of the guider's and the guider base's mass outside, exact if their difference is the same everywhere;
    2. the factor at the quarter of the candidates with the lowest guider logits, most of which only the target
       proposed.
    The result is an indicator, not a bound: audits compare it with full rows.
    """
    heat, cold = np.maximum(temperature, _COLDEST), temperature < _COLDEST
    at_temperature = _over_temperature(target, temperature, tempered)
    log_mass = _log_uncovered(at_temperature)
    if cold.any():  # exp(logit / heat) is exp(logit) * exp(logit * (1 / heat - 1)), and no logit is above the ceiling
        bound = _log_uncovered(target) + (1 / heat - 1) * np.clip(ceiling, -_FAR, _FAR)
        log_mass = np.where(cold, bound, log_mass)
    if guider is None or guider_base is None:
        return OutsideMass(heat, log_mass, np.zeros(len(alpha)), at_temperature)
    ratio = alpha * (_log_uncovered(guider) - _log_uncovered(guider_base)) / heat
    lowest = _lift_of_lowest_quarter(alpha, target, guider, guider_base, heat)
    lift = np.where(np.isnan(lowest), ratio, np.maximum(ratio, lowest))
    return OutsideMass(heat, log_mass + lift, lift, at_temperature)


@dataclass(frozen=True, slots=True, eq=False)
class OutsideBounds:
    """Bounds on what the ids outside the candidates of B rows can contribute to softmax(logits / temperature).

    ceiling [B]: none of their logits is higher (nats). least, most [B]: the log of the sum of exp(logit / temperature)
    over them lies between; of greedy rows it means nothing.
    """

    ceiling: Floats
    least: Floats
    most: Floats


def bounds_of_one_model(
    mass: OutsideMass, temperature: Floats, ceiling: Floats, adjusted: NDArray[np.bool_]
) -> OutsideBounds:
    """The bounds for rows that the target decides alone, exact but for the rounding of its logsumexp to float32.

    adjusted: [B], True if penalties or bans may lower logits outside the candidates. Nothing raises these.
    """
    outside, heat = mass.target, np.where(temperature > 0, temperature, 1.0)
    slack = np.spacing(np.abs(outside.logsumexp).astype(np.float32))
    fewest = outside.uncovered - slack
    known = ~adjusted & (fewest > 0)
    least = np.where(known, np.log(np.where(known, fewest, 1.0)) + outside.logsumexp, -np.inf)
    most = _log_uncovered(outside, slack)
    return OutsideBounds(np.minimum(ceiling, most * heat), least, most)  # at most all of it is one id's


def guided_bounds(mass: OutsideMass, temperature: Floats, ceiling: Floats) -> OutsideBounds:
    """Bounds for guided rows: the estimates, with margins.

    The choice of a row near temperature 0 hangs on a single id, of which an estimate of mass says too little: there the
    ceiling is infinite.
    """
    lifted = ceiling + np.maximum(mass.log_lift * mass.heat, 0.0)
    highest = np.minimum(lifted, mass.log_mass * mass.heat) + _LOGIT_MARGIN  # at most all of the mass is one id's
    most = mass.log_mass + _MASS_MARGIN / mass.heat
    return OutsideBounds(np.where(temperature < _COLDEST, np.inf, highest), np.full(len(most), -np.inf), most)


def _over_temperature(target: RoleLogits, temperature: Floats, tempered: Floats) -> RoleLogits:
    """A role's logits over the temperature, of greedy rows over 1."""
    heat = np.where(temperature > 0, temperature, 1.0)
    return target if (heat == 1).all() else RoleLogits(target.logits / heat[:, None], target.inside, tempered)


def log_total(
    combined: Floats,
    alpha: Floats,
    target: RoleLogits,
    guider: RoleLogits | None = None,
    guider_base: RoleLogits | None = None,
) -> Floats:
    """Estimate, for each row [B], the log of the sum of exp(combined) over the whole vocabulary (nats).

    Without guidance it is exactly the target's logsumexp. With guidance the target's mass outside the candidates is
    scaled by the ratio of the small models' mass outside, which is exact if no mass is outside. On prompts of the
    embedded trio, with 128 candidates of each model and no widening, the mean error was 0.0008 nats, and 0.1 nats
    without the scaling. If the candidates hold all of a small model's mass or more, as events of another vocabulary
    may, the factor of the candidates with the lowest guider logits is used instead.
    """
    if guider is None or guider_base is None:
        return target.logsumexp
    ratio = alpha * (_log_uncovered(guider) - _log_uncovered(guider_base))
    lift = _lift_of_lowest_quarter(alpha, target, guider, guider_base, np.ones(len(alpha)))
    ratio_is_known = np.minimum(guider.uncovered, guider_base.uncovered) > _NOISE
    lift = np.where(ratio_is_known | np.isnan(lift), ratio, lift)
    return np.asarray(np.logaddexp(_log_sum(combined, target.inside), _log_uncovered(target) + lift))


def _lift_of_lowest_quarter(
    alpha: Floats, target: RoleLogits, guider: RoleLogits, guider_base: RoleLogits, heat: Floats
) -> Floats:
    """[B]: log of the factor by which guidance raises the target's mass at the quarter of the candidates with the
    lowest guider logits, at temperature `heat` [B]; NaN if the guider has none of the candidates."""
    has_logit = ~np.isnan(guider.logits)
    ranked = np.sort(np.where(has_logit, guider.logits, np.inf), 1)
    last = np.take_along_axis(ranked, (np.count_nonzero(has_logit, 1) // 4)[:, None], 1)
    least = has_logit & (guider.logits <= last)
    delta = combine(target, guider, guider_base, alpha) - target.logits
    lift = _log_sum(target.logits + delta / heat[:, None], least) - _log_sum(target.logits, least)
    return np.where(least.any(1), lift, np.nan)


def _log_sum(logits: Floats, where: NDArray[np.bool_]) -> Floats:
    """[B]: log of the sum of exp(logits) over the marked candidates; far below any logit if none is marked."""
    top = np.max(np.where(where, logits, -_FAR), 1)
    weights = np.where(where, np.exp(np.minimum(logits - top[:, None], 0.0)), 0.0)
    return np.asarray(top + np.log(np.maximum(np.cumsum(weights, 1)[:, -1], np.finfo(np.float64).tiny)))


def _log_uncovered(rows: RoleLogits, slack: Floats | float = 0.0) -> Floats:
    """[B]: log of the sum of exp(logits) outside the candidates. slack: probability to add to it."""
    return np.asarray(np.log(np.maximum(rows.uncovered + slack, _NOISE)) + rows.logsumexp)


def total_variation(z: Floats, other: Floats, temperature: NDArray[Any]) -> Floats:
    """Total variation distance, for each row [B], between the softmax of z and of other [B, W] at temperatures [B]."""
    distance = np.abs(_softmax(z / temperature[:, None]) - _softmax(other / temperature[:, None]))
    return np.asarray(0.5 * np.cumsum(distance, 1)[:, -1])


def _softmax(z: Floats) -> Floats:
    weights = np.exp(z - np.max(z, 1, keepdims=True))
    return np.asarray(weights / np.cumsum(weights, 1)[:, -1:])


Ints = NDArray[Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`hashing.mix64`, vectorised."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seeds: Ints, positions: Ints, ids: Ints) -> Floats:
    """Uniform noise [B, W] of (seed [B], position [B], id [B, W]): 52 bits, strictly inside (0, 1)."""
    with np.errstate(over="ignore"):
        row = _mix64(seeds.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = _mix64(row[:, None] + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    u: Floats = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return u


def gumbel(seeds: Ints, positions: Ints, ids: Ints) -> Floats:
    """Standard Gumbel noise [B, W] of (seed [B], position [B], id [B, W])."""
    noise: Floats = -np.log(-np.log(uniform(seeds, positions, ids)))
    return noise


def filter_logits(
    logits: Floats, parameters: Sequence[Sampling], outside: OutsideBounds | None = None
) -> tuple[Floats, NDArray[np.bool_]]:
    """Apply temperature, then min_p, top_k and top_p to each row: [B, W] -> [B, W], -inf for filtered ids.

    Greedy rows (temperature 0) pass unchanged. Of equal logits the lowest id ranks first.
    outside: bounds on the ids that are not in `logits`; None: there are none.
    Also returns settled [B]: True if the whole row would keep the same ids, so that the same one would be chosen.
    """
    temperature = np.array([p.temperature or 1.0 for p in parameters])
    scaled: Floats = logits / temperature[:, None]
    sampled = np.array([p.temperature > 0 for p in parameters])
    if outside is None:
        settled, ceiling = np.ones(len(logits), np.bool_), np.full(len(logits), -np.inf)
    else:
        ceiling = outside.ceiling / temperature
        settled = ~sampled & (np.max(scaled, 1) > ceiling)
    active = np.array([p.filters for p in parameters])
    if active.any():
        chosen = [p for p in parameters if p.filters]
        top_k = np.array([p.top_k or np.iinfo(np.int64).max for p in chosen])
        filters = top_k, np.array([p.top_p for p in chosen]), np.array([p.min_p for p in chosen])
        none = np.full(len(chosen), -np.inf)
        bounds = (none, none) if outside is None else (outside.least[active], outside.most[active])
        scaled[active], settled[active] = _filter(scaled[active], *filters, ceiling[active], *bounds)
    return scaled, settled


def _filter(
    scaled: Floats, top_k: Ints, top_p: Floats, min_p: Floats, ceiling: Floats, least: Floats, most: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """Filter rows [B, W] of logits over temperature. ceiling, least, most [B]: `OutsideBounds` over temperature.

    Example: top_p .9, weights 60, 30, 4, and outside at least 1, at most 6, none heavier than 4. The whole row weighs
    95 to 100, so its nucleus reaches to a weight of 85.5 to 90 and holds the ids of 60 and 30 in both cases: settled.
    With at most 10 outside it reaches to 93.6, and may hold the id of 4 or one outside: not settled.
    """
    order = np.argsort(-scaled, axis=1, kind="stable")
    ranked = np.take_along_axis(scaled, order, 1)
    top = ranked[:, :1]
    weights = np.exp(ranked - top)
    rank = np.arange(scaled.shape[1])
    known = ranked > ceiling[:, None]  # these rank before every id outside
    # min_p or top_k leave nothing outside: then top_p, which comes after them, needs no id outside either.
    closed = (np.count_nonzero(known, 1) >= top_k) | (top[:, 0] + np.log(np.maximum(min_p, 1e-300)) > ceiling)
    keep = (rank < top_k[:, None]) & (weights >= min_p[:, None])
    weights = np.where(keep, weights, 0.0)
    cumulative = np.cumsum(weights, 1)
    before = cumulative - weights
    inside = cumulative[:, -1]
    cut_before = (top_k < np.iinfo(np.int64).max) | (min_p > 0)  # they may filter ids outside, which then weigh nothing
    totals = [
        inside + np.where(closed | absent, 0.0, np.exp(np.minimum(bound - top[:, 0], 700.0)))
        for bound, absent in ((least, cut_before), (most, False))
    ]
    # The first token always stays; others stay while the mass before them is below top_p of what min_p and top_k kept.
    kept = [keep & ((before < (top_p * total)[:, None]) | (rank == 0)) for total in totals]
    within = np.cumsum(np.where(known, weights, 0.0), 1)[:, -1] >= top_p * totals[1]
    settled = closed | ((top_p < 1) & within & np.all(kept[0] == kept[1], axis=1))
    out = np.empty_like(scaled)
    np.put_along_axis(out, order, np.where(kept[0], ranked, -np.inf), 1)
    return out, settled


def noise_of(ids: Ints, parameters: Sequence[Sampling], seeds: Ints, positions: Ints) -> Floats | None:
    """The noise [B, W] for choices among `ids` [B, W]; None if every row is greedy."""
    return gumbel(seeds, positions, ids) if any(p.temperature > 0 for p in parameters) else None


def choose_filtered(noise: Floats | None, ids: Ints, filtered: Floats, parameters: Sequence[Sampling]) -> Ints:
    """The chosen id of each row, [B], from `noise_of` and `filter_logits` [B, W]. Greedy rows get no noise."""
    scores = filtered
    if noise is not None:
        sampled = np.array([p.temperature > 0 for p in parameters])
        scores = filtered + (noise if sampled.all() else np.where(sampled[:, None], noise, 0.0))
    return np.asarray(np.take_along_axis(ids, np.argmax(scores, 1)[:, None], 1)[:, 0])


def rank_ids(together: Ids) -> tuple[Ids, NDArray[np.bool_], Ids]:
    """Sort and deduplicate the ids of each row.

    together [B, N], -1 for no id -> ids [B, W] ascending, then PADDING; inside [B, W], False in the padding; places
    [B, N], the column of each given id, W for -1. Example: [[7, 3, -1, 7]] -> [[3, 7]], [[True, True]], [[1, 0, 2, 1]].
    """
    keyed = np.where(together < 0, PADDING, together)
    order = np.argsort(keyed, axis=1)
    ranked = np.take_along_axis(keyed, order, 1)
    first = np.ones(ranked.shape, np.bool_)
    np.not_equal(ranked[:, 1:], ranked[:, :-1], out=first[:, 1:])
    real = ranked < PADDING
    standing = np.cumsum(first & real, 1) - 1
    width = max(int(standing.max(initial=0)) + 1, 1)
    standing = np.where(real, standing, width)
    ids = np.full((len(together), width + 1), PADDING, np.int64)
    np.put_along_axis(ids, standing, ranked, 1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, standing, 1)
    return ids[:, :width], ids[:, :width] < PADDING, places


@dataclass(frozen=True, slots=True, eq=False)
class FormulaDecisions:
    """The outcomes of `kernels.decide` for B rows, and the log-probabilities [B, W] of the combined distribution."""

    tokens: Ids
    target_tokens: Ids
    outside: Floats
    settled: NDArray[np.bool_]
    uncovered: Floats
    no_legal_token: NDArray[np.bool_]
    filtered: Floats  # [B, W]
    logprobs: Floats


def decide(
    block: CandidateBlock, rows: Sequence[int], specs: Sequence[RowSamplingSpec], guided: bool
) -> FormulaDecisions:
    """The decisions of some rows of a block, all guided or all decoded by the primary alone."""
    at = list(rows)
    ids = block.ids[at]
    inside = ids < PADDING
    alpha = np.array([spec.alpha for spec in specs])
    models = [
        RoleLogits(np.where(inside, block.logits[number][at], np.nan), inside, block.sums[number][at])
        for number in range(3 if guided else 1)
    ]
    own = np.where(inside, models[0].logits, -np.inf)
    logits = combine(models[0], models[1], models[2], alpha) if guided else own.copy()
    logprobs = logits - log_total(logits, alpha, *models)[:, None]  # before anything is adjusted
    columns = spec_columns([(0, spec.alpha, spec.sampling, spec.seed, spec.position) for spec in specs])
    extra = adjustment_columns([spec.adjustments for spec in specs])
    for index in range(len(specs)):
        for z in (logits[index], own[index]):
            adjust_row(ids[index], z, int(np.count_nonzero(inside[index])), columns[index], extra, index)
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
        adjusted = np.array([spec.adjustments is not None for spec in specs])
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
    settled = settled & ~no_legal_token if bounds is not None else np.zeros(len(specs), np.bool_)
    return FormulaDecisions(tokens, target_tokens, outside, settled, uncovered, no_legal_token, filtered, logprobs)
