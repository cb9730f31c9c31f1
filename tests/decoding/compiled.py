"""Calls of single kernels for whole arrays, as tests want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.sampling_params import Sampling
from actors.decoding import kernels
from actors.decoding.candidates import BlockLayout, CandidateBlock
from actors.decoding.compiling import kernel
from actors.decoding.decision import Decisions, decide, spec_columns
from actors.decoding.penalties import Adjustments, adjustment_columns
from actors.decoding.vocabulary import RequiredLogits

Floats = NDArray[np.float64]
Ints = NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowSamplingSpec:
    """Sampling parameters of one row."""

    alpha: float
    sampling: Sampling
    seed: int
    position: int
    adjustments: Adjustments | None


def decide_rows(
    block: CandidateBlock, rows: Sequence[int], specs: Sequence[RowSamplingSpec], guided: bool
) -> Decisions:
    """Decide some rows of a block, all guided or all decoded by the primary alone."""
    rule = kernels.GUIDED if guided else kernels.ALONE
    columns = spec_columns([(rule, each.alpha, each.sampling, each.seed, each.position) for each in specs])
    return decide(block, np.array(rows), columns, [each.adjustments for each in specs])


@kernel
def _noise(seeds: Any, positions: Any, ids: Any, gumbel: bool, out: Any) -> None:
    for row in range(len(ids)):
        key = kernels.noise_key(seeds[row], positions[row])
        for place in range(ids.shape[1]):
            one = ids[row, place]
            out[row, place] = kernels.gumbel(key, one) if gumbel else kernels.uniform(key, one)


def uniform(seeds: Ints, positions: Ints, ids: Ints) -> Floats:
    """Uniform noise [B, W] of (seed [B], position [B], id [B, W])."""
    out = np.empty(ids.shape)
    _noise(seeds.astype(np.uint64), positions.astype(np.uint64), ids.astype(np.int64), False, out)
    return out


def gumbel(seeds: Ints, positions: Ints, ids: Ints) -> Floats:
    """Standard Gumbel noise [B, W] of (seed [B], position [B], id [B, W])."""
    out = np.empty(ids.shape)
    _noise(seeds.astype(np.uint64), positions.astype(np.uint64), ids.astype(np.int64), True, out)
    return out


@kernel
def _filter(logits: Any, specs: Any, settled: Any) -> None:
    work, none = np.empty(logits.shape[1]), -np.inf
    for row in range(len(logits)):
        settled[row] = kernels.filter_row(logits[row], logits.shape[1], specs[row], none, none, none, work)


def filter_logits(logits: Floats, parameters: Sequence[Sampling]) -> tuple[Floats, NDArray[np.bool_]]:
    """Filtered logits [B, W] over temperature of whole rows, and settled [B]."""
    out, settled = logits.copy(), np.empty(len(logits), np.bool_)
    _filter(out, _specs(parameters), settled)
    return out, settled


@kernel
def _adjust(ids: Any, logits: Any, specs: Any, extra: Any) -> None:
    kernels.adjust_row(ids, logits, len(ids), specs[0], extra, 0)


def adjust(ids: Ints, logits: Floats, sampling: Sampling, adjustments: Adjustments | None) -> None:
    """Adjust one row in place: ids [W] ascending, logits [W]."""
    _adjust(ids.astype(np.int64), logits, _specs([sampling]), adjustment_columns([adjustments]))


def _specs(parameters: Sequence[Sampling]) -> NDArray[np.void]:
    return spec_columns([(kernels.ALONE, 0.0, sampling, 0, 0) for sampling in parameters])


def stored(
    required: RequiredLogits, values: NDArray[Any], tempered: NDArray[Any], temperatures: Floats
) -> CandidateBlock:
    """A block of rows of one model as they arrive: values [B, n] at the required ids, and their tempered logsumexp."""
    rows, width = values.shape
    starts = np.zeros((rows, 4), np.int64)
    starts[:, 3] = np.arange(rows) * width
    sums = tempered.astype(np.float32)
    sent = kernels.SentRows(starts, *_NO_IDS, 0, _NO_LOGITS, sums, sums, values.astype(np.float32).reshape(-1))
    for column in (*sent[1:3], *sent[4:]):
        column.flags.writeable = False
    block = CandidateBlock(rows, BlockLayout({"target": required}, {"target": 0}))
    at = np.arange(rows)
    block.store_rows("target", at, sent, at, kernels.ALL, np.arange(1_000), temperatures)
    return block


_NO_IDS, _NO_LOGITS = (np.zeros(0, np.uint16), np.zeros(0, np.uint16)), np.zeros(0, np.float32)
