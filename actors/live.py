"""A session on its way through a coordinator: where its caches are, the row in flight, and who reads its events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.decoding.candidates import Ids, Part
from actors.decoding.decision import Decisions, Row
from actors.decoding.session import Session
from actors.events import Events
from actors.requests import Role

if TYPE_CHECKING:
    from actors.links import Replica


class Live:
    """One session, the replicas that it is bound to, and the row in flight."""

    def __init__(self, session: Session, key: int, age: int) -> None:
        self.session, self.key, self.age = session, key, age
        self.events = Events()
        self.epoch = 1
        self.replicas: dict[Role, Replica] = {}
        self.parts: dict[Role, Part] = {}
        self.ids: Ids | None = None  # the row's candidates, once all that propose some have answered
        self.tickets: dict[Role, set[int]] = {}  # of what was asked for the row in flight
        self.alpha = 0.0
        self.k = 0  # width of the row's slices; WHOLE: whole rows
        self.audited: Decisions | None = None  # what the slices decided, while whole rows are fetched to check it
        self.row_since = 0.0
        self.faults = 0  # refusals of the row in flight
        self.misses = 0  # how often there was no room for it, or its cache was gone
        self.stranded_since: float | None = None  # when it began to wait for a role that nobody plays
        self.past_context = False  # a small model's positions are used up: the target goes on alone

    @property
    def primary(self) -> Role:
        """The role whose vocabulary the answer is in."""
        return self.session.request.primary

    @property
    def complete(self) -> bool:
        """Whether every part of the row in flight has come."""
        return self.ids is not None and all(part.complete for part in self.parts.values())

    @property
    def over(self) -> bool:
        """Whether the answer is finished."""
        return self.session.finish_reason is not None

    def row(self) -> Row:
        """The row in flight, for the decision."""
        request = self.session.request
        small = (self.parts["guider"], self.parts["guider_base"]) if self.alpha else (None, None)
        assert self.ids is not None
        return Row(
            ids=self.ids,
            target=self.parts[self.primary],
            guider=small[0],
            guider_base=small[1],
            alpha=self.alpha,
            sampling=request.sampling,
            seed=request.seed,
            position=len(self.session.primary),
            adjust=self.session.adjust,
        )
