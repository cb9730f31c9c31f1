"""Items and answers in the columns of messages."""

import numpy as np
import pytest

from actors.wire.columns import extend_items, lookup_items, pack_lookups, rows_ids, widen_items
from actors.wire.messages import (
    EXTEND_ITEM,
    LOOKUP_ITEM,
    ROWS_ITEM,
    VALUES_ITEM,
    WHOLE,
    WIDEN_ITEM,
    Extend,
    Lookup,
    Message,
    ProtocolError,
    Refusal,
    Refused,
    Rows,
    Values,
    Widen,
    decode,
    encode,
)
from actors.wire.replies import AnsweredItems, Reduced, Replies, answer_bytes, pack_rows

WIDTH = 152_064


class Mailbox:
    def __init__(self) -> None:
        self.frames: list[Message] = []
        self.writes = 0

    def send(self, *messages: Message) -> None:
        self.writes += 1
        self.frames += [decode(encode(message)) for message in messages]


def answer(call_id: int, rows: int, k: int, required_ids: int = 0, width: int = 10) -> AnsweredItems:
    ids = 0 if k == WHOLE else k
    reduced = Reduced(
        np.arange(rows, dtype=np.float32),
        -np.arange(rows, dtype=np.float32),
        np.ones((rows, ids), np.int32),
        np.full((rows, width if k == WHOLE else k), 2, np.float32),
        np.full(rows * required_ids, 3, np.float32),
    )
    return AnsweredItems(np.array([(call_id, rows, k, required_ids)], ROWS_ITEM), [reduced])


def test_items_of_an_extend_have_their_part_of_the_flat_columns() -> None:
    items = np.array(
        [(1, 2, 3, 2**64 - 1, 4, 5, 2, 1, 8, 0, 3, 0.5), (2, 3, 3, 7, 4, 0, 1, 0, WHOLE, 2, 0, 1)], EXTEND_ITEM
    )
    first, second = extend_items(Extend(items, np.array([10, 11, 12]), np.array([5, 6])))
    assert (first.tokens, first.required_ids.tolist(), first.prefix, first.k) == ([10, 11], [], 2**64 - 1, 8)
    assert (first.keep, second.keep) == (3, 0)
    assert (first.temperature, second.temperature) == (0.5, 1)
    assert (second.tokens, second.required_ids.tolist(), second.rows, second.k) == ([12], [5, 6], 0, WHOLE)
    assert list(extend_items(Extend())) == []


def test_items_of_lookups_and_widenings_name_their_row() -> None:
    (lookup,), ids = lookup_items(
        pack_lookups(np.array([(1, 2, 3, 4, 5, 2)], LOOKUP_ITEM), np.array([8, 70_000]), WIDTH), WIDTH
    )
    assert (lookup.session, lookup.row, lookup.epoch, lookup.position, lookup.size) == (2, 3, 4, 5, 2)
    assert ids.tolist() == [8, 70_000]
    (widen,) = widen_items(Widen(np.array([(1, 2, 3, 4, 5, 64)], WIDEN_ITEM)))
    assert (widen.row, widen.size) == (3, 64)


@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (-1, 4), (2**31 - 1, 2**31 - 1)])
def test_counts_that_do_not_fit_the_columns_are_refused(counts: tuple[int, int]) -> None:
    items = np.array([(i, 2, 3, 4, 5, count) for i, count in enumerate(counts)], LOOKUP_ITEM)
    with pytest.raises(ProtocolError, match="Lookup"):
        lookup_items(Lookup(items, np.array([1, 2, 3])), 100)


def test_each_peer_gets_one_frame_of_each_kind_in_one_piece() -> None:
    replies, a, b = Replies(1 << 20, 10), Mailbox(), Mailbox()
    replies.values(a, np.array([(3, 1)], VALUES_ITEM), np.array([7], np.float32))
    replies.rows(a, answer(1, 2, 4, required_ids=1))
    replies.rows(a, answer(2, 1, WHOLE))
    replies.refuse(a, 4, Refusal.KV_MISS, 12)
    replies.values(a, np.array([(5, 2)], VALUES_ITEM), np.array([8, 9], np.float32))
    replies.rows(b, answer(9, 1, 4))
    replies.drafted(c := Mailbox(), 1, [4])
    assert replies.flush() == [a, b]  # a peer that only got drafts sends no extend yet
    rows, values, refused = a.frames
    assert isinstance(rows, Rows)
    assert rows.items.tolist() == [(1, 2, 4, 1), (2, 1, WHOLE, 0)]
    assert [len(part) for part in (rows.logsumexp, rows.ids, rows.logits, rows.required)] == [3, 8, 18, 2]
    assert isinstance(values, Values)
    assert (values.items.tolist(), values.values.tolist()) == ([(3, 1), (5, 2)], [7, 8, 9])
    assert isinstance(refused, Refused)
    assert refused.items.tolist() == [(4, Refusal.KV_MISS, 12)]
    assert len(b.frames) == len(c.frames) == 1
    assert (a.writes, b.writes) == (1, 1)
    assert replies.flush() == []


def test_rows_too_long_for_one_frame_are_sent_in_several() -> None:
    replies, peer = Replies(2 * answer_bytes(1, WHOLE, 0, 10), 10), Mailbox()
    for call_id in range(5):
        replies.rows(peer, answer(call_id, 1, WHOLE))
    replies.flush()
    sizes = [len(frame.items) for frame in peer.frames if isinstance(frame, Rows)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(("rows", "k", "required_ids"), [(3, 4, 2), (2, WHOLE, 0), (1, 0, 0), (0, 4, 1)])
def test_the_size_of_an_answer_is_known_in_advance(rows: int, k: int, required_ids: int) -> None:
    message = pack_rows([answer(1, rows, k, required_ids)], 10)
    columns = (
        message.items,
        message.logsumexp,
        message.tempered,
        message.ids,
        message.pages,
        message.logits,
        message.required,
    )
    assert answer_bytes(rows, k, required_ids, 10) == sum(column.nbytes for column in columns)


def test_rows_of_one_and_of_several_reductions_survive_packing() -> None:
    ids = np.sort(np.random.default_rng(0).integers(0, WIDTH, (6, 4)), 1).astype(np.int32)
    sums, values = np.arange(6, dtype=np.float32), np.arange(24, dtype=np.float32).reshape(6, 4)
    one = Reduced(sums, -sums, ids, values, np.arange(8, dtype=np.float32))
    items = np.array([(1, 2, 4, 2), (2, 1, 4, 2), (9, 2, 4, 0), (3, 1, 4, 2)], ROWS_ITEM)
    row = Reduced(sums[:1] + 10, -sums[:1], ids[5:], values[:1] + 100, np.zeros(0, np.float32))
    drafted = AnsweredItems(np.array([(4, 2, 4, 0)], ROWS_ITEM), [row, row])
    message = pack_rows([AnsweredItems(items, [one]).select([0, 1, 3]), drafted], WIDTH)
    assert message.items.tolist() == [(1, 2, 4, 2), (2, 1, 4, 2), (3, 1, 4, 2), (4, 2, 4, 0)]
    assert message.logsumexp.tolist() == [0, 1, 2, 5, 10, 10]
    assert message.tempered.tolist() == [0, -1, -2, -5, 0, 0]
    taken = np.concatenate([ids[:3], ids[5:], ids[5:], ids[5:]])
    assert rows_ids(message, WIDTH).tolist() == taken.reshape(-1).tolist()
    assert (
        message.logits.tolist() == np.concatenate([values[:3], values[5:], [values[0] + 100] * 2]).reshape(-1).tolist()
    )
    assert message.required.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
