"""Joins the top-k slices of rows into their candidates, and looks up the logits that a role's slice lacks.

Once target and guider have answered, each role is sent one lookup of the candidates that it did not propose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.frames import RowFrame, row_numbers
from actors.coordinator.inflight import InflightCalls, Lookups, Sink
from actors.coordinator.session import LogitsRow, VerificationWindow
from actors.decoding.candidates import PADDING, Floats, Ids, MissingLogits
from actors.decoding.cross_vocab.logprobs import CrossingRows, RoleRowInput, TokenEventLogprobs, proposed_tokens
from actors.decoding.kernels import ask
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.messages import LOOKUP_ITEM, WHOLE

GUIDED: tuple[Role, ...] = ("target", "guider", "guider_base")  # the base proposes no candidates
SMALL: tuple[Role, ...] = GUIDED[1:]
Frame = RowFrame[LogitsRow]


class CandidateCompleter:
    """Joins candidates, and looks up missing logits. k: width of slices before any widening."""

    def __init__(self, k: int, vocabularies: VocabularyRegistry, calls: InflightCalls) -> None:
        self._k, self._vocabularies, self._calls = k, vocabularies, calls

    def advance(self, frame: Frame) -> Ids:
        """Request what the rows of a frame still lack. Returns the rows that have become complete."""
        shape = frame.shape
        if shape.aligned and shape.k != WHOLE:
            self._propose(frame)
        found, complete = frame.scan()
        if len(found):
            frame.merge(found)
            if shape.aligned:
                self._look_up_events(frame, found)
            elif (shape.guided or shape.all_legal) and shape.k != WHOLE:
                for role in shape.required:
                    self._look_up_plain(frame, role, found)
            complete = np.concatenate([complete, frame.scan()[1]])
        if shape.aligned:
            self._store_events(frame, complete)
        return complete

    def look_up_crossing_rows(self, windows: Iterable[VerificationWindow]) -> None:
        """Look up boundary-crossing tokens in earlier rows of the small models."""
        frames: dict[Frame, list[LogitsRow]] = {}
        for window in windows:
            for row in window.rows[window.next :]:
                if row.crossing:
                    frames.setdefault(row.frame, []).append(row)
        for frame, waiting in frames.items():
            for role in SMALL:
                pending = [(row, each) for row in waiting if (each := row.crossing.get(role)) is not None and each.rows]
                if not pending:
                    continue
                rows = [row for row, each in pending for _ in range(each.rows)]
                positions = [each.boundaries.first - 1 + number for _, each in pending for number in range(each.rows)]
                counts = np.concatenate([np.bincount(each.at, minlength=each.rows) for _, each in pending])
                ids = np.concatenate([each.ids for _, each in pending])
                values = CrossingRows.share_values([each for _, each in pending])
                keys = [row.window.key(role, position) for row, position in zip(rows, positions, strict=True)]
                asked = MissingLogits(row_numbers([row.at for row in rows]), counts, np.arange(len(ids)), ids)
                self._look_up(frame, role, asked, partial(_fill_crossing, values), keys)

    def _propose(self, frame: Frame) -> None:
        """Store the proposals of a guider with another vocabulary whose slice and crossing rows have arrived."""
        ready: dict[int, list[LogitsRow]] = {}
        for row in frame.owners:
            if row is not None and "guider" in row.slices and not frame.has("guider", row.at):
                if (crossing := row.crossing.get("guider")) is None or crossing.complete:
                    ready.setdefault(len(row.slices["guider"].ids), []).append(row)
        for members in ready.values():
            inputs = [RoleRowInput(row.slices["guider"], row.crossing.get("guider")) for row in members]
            ids = proposed_tokens(self._vocabularies.alignment("guider").tables, inputs, self._k)
            at, none = row_numbers([row.at for row in members]), np.zeros(len(members))
            frame.block.store("guider", at, ids, np.full(ids.shape, np.nan), np.zeros((len(at), 0)), none, none)
            frame.receive("guider", at)

    def _look_up_plain(self, frame: Frame, role: Role, found: Ids) -> None:
        theirs = self._vocabularies.plain_map(frame.shape.primary, role).to_role
        self._look_up(frame, role, frame.block.missing_logits(role, found, theirs), partial(frame.block.fill, role))

    def _look_up_events(self, frame: Frame, found: Ids) -> None:
        """Find the events of candidates in small models with another vocabulary, and look up their logits."""
        if frame.shape.k != WHOLE:
            self._look_up_plain(frame, "target", found)
        owners, ids = frame.owners_of(found), frame.block.ids[found]
        for role in SMALL:
            inputs = [RoleRowInput(row.slices.get(role), row.crossing.get(role)) for row in owners]
            events = TokenEventLogprobs(self._vocabularies.alignment(role).tables, ids, ids < PADDING, inputs)
            for number, row in enumerate(owners):
                row.events[role] = events, number
            rows, places, tokens = events.missing_logits()
            if frame.shape.k == WHOLE or not len(tokens):
                continue
            order = np.argsort((rows << 32) + tokens, kind="stable")  # by id within each row
            numbers, counts = np.unique(rows, return_counts=True)
            members = row_numbers([owners[number].at for number in numbers.tolist()])
            asked = MissingLogits(members, counts, places[order], tokens[order])
            self._look_up(frame, role, asked, partial(_fill_events, events))

    @staticmethod
    def _store_events(frame: Frame, complete: Ids) -> None:
        """Store the small models' log-probabilities of complete rows; the logsumexp of such a row is 0."""
        owners = frame.owners_of(complete)
        for role, number in frame.block.roles.items():
            of_role = [(row.at, *row.events[role]) for row in owners if role in row.events]
            masses = {events: events.masses() for events in dict.fromkeys(events for _, events, _ in of_role)}
            for at, events, place in of_role:
                frame.block.logits[number, at] = masses[events][place]

    def _look_up(
        self,
        frame: Frame,
        role: Role,
        missing: MissingLogits,
        sink: Sink,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Send one lookup for each row of `missing`. keys: of earlier rows that are read instead."""
        number = frame.block.roles[role]
        replicas = frame.keys.replicas[number][missing.rows]
        for replica in dict.fromkeys(replicas.tolist()):
            rows, counts, places, ids = missing
            here = replicas == replica
            if not here.all():
                taken = np.repeat(here, counts)
                rows, counts, places, ids = rows[here], counts[here], places[taken], ids[taken]
            first = self._calls.ask(Lookups(role, frame, rows, counts, places, sink))
            items, of_frame = np.empty(len(rows), LOOKUP_ITEM), frame.keys
            ask(items, first, of_frame.sessions, of_frame.prefixes[number], of_frame.positions[number], rows, counts)
            if keys is not None:
                items["position"], items["row"] = np.array(keys, np.uint64)[here].T
            frame.ask(role, rows)
            owner = frame.owners[int(rows[0])]
            assert owner is not None
            outbox = owner.window.active.replicas[role].outbox
            outbox.lookups.append(items)
            outbox.ids.append(ids)


def _fill_crossing(values: Floats, rows: Ids, counts: Ids, places: Ids, news: NDArray[Any]) -> None:
    values[places] = news


def _fill_events(events: TokenEventLogprobs, rows: Ids, counts: Ids, places: Ids, news: NDArray[Any]) -> None:
    events.fill(places, news)
