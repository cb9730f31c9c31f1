"""Plans the number of draft tokens in each verification window, from acceptance rates and the time of forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actors.api.generation import Role
from actors.config import Speculation
from actors.coordinator.session import ActiveSession, VerificationWindow
from actors.coordinator.stats import CoordinatorMeter
from actors.decoding.speculation import Acceptance, best_length

Source = Literal["guider", "text"]
SOURCES: tuple[Source, ...] = ("guider", "text")
_FIRST_GUESS: dict[Source, float] = {"guider": 0.7, "text": 0.3}  # acceptance rate before any draft was verified
_SMOOTHING = 0.02  # weight of one window in the rate that new sessions begin with
_FEW = 8  # a model that must read more tokens than this prefills: nothing is drafted behind a prefill


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The drafts of the next window: a number to request from the guider, or tokens (in the primary's ids).

    to_hide: number that the guider drafts behind them while they are verified.
    """

    guider_drafts: int = 0
    text_drafts: tuple[int, ...] = ()
    to_hide: int = 0


NO_DRAFTS = DraftPlan()


class DraftPlanner:
    """Plans the drafts of one coordinator's sessions, and learns from how many are accepted."""

    def __init__(self, config: Speculation, meter: CoordinatorMeter | None = None) -> None:
        self._config, self._meter = config, meter or CoordinatorMeter()
        self._expected = dict(_FIRST_GUESS)

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
        if source == "guider":
            length = self._length(active, source, guided, most, batch)
            after = self._most(active, room, length + 1) if guided and length else 0
            return DraftPlan(length, to_hide=self._to_hide(active, after, batch))
        if not self._config.lookup:
            return NO_DRAFTS
        found = active.text.drafts(active.session.primary.tokens, most)
        if not found:
            return NO_DRAFTS
        length = self._length(active, source, guided, len(found), batch)
        return DraftPlan(text_drafts=tuple(found[:length]))

    def learn(self, window: VerificationWindow) -> None:
        """Update the acceptance rates, of the session and of new ones, from a window with drafts that ended."""
        drafts, active, kept = window.drafts, window.active, window.next - 1
        active.session.count_drafts(drafts, kept)
        if window.hidden:
            self._meter.hidden_drafts.add(drafts)
        self._meter.drafted_tokens.add(drafts)
        self._meter.accepted_tokens.add(kept)
        source: Source = "guider" if window.drafting_role == "guider" else "text"
        active.acceptance[source].record(kept if active.over else drafts, kept)
        self._expected[source] += _SMOOTHING * (active.acceptance[source].rate - self._expected[source])

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

        def seconds(drafts: int) -> float:
            verifying = active.replicas[active.primary].forward_time.seconds(batch * (drafts + 1))
            # One more than the drafts: the guider reads the token before them meanwhile.
            return max(verifying, (drafts + 1) * active.replicas["guider"].forward_time.seconds(batch))

        return best_length(active.acceptance["guider"].rate, most, seconds)

    def _length(self, active: ActiveSession, source: Source, guided: bool, most: int, batch: int) -> int:
        if not self._config.adapt:
            return most
        acceptance = active.acceptance[source]

        def forward_s(role: Role, tokens: int) -> float:
            return active.replicas[role].forward_time.seconds(tokens)

        def seconds(drafts: int) -> float:
            verifying = forward_s(active.primary, batch * (drafts + 1))
            if source == "text":
                return verifying
            drafting = forward_s("guider", batch)
            return max(verifying, drafting if guided else 0.0) + drafts * drafting

        length = best_length(acceptance.rate, most, seconds)
        return length or int(not acceptance.rest())
