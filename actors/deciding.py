"""What becomes of complete rows: a token, a wider look first, or a check of the slices against whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.config import Exchange as ExchangeConfig
from actors.decoding.decision import Decisions, Row, compare, decide
from actors.live import Live
from actors.wire.messages import WHOLE


@dataclass(slots=True)
class Counts:
    """What has been decided so far. Masses are sums over guided rows."""

    tokens: int = 0
    guided_rows: int = 0
    widened_rows: int = 0
    uncovered_mass: float = 0.0
    audited_rows: int = 0
    audits_differing: int = 0  # audited rows whose slices chose another token than the whole rows
    audited_variation: float = 0.0  # total variation, summed over audited rows


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's token, and whether the target alone had chosen another."""

    token: int
    changed: bool


@dataclass(frozen=True, slots=True)
class Wider:
    """The row must be looked at with this k first (WHOLE: the whole of it)."""

    k: int


@dataclass(frozen=True, slots=True)
class Stuck:
    """No token may be chosen, even from the whole row."""


Verdict = Chosen | Wider | Stuck


class Decider:
    """Decides rows by slices, widens those of which too much is unseen, and audits one guided row in so many."""

    def __init__(self, config: ExchangeConfig) -> None:
        self._config = config
        self._since_audit = 0
        self.counts = Counts()

    def decide(self, lives: Sequence[Live]) -> list[Verdict]:
        """The verdict on each complete row; all of them guided, or none."""
        rows, guided = [live.row() for live in lives], bool(lives[0].alpha)
        decisions = decide(rows, guided)
        return [self._verdict(live, row, decisions, i) for i, (live, row) in enumerate(zip(lives, rows, strict=True))]

    def _verdict(self, live: Live, row: Row, decisions: Decisions, index: int) -> Verdict:
        if live.audited is not None:
            return self._audit(live, row)
        if live.k != WHOLE:
            if decisions.stuck[index] or self._unseen(decisions, index):
                return self._wider(live)
            if live.alpha and self._audit_due():
                live.audited = decide([row], guided=True)
                return Wider(WHOLE)
        elif decisions.stuck[index]:
            return Stuck()
        return self._chosen(live, decisions, index)

    def _unseen(self, decisions: Decisions, index: int) -> bool:
        limit = self._config.widen_above
        return limit < 1 and bool(decisions.outside[index] > limit)

    def _wider(self, live: Live) -> Wider:
        """One wider slice, then the whole row. A rule of the row alone, so that nothing else changes its token."""
        if live.k == self._config.k:
            live.session.widened += 1
            self.counts.widened_rows += 1
        wider = self._config.k * self._config.widen_factor
        fits = live.k < wider < live.replicas[live.primary].welcome.width
        return Wider(wider if fits else WHOLE)

    def _audit_due(self) -> bool:
        self._since_audit += 1
        if not self._config.audit_every or self._since_audit < self._config.audit_every:
            return False
        self._since_audit = 0
        return True

    def _audit(self, live: Live, row: Row) -> Chosen:
        """The whole rows of an audited step are here. What the slices chose stands: an audit only measures."""
        sliced, live.audited = live.audited, None
        assert sliced is not None
        distance, differs = compare([row], sliced, decide([row], guided=True))
        self.counts.audited_rows += 1
        self.counts.audits_differing += bool(differs[0])
        self.counts.audited_variation += float(distance[0])
        return self._chosen(live, sliced, 0)

    def _chosen(self, live: Live, decisions: Decisions, index: int) -> Chosen:
        self.counts.tokens += 1
        if live.alpha:
            uncovered = max(0.0, float(decisions.uncovered[index]))
            live.session.uncovered += uncovered
            self.counts.uncovered_mass += uncovered
            self.counts.guided_rows += 1
        token = decisions.tokens[index]
        return Chosen(int(token), bool(token != decisions.alone[index]))
