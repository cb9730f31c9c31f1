"""Recovery from replicas that refuse, fail, hang or are lost: send the rows' tokens again, wait, or end the session.

Recovery changes no token of a session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from actors.api.generation import Role
from actors.config import Deadlines
from actors.coordinator.admission import AdmissionQueue
from actors.coordinator.exchange import Exchange, Fault
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, VerificationWindow
from actors.coordinator.states import SessionState
from actors.coordinator.stats import CoordinatorMeter
from actors.wire.messages import Refusal

log = logging.getLogger(__name__)

MAX_FAULTS = 8  # faults in a row, without a token in between, that a session survives


class Sessions(Protocol):
    """The decode loop whose sessions recover."""

    def is_admitted(self, active: ActiveSession) -> bool: ...
    def fail(self, active: ActiveSession, error: str) -> None: ...
    def begin_anew(self, active: ActiveSession) -> None: ...
    def wake(self) -> None: ...


class FaultHandler:
    """Recovers the windows of one coordinator's sessions. Call from one event loop only.

    drop: closes the connection to a replica; its loss restarts the rows that it owes.
    """

    def __init__(
        self,
        sessions: Sessions,
        exchange: Exchange,
        admission: AdmissionQueue,
        deadlines: Deadlines,
        drop: Callable[[Replica, Exception], None],
        meter: CoordinatorMeter,
    ) -> None:
        self._sessions, self._exchange, self._admission = sessions, exchange, admission
        self._deadlines, self._drop, self._meter = deadlines, drop, meter

    def handle(self, fault: Fault) -> None:
        """Send a refused item again, at once or after a pause or once there is room, or end the session."""
        active, role = fault.active, fault.role
        window = active.window
        if window is None or not self._sessions.is_admitted(active):
            return
        self._meter.refused(role, fault.code.name.lower())
        held = {Refusal.KV_MISS: fault.detail, Refusal.ROW_GONE: window.first[role]}.get(fault.code, 0)
        if fault.code in (Refusal.SUPERSEDED, Refusal.BAD_ITEM):
            self._sessions.fail(active, f"the {role} model refused the request ({fault.code.name.lower()})")
            return
        if fault.code in (Refusal.FULL, Refusal.KV_MISS):
            active.count_miss()  # no room, or evicted: it waits for older sessions, which is no fault
            active.expect_rows(after_s=fault.detail * (fault.code == Refusal.FULL) / 1000)
        else:
            active.count_fault()
        if active.faults > MAX_FAULTS:
            self._sessions.fail(active, f"the {role} model failed {active.faults} times in a row")
        elif fault.code == Refusal.FULL or (fault.code == Refusal.KV_MISS and not held):
            delay = fault.pause()
            self._admission.park(active, role, delay, lambda: self._resend(window, role, held))
            asyncio.get_running_loop().call_later(delay, self._sessions.wake)
        elif delay := fault.pause():
            active.expect_rows(after_s=delay)
            asyncio.get_running_loop().call_later(delay, self._resend, window, role, held)
        else:
            self._resend(window, role, held)

    def check_rows(self, active_sessions: Iterable[ActiveSession]) -> None:
        """Give up replicas that have owed a row for `deadlines.step_s` seconds and finished no forward in that time.

        A window that waits for so long while nobody owes it anything, by a fault of this program, begins anew.
        """
        for active in active_sessions:
            window = active.window
            if window is None or time.monotonic() - active.rows_due_since <= self._deadlines.step_s:
                continue
            if window.owing():
                self._drop_silent(active)
            elif active.state != SessionState.PARKED and not window.ready():
                name = active.session.request.name_in_logs
                log.error("%s: a window waited for an answer that no model owed; it begins anew", name)
                active.count_fault()
                if active.faults > MAX_FAULTS:
                    self._sessions.fail(active, "internal error while decoding")
                else:
                    self._sessions.begin_anew(active)

    def _resend(self, window: VerificationWindow, role: Role, held: int) -> None:
        """Request a role's rows again, unless the window has ended. held: tokens that the replica still holds."""
        active = window.active
        if active.window is not window or role not in active.replicas:
            return
        active.expect_rows()
        self._meter.resent(role, active.session.streams[role].held - held)
        if role == window.drafting_role and not window.rows:  # drafting takes many forwards: request one row instead
            active.session.streams[role].lose(held)
            self._exchange.drop(active)
            self._exchange.begin(active, window.guided)
        else:
            self._exchange.extend_again(active, role, held)
        self._sessions.wake()

    def _drop_silent(self, active: ActiveSession) -> None:
        limit, now = self._deadlines.step_s, time.monotonic()
        assert active.window is not None
        late = [active.replicas[role] for role in active.window.owing()]
        silent = [replica for replica in late if now - replica.progress_at > limit]
        if silent:
            active.count_fault()
        if active.faults > MAX_FAULTS:
            self._sessions.fail(active, "the models did not answer in time")
            return
        for replica in silent:
            self._drop(replica, TimeoutError(f"no answer in {limit:g} s"))
