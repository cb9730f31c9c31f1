"""Turns complete logits rows into tokens; requests a wider top-k or a full-row audit when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from actors.api.generation import Scores
from actors.config import Exchange as ExchangeConfig
from actors.coordinator.frames import RowFrame, row_numbers
from actors.coordinator.session import LogitsRow, VerificationWindow
from actors.coordinator.stats import CoordinatorMeter
from actors.decoding.decision import Decisions, compare, decide
from actors.decoding.grammar import GrammarMatcher
from actors.wire.messages import WHOLE

MAX_LEGAL = 256  # ids that a grammar allows, all of whose logits are looked up; above it rows are widened


class DecidedRows:
    """Decisions of rows of one frame, and what they mean for each row.

    undecided: the row cannot be decided from what is known, if that is not the whole row.
    """

    __slots__ = ("changed", "decisions", "tokens", "uncovered", "undecided")

    def __init__(self, decisions: Decisions, max_unseen_mass: float) -> None:
        outcomes = decisions.outcomes
        self.decisions = decisions
        self.tokens: list[int] = outcomes["token"].tolist()
        self.changed: list[bool] = (outcomes["token"] != outcomes["target_token"]).tolist()
        self.uncovered: list[float] = np.maximum(outcomes["uncovered"], 0.0).tolist()
        undecided = outcomes["no_legal_token"]
        if max_unseen_mass < 1:
            undecided = undecided | ((outcomes["outside"] > max_unseen_mass) & ~outcomes["settled"])
        self.undecided: list[bool] = undecided.tolist()


class RowDecision(NamedTuple):
    """Row `number` of decided rows; the alpha with which it was decided, and if a grammar restricted it."""

    rows: DecidedRows
    number: int
    alpha: float
    in_grammar: bool


class Chosen(NamedTuple):
    """The token of a row. changed: the target alone would have chosen another. scores: if the request wants them."""

    token: int
    changed: bool
    scores: Scores | None = None


class NeedsWiderTopK(NamedTuple):
    """The row cannot be decided before slices of this k have arrived (WHOLE: whole rows)."""

    k: int


class NeedsLegalLogits(NamedTuple):
    """The row cannot be decided before the logits of these ids have arrived, all that a grammar allows."""

    ids: Sequence[int]


class NoLegalToken(NamedTuple):
    """Not even the whole row has a token that may be chosen. error: a sentence for the client."""

    error: str = "the request's bans and biases leave no token to choose"


Verdict = Chosen | NeedsWiderTopK | NeedsLegalLogits | NoLegalToken


class Verifier:
    """Decides rows from slices, widens those with too much unseen mass, and audits one guided row in so many."""

    def __init__(self, config: ExchangeConfig, meter: CoordinatorMeter | None = None) -> None:
        self._config, self._meter = config, meter or CoordinatorMeter()
        self._since_audit = 0
        self.audited_variation = 0.0  # total variation, summed over audited rows

    def verify(self, windows: Sequence[VerificationWindow]) -> list[list[RowDecision]]:
        """Decide each window's next rows: all complete ones, or only the first if its token affects the later ones."""
        wanted = [list(_decidable(window)) for window in windows]
        groups: dict[RowFrame[LogitsRow], list[tuple[LogitsRow, float]]] = {}
        for rows in wanted:
            for row, alpha in rows:  # some may have left the frame of the others, because they were widened
                groups.setdefault(row.frame, []).append((row, alpha))
        found: dict[LogitsRow, RowDecision] = {}
        for frame, members in groups.items():
            at = row_numbers([row.at for row, _ in members])
            specs = frame.specs[at]
            specs["alpha"] = [alpha for _, alpha in members]
            sessions = [row.window.active.session for row, _ in members]
            adjustments = [
                None if each.history_free and each.grammar is None else each.adjustments(row.index - row.window.next)
                for each, (row, _) in zip(sessions, members, strict=True)
            ]
            listed = [each.listed for each in sessions]
            decisions = decide(
                frame.block, at, specs, adjustments if any(adjustments) else (), listed if any(listed) else ()
            )
            decided = DecidedRows(decisions, self._config.max_unseen_mass)
            for number, (row, alpha) in enumerate(members):
                found[row] = RowDecision(decided, number, alpha, sessions[number].grammar is not None)
        return [[found[row] for row, _ in rows] for rows in wanted]

    def verdict(self, row: LogitsRow, decided: RowDecision) -> Verdict:
        """Outcome of a decided row, once the rows before it have become tokens."""
        rows, index, alpha = decided.rows, decided.number, decided.alpha
        if row.audited is not None:
            return self._audit(row, decided)
        grammar = row.window.active.session.grammar
        if grammar is not None and grammar.error:
            return NoLegalToken(grammar.error)
        if row.k != WHOLE:
            if grammar is not None and rows.undecided[index]:
                return self._undecided_in_grammar(row, rows, index, grammar)
            if rows.undecided[index] or _too_few(row, rows.decisions, index):
                return self._wider(row)
            if alpha and self._audit_due():
                row.begin_audit(rows.decisions.row(index))
                return NeedsWiderTopK(WHOLE)
        elif rows.decisions.no_legal_token[index]:
            return NoLegalToken()
        return self._chosen(row, rows, index)

    def _undecided_in_grammar(self, row: LogitsRow, rows: DecidedRows, index: int, grammar: GrammarMatcher) -> Verdict:
        """The only token that a grammar allows, else the logits of all that it allows if they are few, else more."""
        if rows.decisions.no_legal_token[index] and rows.decisions.settled[index]:
            return NoLegalToken()
        only = row.window.active.session.only_token
        if only is not None:
            self._meter.decided_tokens.add()
            return Chosen(only, changed=False)
        few = grammar.few(MAX_LEGAL) if row.k == self._config.k and not row.legal_ids else []
        if not few:
            return self._wider(row)
        self._count_widened(row)
        return NeedsLegalLogits(few)

    def _count_widened(self, row: LogitsRow) -> None:
        if row.k == self._config.k and not row.legal_ids:
            row.window.active.session.count_widened()
            self._meter.widened_rows.add()

    def _wider(self, row: LogitsRow) -> NeedsWiderTopK:
        """Next width of the row: one wider slice, then the whole row. It depends on the row alone, like its token."""
        active = row.window.active
        self._count_widened(row)
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
        whole = decided.rows.decisions.row(decided.number)
        distance, differs = compare(sliced, whole, row.window.active.session.request.sampling)
        self._meter.audited_rows.add()
        self._meter.audits_differing.add(differs)
        self.audited_variation += distance
        return self._chosen(row, DecidedRows(sliced, 1.0), 0)

    def _chosen(self, row: LogitsRow, rows: DecidedRows, index: int) -> Chosen:
        self._meter.decided_tokens.add()
        if row.window.guided:
            uncovered = rows.uncovered[index]
            row.window.active.session.count_uncovered(uncovered)
            self._meter.uncovered_mass.add(uncovered)
            self._meter.guided_rows.add()
        return Chosen(rows.tokens[index], rows.changed[index], rows.decisions.scores[index])


def _too_few(row: LogitsRow, decisions: Decisions, index: int) -> bool:
    """True if the request wants log-probabilities of more candidates than the row has."""
    wanted = row.window.active.session.request.logprobs
    return wanted is not None and int(decisions.counts[index]) < wanted


def _decidable(window: VerificationWindow) -> Iterator[tuple[LogitsRow, float]]:
    """A window's next rows, as far as they can be decided together, each with its alpha."""
    active = window.active
    for ahead, row in enumerate(window.rows[window.next :]):
        alpha = active.alpha(ahead)
        if not row.complete or bool(alpha) != window.guided or (ahead and not active.session.decides(ahead)):
            return
        yield row, alpha
