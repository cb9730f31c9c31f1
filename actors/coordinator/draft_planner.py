"""How many drafts a session's next check gets, from its own acceptance and from what the models' forwards take."""

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
_FIRST_GUESS: dict[Source, float] = {"guider": 0.7, "text": 0.3}  # acceptance before anything is known
_SMOOTHING = 0.02  # weight of one more check in what new sessions expect
_FEW = 8  # more tokens than this to catch up with are a prefill, which nothing is drafted behind


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The next check: drafts to ask of the guider, or guesses (in the primary's ids) that are there already."""

    drafts: int = 0
    guesses: tuple[int, ...] = ()


class DraftPlanner:
    """Plans the drafts of one coordinator's sessions, and learns what becomes of them."""

    def __init__(self, config: Speculation, meter: CoordinatorMeter | None = None) -> None:
        self._config, self._meter = config, meter or CoordinatorMeter()
        self._expected = dict(_FIRST_GUESS)

    def acceptance(self) -> dict[str, Acceptance]:
        """What a new session begins with, by source."""
        return {source: Acceptance(self._expected[source]) for source in SOURCES}

    def drafter(self, active: ActiveSession, guided: bool) -> Source:
        """Who guesses for a session now."""
        always = active.session.request.drafter == "guider" and "guider" in active.session.streams
        return "guider" if guided or always else "text"

    def plan(self, active: ActiveSession, guided: bool, room: int, crowd: int) -> DraftPlan:
        """The drafts of the session's next check.

        room: tokens that may follow before some model's positions end. crowd: sessions that are decoded together.
        """
        source, most = self.drafter(active, guided), self._most(active, room)
        if most < 1 or self._behind(active, source):
            return DraftPlan()
        if source == "guider":
            return DraftPlan(drafts=self._length(active, source, guided, most, crowd))
        if not self._config.lookup:
            return DraftPlan()
        guesses = active.text.drafts(active.session.primary.tokens, most)
        if not guesses:
            return DraftPlan()
        length = self._length(active, source, guided, len(guesses), crowd)
        return DraftPlan(guesses=tuple(guesses[:length]))

    def learn(self, window: VerificationWindow) -> None:
        """A window is over: the session, and those to come, know more."""
        drafts = window.drafts
        if not drafts:
            return
        active, kept = window.active, window.next - 1
        active.session.count_drafts(drafts, kept)
        self._meter.drafted_tokens.add(drafts)
        self._meter.accepted_tokens.add(kept)
        source: Source = "guider" if window.drafter == "guider" else "text"
        active.acceptance[source].record(kept if active.over else drafts, kept)
        self._expected[source] += _SMOOTHING * (active.acceptance[source].rate - self._expected[source])

    def _most(self, active: ActiveSession, room: int) -> int:
        session, configured = active.session, self._config.drafts
        wanted = session.request.drafts
        most = configured if wanted is None else min(wanted, configured)
        limit = session.request.sampling.max_tokens
        left = room if limit is None else min(room, limit - session.generated - 1)
        return 0 if session.lifts_own_output else min(most, left)

    @staticmethod
    def _behind(active: ActiveSession, source: Source) -> bool:
        """Whether a model has a prompt to catch up with first."""
        roles = {active.primary, *(("guider",) if source == "guider" else ())}
        return any(len(active.session.streams[role]) - active.session.streams[role].held > _FEW for role in roles)

    def _length(self, active: ActiveSession, source: Source, guided: bool, most: int, crowd: int) -> int:
        if not self._config.adapt:
            return most
        acceptance = active.acceptance[source]

        def takes(role: Role, tokens: int) -> float:
            return active.replicas[role].forward_time.seconds(tokens)

        def seconds(drafts: int) -> float:
            check = takes(active.primary, crowd * (drafts + 1))
            if source == "text":
                return check
            drafting = takes("guider", crowd)
            return max(check, drafting if guided else 0.0) + drafts * drafting

        length = best_length(acceptance.rate, most, seconds)
        return length or int(not acceptance.rest())
