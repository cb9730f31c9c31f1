"""Turns complete logits rows into tokens; requests a wider top-k or a full-row audit when needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.api.generation import Scores
from actors.config import Exchange as ExchangeConfig
from actors.coordinator.frames import RowFrame
from actors.coordinator.session import LogitsRow, VerificationWindow
from actors.coordinator.stats import CoordinatorMeter
from actors.decoding.decision import Decisions, RowSamplingSpec, compare, decide
from actors.wire.messages import WHOLE


@dataclass(frozen=True, slots=True)
class RowDecision:
    """One row of `decisions`, and the alpha with which it was decided."""

    decisions: Decisions
    index: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """The token of a row. changed: the target alone would have chosen another. scores: if the request wants them."""

    token: int
    changed: bool
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class NeedsWiderTopK:
    """The row cannot be decided before slices of this k have arrived (WHOLE: whole rows)."""

    k: int


@dataclass(frozen=True, slots=True)
class NoLegalToken:
    """Not even the whole row has a token that may be chosen."""


Verdict = Chosen | NeedsWiderTopK | NoLegalToken


class Verifier:
    """Decides rows from slices, widens those with too much unseen mass, and audits one guided row in so many."""

    def __init__(self, config: ExchangeConfig, meter: CoordinatorMeter | None = None) -> None:
        self._config, self._meter = config, meter or CoordinatorMeter()
        self._since_audit = 0
        self.audited_variation = 0.0  # total variation, summed over audited rows

    def verify(self, windows: Sequence[VerificationWindow]) -> list[list[RowDecision]]:
        """Decide each window's next rows: all complete ones, or only the first if its token affects the later ones."""
        wanted = [_sampling_specs(window) for window in windows]
        groups: dict[RowFrame[LogitsRow], list[tuple[LogitsRow, RowSamplingSpec]]] = {}
        for each in wanted:
            for row, spec in each:
                groups.setdefault(row.frame, []).append((row, spec))
        decided: dict[LogitsRow, RowDecision] = {}
        for frame, members in groups.items():
            specs = [spec for _, spec in members]
            decisions = decide(frame.block, [row.at for row, _ in members], specs, members[0][0].window.guided)
            for index, (row, spec) in enumerate(members):
                decided[row] = RowDecision(decisions, index, spec.alpha)
        return [[decided[row] for row, _ in each] for each in wanted]

    def verdict(self, row: LogitsRow, decided: RowDecision) -> Verdict:
        """Outcome of a decided row, once the rows before it have become tokens."""
        decisions, index = decided.decisions, decided.index
        if row.audited is not None:
            return self._audit(row, decided)
        if row.k != WHOLE:
            if decisions.no_legal_token[index] or self._unseen(decisions, index) or _too_few(row, decisions, index):
                return self._wider(row)
            if decided.alpha and self._audit_due():
                row.begin_audit(decisions.row(index))
                return NeedsWiderTopK(WHOLE)
        elif decisions.no_legal_token[index]:
            return NoLegalToken()
        return self._chosen(row, decisions, index)

    def _unseen(self, decisions: Decisions, index: int) -> bool:
        """True if an id outside the candidates could be chosen, with more than the allowed probability."""
        limit = self._config.max_unseen_mass
        return limit < 1 and bool(decisions.outside[index] > limit and not decisions.settled[index])

    def _wider(self, row: LogitsRow) -> NeedsWiderTopK:
        """Next width of the row: one wider slice, then the whole row. It depends on the row alone, like its token."""
        active = row.window.active
        if row.k == self._config.k:
            active.session.count_widened()
            self._meter.widened_rows.add()
        wider = self._config.k * self._config.widen_factor
        fits = row.k < wider < active.replicas[active.primary].welcome.width
        return NeedsWiderTopK(wider if fits else WHOLE)

    def _audit_due(self) -> bool:
        self._since_audit += 1
        if not self._config.audit_every or self._since_audit < self._config.audit_every:
            return False
        self._since_audit = 0
        return True

    def _audit(self, row: LogitsRow, decided: RowDecision) -> Chosen:
        """Compare the slices' decision with that of whole rows. The slices' token stands: an audit only measures."""
        sliced = row.end_audit()
        whole = decided.decisions.row(decided.index)
        distance, differs = compare(sliced, whole, row.window.active.session.request.sampling)
        self._meter.audited_rows.add()
        self._meter.audits_differing.add(differs)
        self.audited_variation += distance
        return self._chosen(row, sliced, 0)

    def _chosen(self, row: LogitsRow, decisions: Decisions, index: int) -> Chosen:
        self._meter.decided_tokens.add()
        if row.window.guided:
            uncovered = max(0.0, float(decisions.uncovered[index]))
            row.window.active.session.count_uncovered(uncovered)
            self._meter.uncovered_mass.add(uncovered)
            self._meter.guided_rows.add()
        token = decisions.tokens[index]
        return Chosen(int(token), bool(token != decisions.target_tokens[index]), decisions.scores[index])


def _too_few(row: LogitsRow, decisions: Decisions, index: int) -> bool:
    """True if the request wants log-probabilities of more candidates than the row has."""
    wanted = row.window.active.session.request.logprobs
    return wanted is not None and int(decisions.counts[index]) < wanted


def _sampling_specs(window: VerificationWindow) -> list[tuple[LogitsRow, RowSamplingSpec]]:
    """Sampling specs of a window's next rows, as far as they can be decided together."""
    session = window.active.session
    request, plain = session.request, session.history_free
    found: list[tuple[LogitsRow, RowSamplingSpec]] = []
    for ahead, row in enumerate(window.rows[window.next :]):
        alpha = window.active.alpha(ahead)
        if not row.complete or bool(alpha) != window.guided or (ahead and not plain):
            break
        adjustments = None if plain else session.adjustments()
        position = len(session.primary) + ahead
        flat = position, adjustments, request.top, request.explain
        spec = RowSamplingSpec(alpha, request.sampling, request.seed, *flat)
        found.append((row, spec))
    return found
