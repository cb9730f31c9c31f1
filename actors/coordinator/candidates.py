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
from actors.decoding.candidates import PADDING, Floats, Ids
from actors.decoding.cross_vocab.logprobs import CrossingRows, RoleRowInput, TokenEventLogprobs, proposed_tokens
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
        if len(found := frame.proposed()):
            frame.merge(found)
            if shape.aligned:
                self._look_up_events(frame, found)
            elif shape.guided and shape.k != WHOLE:
                for role in GUIDED:
                    self._look_up_plain(frame, role, found)
        complete = frame.complete()
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
                offsets = np.cumsum([0] + [each.rows for _, each in pending]).tolist()
                at = np.concatenate([each.at + offset for (_, each), offset in zip(pending, offsets, strict=False)])
                rows = [row for row, each in pending for _ in range(each.rows)]
                positions = [each.boundaries.first - 1 + number for _, each in pending for number in range(each.rows)]
                values = CrossingRows.share_values([each for _, each in pending])
                places, ids = np.arange(len(at)), np.concatenate([each.ids for _, each in pending])
                keys = [row.window.key(role, position) for row, position in zip(rows, positions, strict=True)]
                asked = row_numbers([row.at for row in rows])
                self._look_up(frame, role, asked, at, places, ids, partial(_fill_crossing, values), keys)

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
        rows, places, ids = frame.block.missing_logits(role, found, theirs)
        if not len(ids):
            return
        begins = np.flatnonzero(np.diff(rows, prepend=-1))
        at = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(rows)))
        self._look_up(frame, role, rows[begins], at, places, ids, partial(frame.block.fill, role))

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
            places, tokens = places[order], tokens[order]
            asked, at = np.unique(rows, return_inverse=True)
            members = row_numbers([owners[number].at for number in asked.tolist()])
            self._look_up(frame, role, members, at, places, tokens, partial(_fill_events, events))

    @staticmethod
    def _store_events(frame: Frame, complete: Ids) -> None:
        """Store the small models' log-probabilities of complete rows; the logsumexp of such a row is 0."""
        for row in frame.owners_of(complete):
            for role, (events, number) in row.events.items():
                frame.block.logits[frame.block.roles[role], row.at] = events.masses()[number]

    def _look_up(
        self,
        frame: Frame,
        role: Role,
        asked: Ids,
        at: Ids,
        places: Ids,
        ids: Ids,
        sink: Sink,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Send one lookup for each row of `asked` [m].

        at [n]: by id the index of its lookup, ascending. places, ids [n]. keys: of earlier rows that are read instead.
        """
        number = frame.block.roles[role]
        replicas = frame.keys.replicas[number][asked]
        for replica in dict.fromkeys(replicas.tolist()):
            part, numbers, its_places, its_ids = slice(None), at, places, ids
            if (replicas != replica).any():
                part = np.flatnonzero(replicas == replica)
                taken = np.isin(at, part)
                numbers, its_places, its_ids = np.searchsorted(part, at[taken]), places[taken], ids[taken]
            rows = asked[part]
            counts = np.bincount(numbers, minlength=len(rows))
            calls = Lookups(role, frame, rows, rows[numbers], its_places, np.cumsum(counts), sink)
            first, sessions = self._calls.ask(calls), frame.keys.sessions[rows]
            items = np.empty(len(rows), LOOKUP_ITEM)
            items["call_id"] = np.arange(first, first + len(rows))
            items["session"], items["epoch"], items["ids"] = sessions["key"], sessions["epoch"], counts
            if keys is None:
                items["row"], items["position"] = frame.keys.prefixes[number][rows], frame.keys.positions[number][rows]
            else:
                items["position"], items["row"] = np.array(keys, np.uint64)[part].T
            frame.ask(role, rows)
            owner = frame.owners[int(rows[0])]
            assert owner is not None
            outbox = owner.window.active.replicas[role].outbox
            outbox.lookups.append(items)
            outbox.ids.append(its_ids)


def _fill_crossing(values: Floats, rows: Ids, places: Ids, news: NDArray[Any]) -> None:
    values[places] = news


def _fill_events(events: TokenEventLogprobs, rows: Ids, places: Ids, news: NDArray[Any]) -> None:
    events.fill(places, news)
