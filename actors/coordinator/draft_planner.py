"""Plans the number of draft tokens in each verification window, from acceptance rates and measured times.

The times are those of forwards, and that which the coordinator itself takes for windows and rows. Where many sessions
keep it busy, the rows of rejected drafts may cost more than the forwards that accepted ones save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from actors.config import Speculation
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, Source, VerificationWindow
from actors.coordinator.stats import CoordinatorMeter
from actors.decoding.speculation import Acceptance, best_length

Kind = Literal["guider", "text", "guided", "hidden"]  # of drafts; "guided": from a guider that also guides
SOURCES: tuple[Source, ...] = ("guider", "text", "grammar")
# Acceptance rate before any draft was verified.
_FIRST_GUESS: dict[Source, float] = {"guider": 0.7, "text": 0.3, "grammar": 0.9}
_SMOOTHING = 0.02  # weight of one window in the rate that new sessions begin with
_ROWS = 16  # at least so many are in a sample of the coordinator's own time
_OWN_MEMORY = 0.97  # weight of its earlier samples when one more is observed
_RIDGE = 1e-3  # of its least squares, for where turns and rows always come in the same proportion
_FEW = 8  # a model that must read more tokens than this prefills: nothing is drafted behind a prefill


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The drafts of the next window: a number to request from the guider, or tokens (in the primary's ids) of a source.

    to_hide: number that the guider drafts behind them while they are verified.
    """

    guider_drafts: int = 0
    text_drafts: tuple[int, ...] = ()
    source: Source = "text"
    to_hide: int = 0


NO_DRAFTS = DraftPlan()


class OwnTime:
    """Estimates the time that the coordinator itself takes for a window: a part of its turns, and time for each row.

    The seconds of a turn and of a row are found by least squares. Few sessions need several turns for each window, so
    that further rows cost little beside them; many sessions share a turn.
    """

    def __init__(self) -> None:
        self._tt = self._tr = self._rr = self._ts = self._rs = 0.0  # sums of products: turns, rows, seconds
        self._turns = self._windows = 0.0
        self._turn_s = self._row_s = 0.0

    def observe(self, turns: int, windows: int, rows: int, seconds: float) -> None:
        """Record turns that took so many seconds together, in which so many windows ended, with so many rows."""
        before = self._turns, self._windows, self._tt, self._tr, self._rr, self._ts, self._rs
        news = turns, windows, turns * turns, turns * rows, rows * rows, turns * seconds, rows * seconds
        sums = [_OWN_MEMORY * old + new for old, new in zip(before, news, strict=True)]
        self._turns, self._windows, self._tt, self._tr, self._rr, self._ts, self._rs = sums
        tt, tr, rr, ts, rs = sums[2:]
        ridge = _RIDGE * (tt + rr)
        determinant = (tt + ridge) * (rr + ridge) - tr * tr
        turn_s, row_s = ((rr + ridge) * ts - tr * rs) / determinant, ((tt + ridge) * rs - tr * ts) / determinant
        if turn_s < 0 or row_s < 0:
            turn_s, row_s = (0.0, rs / rr) if turn_s < 0 else (ts / tt, 0.0)
        self._turn_s, self._row_s = turn_s, row_s

    def seconds(self, rows: int) -> float:
        """Expected seconds for one window of so many rows; 0 until something was observed."""
        return self._turn_s * self._turns / self._windows + rows * self._row_s if self._windows else 0.0


class DraftPlanner:
    """Plans the drafts of one coordinator's sessions, and learns from how many are accepted and from its turns."""

    def __init__(self, config: Speculation, meter: CoordinatorMeter | None = None) -> None:
        self._config, self._meter = config, meter or CoordinatorMeter()
        self._expected = dict(_FIRST_GUESS)
        self._own_time = OwnTime()
        # Since its last sample: turns, windows that ended, their rows, and the seconds of the turns.
        self._turns, self._windows, self._rows, self._turns_s = 0, 0, 0, 0.0
        self._known_costs: dict[tuple[Replica, Replica | None, Kind, int], list[float]] = {}  # since its last sample

    def acceptance(self) -> dict[str, Acceptance]:
        """Acceptance estimates of a new session, by source of drafts."""
        return {source: Acceptance(self._expected[source]) for source in SOURCES}

    def drafter(self, active: ActiveSession, guided: bool) -> Source:
        """Source of a session's next drafts."""
        always = active.session.request.drafter == "guider" and "guider" in active.session.streams
        return "guider" if guided or always else "text"

    def plan(self, active: ActiveSession, guided: bool, room: int, batch: int) -> DraftPlan:
        """The drafts of the session's next window.

        room: tokens that may follow before a model's positions end. batch: sessions that are decoded together.
        """
        most = self._most(active, room)
        if most < 1:
            return NO_DRAFTS
        source = self.drafter(active, guided)
        if self._behind(active, source):
            return NO_DRAFTS
        if (grammar := active.session.grammar) is not None and (forced := grammar.drafts(most)):
            if length := self._length(active, "grammar", "text", len(forced), batch):
                return DraftPlan(text_drafts=tuple(forced[:length]), source="grammar")
        if source == "guider":
            length = self._length(active, source, "guided" if guided else "guider", most, batch)
            after = self._most(active, room, length + 1) if guided and length else 0
            return DraftPlan(length, to_hide=self._to_hide(active, after, batch))
        if not self._config.lookup:
            return NO_DRAFTS
        found = active.text.drafts(active.session.primary.tokens, most)
        if not found:
            return NO_DRAFTS
        length = self._length(active, source, "text", len(found), batch)
        return DraftPlan(text_drafts=tuple(found[:length]))

    def took(self, seconds: float) -> None:
        """Count a turn of the coordinator's loop."""
        self._turns += 1
        self._turns_s += seconds
        if self._rows >= _ROWS:
            self._own_time.observe(self._turns, self._windows, self._rows, self._turns_s)
            self._turns, self._windows, self._rows, self._turns_s = 0, 0, 0, 0.0
            self._known_costs.clear()

    def learn(self, window: VerificationWindow) -> None:
        """Learn from a window that ended: its rows, and if it has drafts the acceptance rates, also of new sessions."""
        drafts, active, kept = window.drafts, window.active, window.next - 1
        self._windows += 1
        self._rows += drafts + 1
        if not drafts:
            return
        active.session.count_drafts(drafts, kept)
        if window.hidden:
            self._meter.hidden_drafts.add(drafts)
        self._meter.drafted_tokens.add(drafts)
        self._meter.accepted_tokens.add(kept)
        acceptance = active.acceptance[window.source]
        acceptance.record(kept if active.over else drafts, kept)
        self._expected[window.source] += _SMOOTHING * (acceptance.rate - self._expected[window.source])

    def _most(self, active: ActiveSession, room: int, ahead: int = 0) -> int:
        """Drafts that a window may have at most, once so many more tokens are chosen."""
        session, configured = active.session, self._config.drafts
        wanted = session.request.drafts
        most = configured if wanted is None else min(wanted, configured)
        limit = session.request.sampling.max_tokens
        left = room if limit is None else min(room, limit - session.generated - 1)
        return 0 if session.lifts_own_output else min(most, left - ahead)

    @staticmethod
    def _behind(active: ActiveSession, source: Source) -> bool:
        """True if a model must first read many tokens."""
        roles = {active.primary, *(("guider",) if source == "guider" else ())}
        return any(len(active.session.streams[role]) - active.session.streams[role].held > _FEW for role in roles)

    def _to_hide(self, active: ActiveSession, most: int, batch: int) -> int:
        """Drafts that the guider makes, at most so many, while others are verified; none where it shares its device."""
        if most < 1:
            return 0
        devices = {role: replica.devices for role, replica in active.replicas.items()}
        guider = devices.pop("guider")
        if not guider or any(not each or each & guider for each in devices.values()):
            return 0
        if not self._config.adapt:
            return most
        return best_length(active.acceptance["guider"].rate, self._costs(active, "hidden", batch)[: most + 1])

    def _length(self, active: ActiveSession, source: Source, kind: Kind, most: int, batch: int) -> int:
        if not self._config.adapt:
            return most
        acceptance = active.acceptance[source]
        length = best_length(acceptance.rate, self._costs(active, kind, batch)[: most + 1])
        return length or int(not acceptance.rest())

    def _costs(self, active: ActiveSession, kind: Kind, batch: int) -> Sequence[float]:
        """Seconds to draft and verify each number of drafts, for so many sessions together."""
        primary, guider = active.replicas[active.primary], active.replicas.get("guider")
        key = primary, guider, kind, batch
        if key not in self._known_costs:
            lengths = range(self._config.drafts + 1)
            verifying = [primary.forward_time.seconds(batch * (drafts + 1)) for drafts in lengths]
            drafting = guider.forward_time.seconds(batch) if guider is not None else 0.0
            if kind == "hidden":
                # One more than the drafts: the guider reads the token before them meanwhile.
                forwards = [max(verifying[drafts], (drafts + 1) * drafting) for drafts in lengths]
            elif kind == "text":
                forwards = verifying
            else:
                at_least = drafting if kind == "guided" else 0.0
                forwards = [max(verifying[drafts], at_least) + drafts * drafting for drafts in lengths]
            own = [batch * self._own_time.seconds(drafts + 1) for drafts in lengths]
            self._known_costs[key] = [sum(both) for both in zip(forwards, own, strict=True)]
        return self._known_costs[key]
