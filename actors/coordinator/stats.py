"""What a coordinator tells of itself: how busy it is, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass

from actors.coordinator.verification import Counts
from actors.metrics import Recorder


@dataclass(frozen=True, slots=True)
class CoordinatorLoad:
    """What a coordinator has on its hands, and what it has decided since its start."""

    sessions: int
    waiting: int
    counts: Counts
    drafted: int = 0  # drafts that were checked
    accepted: int = 0
    turns_s: float = 0.0  # that its turns took
    parked: int = 0  # of its sessions, those that wait for room in a cache


class CoordinatorMeter:
    """What a coordinator measures."""

    def __init__(self) -> None:
        self._recorder = recorder = Recorder()
        self._turns = recorder.counter("thinklogit_steps", "coordinator", "turn")
        self._turns_s = recorder.counter("thinklogit_step_seconds", "coordinator", "turn")

    @property
    def turns_s(self) -> float:
        """Seconds that turns took so far."""
        return self._turns_s.value

    def turn(self, took: float) -> None:
        """A turn is over."""
        self._turns.add()
        self._turns_s.add(took)

    def refused(self, role: str, reason: str) -> None:
        """A model refused an item."""
        self._recorder.counter("thinklogit_refusals", role, reason).add()

    def resent(self, role: str, tokens: int) -> None:
        """So many tokens, which a model's cache held once, must be sent again; none is ignored."""
        if tokens > 0:
            self._recorder.counter("thinklogit_reprefills", role).add()
            self._recorder.counter("thinklogit_resent_tokens", role).add(tokens)

    def report(self, load: CoordinatorLoad) -> Recorder:
        """All that was measured, as of now."""
        counts, recorder = load.counts, self._recorder
        sessions = {"running": load.sessions - load.parked, "parked": load.parked, "waiting": load.waiting}
        for state, number in sessions.items():
            recorder.gauge("thinklogit_sessions", state).value = number
        totals = {
            "thinklogit_decided_tokens": counts.tokens,
            "thinklogit_guided_rows": counts.guided_rows,
            "thinklogit_uncovered_mass": counts.uncovered_mass,
            "thinklogit_widened_rows": counts.widened_rows,
            "thinklogit_audited_rows": counts.audited_rows,
            "thinklogit_audits_differing": counts.audits_differing,
            "thinklogit_drafted_tokens": load.drafted,
            "thinklogit_accepted_tokens": load.accepted,
        }
        for name, total in totals.items():
            recorder.counter(name).value = total
        return recorder
