"""Measures a coordinator's cost of guidance across two vocabularies, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from actors.decoding.candidates import Floats, Ids, RowSlice
from actors.decoding.cross_vocab.logprobs import RoleRowInput, TokenEventLogprobs
from actors.decoding.cross_vocab.retokenizer import IncrementalRetokenizer
from actors.decoding.cross_vocab.tables import SpecialTokenMatches, build_tables
from actors.decoding.cross_vocab.translators import Alignment

CANDIDATES = 64
K = 128  # ids of a slice
_READ = 2000  # tokens of the target
_FOLDS = 300


@dataclass(frozen=True, slots=True)
class Costs:
    """tables_s: building a pair's tables. read_us: one of the target's tokens as text of the small model. fold_ms: what
    one row of a small model says of CANDIDATES tokens, from a slice of K ids and what is looked up besides."""

    COLUMNS: ClassVar = ("tables, s", "a token read, us", f"{CANDIDATES} candidates, ms")

    tables_s: float
    read_us: float
    fold_ms: float

    def cells(self) -> list[str]:
        """As COLUMNS names them."""
        return [f"{self.tables_s:.2f}", f"{self.read_us:.1f}", f"{self.fold_ms:.3f}"]

    def values(self) -> dict[str, float]:
        """Rounded, by name."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def measure_costs(alignment: Alignment, text: str, width: int) -> Costs:
    """The costs of one pair, over `text`. width: of the small model's rows."""
    ids = alignment.target.encode(text)[0][:_READ]
    target_width = len(alignment.tables.events.starts) - 1
    rng = np.random.default_rng(0)
    rows = [_row(alignment, width, rng) for _ in range(_FOLDS)]
    tables = _timed(lambda: build_tables(alignment.target, alignment.role, SpecialTokenMatches({}, {}), target_width))
    reading = IncrementalRetokenizer(alignment.role)
    read = _timed(lambda: [reading.push(id_, alignment.token_bytes(id_)) for id_ in ids])
    fold = _timed(lambda: [_fold(alignment, *row) for row in rows])
    return Costs(tables, read / len(ids) * 1e6, fold / len(rows) * 1e3)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _row(alignment: Alignment, width: int, rng: np.random.Generator) -> tuple[Ids, RowSlice, Floats]:
    """Candidates, half of them images of the slice; the slice; and the whole row."""
    logits = rng.normal(0.0, 2.0, width)
    top = np.sort(np.argpartition(logits, -K)[-K:])
    images = np.unique(alignment.tables.image[top[top < len(alignment.tables.image)]])
    spoken = np.flatnonzero(np.diff(alignment.tables.events.starts))
    own = rng.choice(spoken, CANDIDATES, replace=False)
    ids = np.unique(np.concatenate([images[images >= 0][: CANDIDATES // 2], own]))[:CANDIDATES]
    return ids[None], RowSlice(top, logits[top], np.zeros(0), float(np.logaddexp.reduce(logits))), logits


def _fold(alignment: Alignment, ids: Ids, part: RowSlice, logits: Floats) -> Floats:
    events = TokenEventLogprobs(alignment.tables, ids, np.ones(ids.shape, np.bool_), [RoleRowInput(part, None)])
    _, places, asked = events.missing_logits()
    events.fill(places, logits[asked])
    return events.masses()
