"""A session on its way through a coordinator: where its caches are, the rows in flight, and who reads its events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from actors.api.generation import Role
from actors.coordinator.output import Events
from actors.coordinator.row_history import Trail
from actors.decoding.session import Session
from actors.decoding.speculation import Acceptance, TextIndex

if TYPE_CHECKING:
    from actors.coordinator.prompt_scoring import PromptReading
    from actors.coordinator.replica_pool import Replica
    from actors.coordinator.window import Window
    from actors.decoding.vocabulary import Known


class Live:
    """One session, the replicas that it is bound to, and the window of rows in flight."""

    def __init__(self, session: Session, key: int, age: int, acceptance: Mapping[str, Acceptance]) -> None:
        self.session, self.key, self.age, self.acceptance = session, key, age, acceptance
        self.events = Events()
        self.text = TextIndex()
        self.epoch = 1
        self.replicas: dict[Role, Replica] = {}
        self.window: Window | None = None
        self.known: dict[bool, Mapping[Role, Known]] = {}  # what rows must know, guided or not, where no history adds
        self.trails: dict[Role, Trail] = {}  # of small roles of another family
        self.tickets: dict[Role, set[int]] = {}  # of what was asked for the window
        self.row_since = 0.0
        self.faults = 0  # refusals since the last token
        self.misses = 0  # how often there was no room for the rows in flight, or their cache was gone
        self.stranded_since: float | None = None  # when it began to wait for a role that nobody plays
        self.reading: PromptReading | None = None  # while log-probabilities of the prompt are wanted
        self.lacks: set[Role] = set()  # roles whose caches it lost, or found no room in, and waits for
        self.past_context = False  # a small model's positions are used up: the target goes on alone

    @property
    def primary(self) -> Role:
        """The role whose vocabulary the answer is in."""
        return self.session.request.primary

    @property
    def client(self) -> str:
        """Who asked, for fairness."""
        return self.session.request.client

    @property
    def resumed(self) -> bool:
        """Whether another coordinator began it: its client has part of the answer already."""
        return self.session.request.resumed

    def bind(self, role: Role, replica: Replica) -> None:
        """From now on this replica plays the role; it holds nothing yet."""
        self.replicas[role] = replica
        self.session.streams[role].reseed(replica.welcome.hash_seed)
        self.trails.pop(role, None)

    def limit(self, role: Role) -> int:
        """Positions that a role's model computes for one session."""
        return self.replicas[role].welcome.max_position

    def room(self, role: Role) -> int:
        """Tokens that a role can read after the session's newest."""
        return self.limit(role) - len(self.session.streams[role])

    def alpha(self, ahead: int = 0) -> float:
        """Alpha for the next token, or `ahead` tokens later as far as it can be told now."""
        return 0.0 if self.past_context else self.session.alpha(ahead)

    @property
    def over(self) -> bool:
        """Whether the answer is finished."""
        return self.session.finish_reason is not None
