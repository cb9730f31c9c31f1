"""The load and the metrics of a coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from actors.metrics import Recorder


@dataclass(frozen=True, slots=True)
class CoordinatorLoad:
    """Load of a coordinator, and totals since its start."""

    sessions: int
    waiting: int  # requests in the admission queue that have not started
    parked: int  # of the sessions, those that wait for room in a KV cache
    tokens: int  # decided since the start
    turns_s: float  # seconds that turns took since the start


class CoordinatorMeter:
    """The metrics of one coordinator. Each counter is kept here once, and the component that counts adds to it."""

    def __init__(self) -> None:
        self._recorder = recorder = Recorder()
        self._turns = recorder.counter("thinklogit_steps", "coordinator", "turn")
        self._turns_s = recorder.counter("thinklogit_step_seconds", "coordinator", "turn")
        self.decided_tokens = recorder.counter("thinklogit_decided_tokens")
        self.guided_rows = recorder.counter("thinklogit_guided_rows")
        self.uncovered_mass = recorder.counter("thinklogit_uncovered_mass")
        self.widened_rows = recorder.counter("thinklogit_widened_rows")
        self.audited_rows = recorder.counter("thinklogit_audited_rows")
        self.audits_differing = recorder.counter("thinklogit_audits_differing")
        self.drafted_tokens = recorder.counter("thinklogit_drafted_tokens")
        self.accepted_tokens = recorder.counter("thinklogit_accepted_tokens")
        self.hidden_drafts = recorder.counter("thinklogit_hidden_drafts")

    def load(self, sessions: int, waiting: int, parked: int) -> CoordinatorLoad:
        """The load, with the totals of these metrics."""
        return CoordinatorLoad(sessions, waiting, parked, int(self.decided_tokens.value), self._turns_s.value)

    def turn(self, seconds: float) -> None:
        """Count a turn of the loop that took so many seconds."""
        self._turns.add()
        self._turns_s.add(seconds)

    def refused(self, role: str, reason: str) -> None:
        """Count an item that a model refused."""
        self._recorder.counter("thinklogit_refusals", role, reason).add()

    def resent(self, role: str, tokens: int) -> None:
        """Count tokens that a model's cache has lost and that are sent again. Zero or less is ignored."""
        if tokens > 0:
            self._recorder.counter("thinklogit_reprefills", role).add()
            self._recorder.counter("thinklogit_resent_tokens", role).add(tokens)

    def report(self, load: CoordinatorLoad) -> Recorder:
        """All metrics, with the gauges set from `load`."""
        sessions = {"running": load.sessions - load.parked, "parked": load.parked, "waiting": load.waiting}
        for state, number in sessions.items():
            self._recorder.gauge("thinklogit_sessions", state).value = number
        return self._recorder
