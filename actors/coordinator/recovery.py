"""What a coordinator does when a model refuses, fails, hangs or goes: ask again, wait, or give the session up.

A session's choices are the same in the end, whatever was lost on the way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from actors.api.generation import Role
from actors.config import Deadlines
from actors.coordinator.admission import AdmissionQueue
from actors.coordinator.exchange import Exchange
from actors.coordinator.inflight import Fault
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, VerificationWindow
from actors.coordinator.stats import CoordinatorMeter
from actors.wire.messages import Refusal

MAX_FAULTS = 8  # refusals without a token in between, after which a session is given up


class Sessions(Protocol):
    """The loop whose sessions are mended."""

    def decodes(self, active: ActiveSession) -> bool: ...
    def fail(self, active: ActiveSession, error: str) -> None: ...
    def wake(self) -> None: ...


class FaultHandler:
    """Repairs the windows of one coordinator's sessions. Call from one event loop only.

    drop: gives up the connection to a replica; losing it restarts the rows that it owes.
    """

    def __init__(
        self,
        sessions: Sessions,
        exchange: Exchange,
        waiting: AdmissionQueue,
        deadlines: Deadlines,
        drop: Callable[[Replica, Exception], None],
        meter: CoordinatorMeter,
    ) -> None:
        self._sessions, self._exchange, self._waiting = sessions, exchange, waiting
        self._deadlines, self._drop, self._meter = deadlines, drop, meter

    def handle(self, fault: Fault) -> None:
        """A model refused an item: re-send, wait, or give up."""
        active, role = fault.active, fault.role
        window = active.window
        if window is None or not self._sessions.decodes(active):
            return
        self._meter.refused(role, fault.code.name.lower())
        held = {Refusal.KV_MISS: fault.detail, Refusal.ROW_GONE: window.first[role]}.get(fault.code, 0)
        if fault.code in (Refusal.SUPERSEDED, Refusal.BAD_ITEM):
            self._sessions.fail(active, f"the {role} model refused the request ({fault.code.name.lower()})")
            return
        if fault.code in (Refusal.FULL, Refusal.KV_MISS):
            active.count_miss()  # no room now, or evicted: it waits for older sessions, and that is no fault
            active.expect_rows(after_s=fault.detail * (fault.code == Refusal.FULL) / 1000)
        else:
            active.count_fault()
        if active.faults > MAX_FAULTS:
            self._sessions.fail(active, f"the {role} model failed {active.faults} times in a row")
        elif fault.code == Refusal.FULL or (fault.code == Refusal.KV_MISS and not held):
            delay = fault.pause()
            self._waiting.park(active, role, delay, lambda: self._again(window, role, held))
            asyncio.get_running_loop().call_later(delay, self._sessions.wake)
        elif delay := fault.pause():
            asyncio.get_running_loop().call_later(delay, self._again, window, role, held)
        else:
            self._again(window, role, held)

    def overdue(self, active_sessions: Iterable[ActiveSession]) -> None:
        """Give up the models that owe a row for longer than `deadlines.step_s` and are silent."""
        for active in active_sessions:
            if any(active.call_ids.values()) and time.monotonic() - active.rows_due_since > self._deadlines.step_s:
                self._hang(active)

    def _again(self, window: VerificationWindow, role: Role, held: int) -> None:
        """Ask a role for its part of the window anew, unless the session has gone on in the meantime."""
        active = window.active
        if active.window is not window or role not in active.replicas:
            return
        active.expect_rows()
        self._meter.resent(role, active.session.streams[role].held - held)
        if role == window.drafter and not window.rows:  # a draft takes many forwards: one row is enough now
            active.session.streams[role].lose(held)
            self._exchange.drop(active)
            self._exchange.begin(active, window.guided)
        else:
            self._exchange.again(active, role, held)
        self._sessions.wake()

    def _hang(self, active: ActiveSession) -> None:
        limit, now = self._deadlines.step_s, time.monotonic()
        owing = [active.replicas[role] for role, owed in active.call_ids.items() if owed]
        silent = [replica for replica in owing if now - replica.heard_at > limit]
        if silent:
            active.count_fault()
        if active.faults > MAX_FAULTS:
            self._sessions.fail(active, "the models did not answer in time")
            return
        for replica in silent:
            self._drop(replica, TimeoutError(f"no answer in {limit:g} s"))
