"""Joins the top-k slices of a row into its candidates, and looks up the logits that a role's slice lacks.

Once target and guider have answered, each role is sent one lookup of the candidates that it did not propose. Rows of
equal shape are joined together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.inflight import InflightCall, InflightCalls, Lookups
from actors.coordinator.session import LogitsRow, VerificationWindow
from actors.decoding.candidates import Floats, Ids, RowSlice, group_into_blocks
from actors.decoding.cross_vocab.logprobs import CrossingRows, CrossVocabBlock, RoleRowInput, proposed_tokens
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.columns import RowRequest
from actors.wire.messages import WHOLE

GUIDED: tuple[Role, ...] = ("target", "guider", "guider_base")  # the base proposes no candidates
SMALL: tuple[Role, ...] = GUIDED[1:]


class CandidateCompleter:
    """Joins candidates, and looks up missing logits. k: width of slices before any widening."""

    def __init__(self, k: int, vocabularies: VocabularyRegistry, call_ids: InflightCalls) -> None:
        self._k, self._vocabularies, self._calls = k, vocabularies, call_ids

    def advance(self, rows: Iterable[LogitsRow]) -> None:
        """Join the candidates of those of the rows that have been answered."""
        unjoined = [row for row in rows if row.block is None]
        self._propose(unjoined)
        self._join([row for row in unjoined if row.candidates_known])

    def look_up_crossing_rows(self, windows: Iterable[VerificationWindow]) -> None:
        """Look up boundary-crossing tokens in earlier rows of the small models."""
        waiting = [row for window in windows for row in window.rows[window.next :] if row.crossing]
        for role in SMALL:
            pending = [(row, each) for row in waiting if (each := row.crossing.get(role)) is not None and each.rows]
            if not pending:
                continue
            offsets = np.cumsum([0] + [each.rows for _, each in pending]).tolist()
            at = np.concatenate([each.at + offset for (_, each), offset in zip(pending, offsets, strict=False)])
            rows = [row for row, each in pending for _ in range(each.rows)]
            positions = [each.boundaries.first - 1 + number for _, each in pending for number in range(each.rows)]
            values = CrossingRows.share_values([each for _, each in pending])
            lookups = Lookups(role, rows, at, np.arange(len(at)), partial(_fill_crossing, values), positions)
            self._look_up(lookups, np.concatenate([each.ids for _, each in pending]))

    def _propose(self, rows: Sequence[LogitsRow]) -> None:
        """Make the proposals of a guider with another vocabulary whose slice and crossing rows have arrived."""
        ready: dict[int, list[LogitsRow]] = {}
        for row in rows:
            if row.window.aligned and row.k != WHOLE and row.proposed is None and "guider" in row.slices:
                if (crossing := row.crossing.get("guider")) is None or crossing.complete:
                    ready.setdefault(len(row.slices["guider"].ids), []).append(row)
        for members in ready.values():
            inputs = [RoleRowInput(row.slices["guider"], row.crossing.get("guider")) for row in members]
            ids = proposed_tokens(self._vocabularies.alignment("guider").tables, inputs, self._k)
            unknown, nothing = np.full(ids.shape[1], np.nan), np.zeros(0)
            for row, proposed in zip(members, ids, strict=True):
                row.proposed = RowSlice(proposed, unknown, nothing, 0.0)

    def _join(self, rows: Sequence[LogitsRow]) -> None:
        """Join these rows into blocks, and send each role lookups of the candidates that it lacks."""
        plain = [row for row in rows if not row.window.aligned]
        self._take_blocks(plain, group_into_blocks([row.proposal() for row in plain]))
        aligned = [row for row in rows if row.window.aligned]
        offered = [row.proposal() for row in aligned]

        def make(indices: list[int]) -> CrossVocabBlock:
            inputs = {
                role: [
                    RoleRowInput(aligned[index].slices.get(role), aligned[index].crossing.get(role))
                    for index in indices
                ]
                for role in SMALL
            }
            tables = {role: self._vocabularies.alignment(role).tables for role in SMALL}
            return CrossVocabBlock([offered[index] for index in indices], tables, inputs)

        self._take_blocks(aligned, group_into_blocks(offered, make))

    def _take_blocks(self, rows: Sequence[LogitsRow], made: Sequence[tuple[Any, list[int]]]) -> None:
        for block, indices in made:
            members = [rows[index] for index in indices]
            for at, row in enumerate(members):
                row.join(block, at)
            window = members[0].window
            if not window.guided or members[0].k == WHOLE:
                continue
            for role in GUIDED:
                if window.aligned and role != "target":
                    at_rows, places, ids = block.missing_logits(role, _NO_MAP)
                    ascending = False
                else:
                    theirs = self._vocabularies.plain_map(window.active.primary, role)
                    at_rows, places, ids = block.missing_logits(role, theirs.to_role)
                    ascending = theirs.ascending
                self._look_up(Lookups(role, members, at_rows, places, partial(block.fill, role)), ids, ascending)

    def _look_up(self, lookups: Lookups, ids: Ids, ascending: bool = True) -> None:
        """Send lookups of these ids, row after row. ascending: the ids are sorted within each row."""
        if not len(ids):
            return
        if not ascending:
            ids = lookups.sort(ids)
        for replica, part, its_ids in lookups.by_replica(ids):
            outbox = replica.outbox
            for row, (position, prefix), count in part.counted():
                active = row.window.active
                call_id = self._calls.issue(InflightCall("lookup", row.window, part.role, row=row, lookups=part))
                part.call_ids.append(call_id)
                row.lookup_sent()
                outbox.lookups.append(RowRequest(call_id, active.key, prefix, active.epoch, position, count))
            outbox.ids.append(its_ids)


_NO_MAP = np.zeros(0, np.int64)


def _fill_crossing(values: Floats, at: Ids, places: Ids, news: NDArray[Any]) -> None:
    values[places] = news
