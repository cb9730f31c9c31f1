"""The arithmetic of one row, compiled: merge candidates, combine, adjust, estimate the unseen mass, filter, choose.

Every kernel loops over rows, and a row depends on its own inputs alone. Sums run in a fixed order, so neither the other
rows of a call nor their number change a bit. Logits are in nats. Shapes: B rows of a block, W places for candidates in
each, R roles (the primary first, then guider and guider base), n rows of one call.

The formulas, as numpy writes them, are in `tests/decoding/formulas.py`, with which these loops are compared.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.decoding.compiling import kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PADDING = 1 << 32  # above every id, so that it sorts last

# How a row's logits become one: the primary's own, or equation 1 of ThinkLogit (arXiv 2507.12759) over three roles.
ALONE, GUIDED = 0, 1

SPEC = np.dtype(
    [
        ("rule", "<i8"),  # ALONE or GUIDED
        ("alpha", "<f8"),  # parameter of GUIDED
        ("temperature", "<f8"),  # 0: greedy
        ("top_p", "<f8"),  # 1: keeps all
        ("min_p", "<f8"),  # 0: keeps all
        ("top_k", "<i8"),  # 0: keeps all
        ("seed", "<u8"),
        ("position", "<u8"),  # of the token in the noise
        ("repetition", "<f8"),  # 1: none
        ("presence", "<f8"),
        ("frequency", "<f8"),
        ("adjusted", "<i8"),  # 1 if RowAdjustments or a penalty may change the row
    ]
)
"""Sampling parameters of one row, as `Sampling` defines them. The noise depends on seed, position and token id."""

SESSION = np.dtype(
    [
        ("key", "<u8"),
        ("age", "<u8"),
        ("epoch", "<u4"),
        ("spec", SPEC),  # without rule, alpha and position, which differ by row
    ]
)
"""A session, as its coordinator's table has it."""

DECISION = np.dtype(
    [
        ("token", "<i8"),
        ("target_token", "<i8"),  # the primary's own choice with the same noise
        ("outside", "<f8"),  # estimated probability of the ids outside the candidates
        ("uncovered", "<f8"),  # the largest mass that a single model has outside the candidates, exact
        ("settled", "?"),  # greed, top_p, top_k or min_p keep no id outside, whatever its logit
        ("no_legal_token", "?"),  # no candidate may be chosen; `token` means nothing
    ]
)
"""The outcome of one row."""


class RowAdjustments(NamedTuple):
    """Biases, penalties and bans of n rows, as flat columns.

    offsets [5, n + 1]: where a row's part of each column begins and ends, in the order of the columns below. Ids within
    a row are ascending. seen: ids of prompt and output, with how often each is in the output. allowed: if a row has
    any, no other id is chosen. legal: one bit for each id, as int32 words; if a row has none, every id is legal.
    """

    offsets: Ints
    bias_ids: Ints
    biases: Floats
    seen_ids: Ints
    seen_counts: Ints
    banned: Ints
    allowed: Ints
    legal: NDArray[np.int32]


_BIAS, _SEEN, _BANNED, _ALLOWED, _LEGAL = range(5)
_NO_IDS, _NO_FLOATS, _NO_WORDS = np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int32)


@lru_cache(1024)
def no_adjustments(rows: int) -> RowAdjustments:
    """Adjustments that change none of so many rows."""
    return RowAdjustments(
        np.zeros((5, rows + 1), np.int64), _NO_IDS, _NO_FLOATS, _NO_IDS, _NO_IDS, _NO_IDS, _NO_IDS, _NO_WORDS
    )


EXTENDING, LOOKING_UP, COMPLETE = 0, 1, 2  # stages of a row that kernels know, of `RowStage`
_NOISE = 1e-7  # a probability below this is lost in the float32 logsumexp
_COLDEST = 0.3  # the outside mass of a row below this temperature, such as a greedy one, is estimated at it
_FAR = 1e9  # beyond every logit
_TINY = np.finfo(np.float64).tiny
_SURELY = 1 + 1e-9  # 1, and more than the rounding of a few operations
# Nats by which a logit and a mass outside a guided row's candidates may exceed their estimates. Guidance raises single
# ids by much more than the mean, so the margin of a logit is wide.
_LOGIT_MARGIN, _MASS_MARGIN = 3.0, 1.0


# -- noise ------------------------------------------------------------------------------------------------------------


@kernel
def mix64(x: Any) -> Any:
    """The splitmix64 finaliser of a uint64, as in `actors.decoding.hashing`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def noise_key(seed: Any, position: Any) -> Any:
    """The part of the noise's hash that all ids of a row share."""
    return mix64(np.uint64(seed) + (np.uint64(position) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


@kernel
def uniform(key: Any, id_: Any) -> float:
    """Uniform noise of an id: 52 bits, strictly inside (0, 1)."""
    bits = mix64(key + (np.uint64(id_) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (np.float64(bits >> np.uint64(12)) + 0.5) * 2.0**-52


@kernel
def gumbel(key: Any, id_: Any) -> float:
    """Standard Gumbel noise of an id."""
    return -math.log(-math.log(uniform(key, id_)))


@kernel
def hash_tokens(start: Any, tokens: Any, out: Any) -> None:
    """The running hash after each token, as `hashing.extend_hashes`: tokens [n] -> out [n] uint64."""
    running = np.uint64(start)
    for place in range(len(tokens)):
        running = mix64(running + (np.uint64(tokens[place]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        out[place] = running


# -- candidates -------------------------------------------------------------------------------------------------------


@kernel
def _ascending(ids: Any, order: Any) -> int:
    """The number of ids that are not -1, and in `order` their indices by ascending id."""
    found, last, sorted_already = 0, -1, True
    for index in range(len(ids)):
        if ids[index] >= 0:
            sorted_already &= ids[index] >= last
            last = ids[index]
            order[found] = index
            found += 1
    if not sorted_already:
        order[:found] = order[:found][np.argsort(ids[order[:found]], kind="mergesort")]
    return found


class SentRows(NamedTuple):
    """The rows of one message of a model, as flat columns, in the encoding of `actors.wire.ids`.

    starts [R, 4]: of each row its k (-1: a whole row, without ids), and where its ids, logits and required logits
    begin. page_counts: `pages` values for each row.
    """

    starts: Ints
    low: NDArray[np.uint16]
    page_counts: NDArray[np.uint16]
    pages: int
    logits: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    tempered: NDArray[np.float32]
    required: NDArray[np.float32]


@kernel
def locate_rows(items: Any, width: int, pages: int, lengths: Any, first_rows: Any, starts: Any) -> bool:
    """Fill `starts` [R, 4] of `SentRows`, and the first row of each item, from the items (`ROWS_ITEM`) of a message.

    lengths: of the columns of ids, page counts, logits, logsumexps, tempered ones, and required logits. Returns False
    if they contradict the items.
    """
    row = ids = logits = values = 0
    for number in range(len(items)):
        item = items[number]
        first_rows[number] = row
        if item.rows < 0 or item.required_ids < 0 or row + item.rows > len(starts):
            return False
        for _ in range(item.rows):
            starts[row, 0], starts[row, 1], starts[row, 2], starts[row, 3] = item.k, ids, logits, values
            ids += max(item.k, 0)
            logits += width if item.k < 0 else item.k
            values += item.required_ids
            row += 1
    fit = row == lengths[3] == lengths[4] and row * pages == lengths[1] and ids == lengths[0]
    return bool(fit and logits == lengths[2] and values == lengths[5])


ALL, ONLY_REQUIRED, ONLY_SLICES = 0, 1, 2


class BlockColumns(NamedTuple):
    """The arrays of a block that slices are stored in, with B rows. See `merge`."""

    slices: Ints
    slice_logits: Floats
    folded: Floats
    sums: Floats
    tempered: Floats
    ceiling: Floats


@kernel
def store_rows(
    sent: Any,
    source: Any,
    at: Any,
    part: int,
    theirs: Any,
    heats: Any,
    groups: Any,
    role: int,
    columns: Any,
    block: Any,
) -> None:
    """Store rows that a role has sent. sent: `SentRows`. source [n]: numbers of rows in it; at [n]: rows of the block.

    part: ALL, or ONLY_REQUIRED: no slices, or ONLY_SLICES: neither required nor tempered values. theirs: by the role's
    id the primary's, -1 for none. heats [n]: temperatures of `tempered`. groups [g]: where the ids of each required
    event begin, the number of ids behind them: the logits of an event's ids are folded by logsumexp. columns: the first
    column in `slices` and in `folded`. block: `BlockColumns`. Raises ValueError if the ids contradict their counts.
    """
    for number in range(len(source)):
        _store_row(sent, source[number], at[number], part, theirs, heats[number], groups, role, columns, block)


@kernel
def store_answers(
    sent: Any,
    items: Any,
    first_rows: Any,
    answered: Any,
    numbers: Any,
    call_rows: Any,
    call_counts: Any,
    k: int,
    theirs: Any,
    heats: Any,
    groups: Any,
    role: int,
    columns: Any,
    block: Any,
    stage: Any,
    arrived: Any,
) -> int:
    """Store the rows with which a role answered the calls `numbers` [n]: the items `answered` [n] of a message.

    call_rows, call_counts: by number the first row of the call in the block, and how many follow it directly. k: the
    width that was requested. stage, arrived: of the block's rows, as `RowFrame` has them. The others: see `store_rows`.
    Returns -1 if an item has another width, or other numbers of rows or required logits, than was requested; else the
    number of rows whose candidates were found before.
    """
    required, late = groups[-1], 0
    for n in range(len(numbers)):
        item, count = items[answered[n]], call_counts[numbers[n]]
        if item.k != k or item.required_ids != required or item.rows != count:
            return -1
    for n in range(len(numbers)):
        source, into = first_rows[answered[n]], call_rows[numbers[n]]
        for row in range(call_counts[numbers[n]]):
            _store_row(sent, source + row, into + row, ALL, theirs, heats[into + row], groups, role, columns, block)
            arrived[into + row] |= 1 << role
            late += stage[into + row] == LOOKING_UP
    return late


@kernel
def _store_row(
    sent: Any,
    row: int,
    into: int,
    part: int,
    theirs: Any,
    heat: float,
    groups: Any,
    role: int,
    columns: Any,
    block: Any,
) -> None:
    k, id_at, logit_at, value_at = sent.starts[row, 0], sent.starts[row, 1], sent.starts[row, 2], sent.starts[row, 3]
    block.sums[role, into] = sent.logsumexp[row]
    if part != ONLY_REQUIRED:
        lowest = np.inf
        if k < 0:
            for place in range(len(theirs)):
                block.slices[into, columns[0] + place] = theirs[place]
                block.slice_logits[into, columns[0] + place] = sent.logits[logit_at + place]
                lowest = min(lowest, sent.logits[logit_at + place])
        else:
            page, first = -1, row * sent.pages
            left: Any = 0  # ids on this page that are still to come
            if sent.page_counts[first : first + sent.pages].sum() > k:
                raise ValueError("the ids of a row contradict their counts or the width of the model")
            for place in range(k):
                while left == 0 and page < sent.pages:
                    page += 1
                    left = k if page == sent.pages else np.int64(sent.page_counts[first + page])
                left -= 1
                id_ = (page << 16) + np.int64(sent.low[id_at + place])
                if id_ >= len(theirs):
                    raise ValueError("the ids of a row contradict their counts or the width of the model")
                block.slices[into, columns[0] + place] = theirs[id_]
                block.slice_logits[into, columns[0] + place] = sent.logits[logit_at + place]
                lowest = min(lowest, sent.logits[logit_at + place])
        if role == 0:
            block.ceiling[into] = lowest
    if part == ONLY_SLICES:
        return
    events, sum_ = len(groups) - 1, np.float64(sent.tempered[row])
    one_by_one = together = 0.0
    for event in range(events):
        total: Any = np.float64(sent.required[value_at + groups[event]])
        for place in range(groups[event] + 1, groups[event + 1]):
            total = _log_add(total, np.float64(sent.required[value_at + place]))
        block.folded[into, columns[1] + event] = total
        together += math.exp(total / heat - sum_)
        for place in range(groups[event], groups[event + 1]):
            one_by_one += math.exp(np.float64(sent.required[value_at + place]) / heat - sum_)
    if role == 0:
        # Two end ids of probability .3 are one event of .6, which at temperature .5 weighs .36 and not twice .09.
        if heat != 1 and groups[events] > events:
            sum_ += math.log(max(1.0 - one_by_one, 0.0) + together)
        block.tempered[into] = sum_


@kernel
def _log_add(x: float, y: float) -> float:
    """Log of exp(x) + exp(y)."""
    if x == y:
        return x + math.log(2.0)
    return max(x, y) + math.log1p(math.exp(-abs(x - y)))


@kernel
def merge(
    at: Any,
    slices: Any,
    slice_logits: Any,
    slice_ends: Any,
    events: Any,
    folded: Any,
    event_ends: Any,
    ids: Any,
    counts: Any,
    known: Any,
    logits: Any,
    places: Any,
) -> None:
    """Merge the ids that roles propose in the rows `at` [n], and those that are required, into the rows' candidates.

    slices, slice_logits [B, K]: the slices of all roles side by side, that of role r up to column slice_ends[r], then
    ids that no role proposed; -1 stands for no id. events [E]: required ids, those of role r up to column
    event_ends[r]; folded [B, E]: their logits, NaN until they are known. A folded logit replaces that of a slice.
    Results: ids [B, W], counts [B]: the candidates, ascending, each once, then PADDING. logits [R, B, W]: NaN where
    unknown. known [B, W]: bit r is set if the answer of role r holds the logit, so that it need not be looked up.
    places [B, E]: the places of the events.

    Example: slices [3, 7 | 7, 9], events [8]: ids [3, 7, 8, 9], places [2].
    """
    roles = len(slice_ends)
    order, required = np.empty(slices.shape[1], np.int64), np.empty(len(events), np.int64)
    parts = roles + 1  # the last one: ids that no role proposed
    next_, last = np.empty(parts, np.int64), np.empty(parts, np.int64)
    others = _ascending(events, required)
    for row in at:
        begin = 0
        for part in range(parts):
            end = slice_ends[part] if part < roles else slices.shape[1]
            next_[part] = begin
            last[part] = begin + _ascending(slices[row, begin:end], order[begin:end])
            order[begin:end] += begin
            begin = end
        e = count = 0
        while True:
            id_ = PADDING
            for part in range(parts):
                if next_[part] < last[part]:
                    id_ = min(id_, slices[row, order[next_[part]]])
            if e < others:
                id_ = min(id_, events[required[e]])
            if id_ == PADDING:
                break
            ids[row, count], known[row, count] = id_, 0
            for role in range(roles):
                logits[role, row, count] = np.nan
                while next_[role] < last[role] and slices[row, order[next_[role]]] == id_:
                    logits[role, row, count] = slice_logits[row, order[next_[role]]]
                    known[row, count] |= 1 << role
                    next_[role] += 1
            while next_[roles] < last[roles] and slices[row, order[next_[roles]]] == id_:
                next_[roles] += 1
            while e < others and events[required[e]] == id_:
                column = required[e]
                role = np.searchsorted(event_ends, column, side="right")
                places[row, column] = count
                known[row, count] |= 1 << role
                if not math.isnan(folded[row, column]):
                    logits[role, row, count] = folded[row, column]
                e += 1
            count += 1
        counts[row] = count
        ids[row, count:] = PADDING


@kernel
def missing(
    at: Any, ids: Any, counts: Any, known: Any, role: int, theirs: Any, rows: Any, found: Any, places: Any, wanted: Any
) -> Any:
    """The candidates of rows `at` [n] whose logits must be looked up in a role: their places and the role's ids.

    theirs: by id of the primary the role's id, -1 for none. rows, found [n]: the rows that lack any, and how many. A
    row's ids are ascending in the role's numbering. Returns the number of such rows and of all ids.
    """
    end = asked = 0
    for row in at:
        begin, ascending = end, True
        for place in range(counts[row]):
            if not known[row, place] >> role & 1:
                id_ = theirs[ids[row, place]]
                if id_ >= 0:
                    ascending &= end == begin or wanted[end - 1] < id_
                    places[end], wanted[end] = place, id_
                    end += 1
        if end > begin:
            rows[asked], found[asked] = row, end - begin
            asked += 1
        if not ascending:
            order = np.argsort(wanted[begin:end], kind="mergesort")
            places[begin:end] = places[begin:end][order]
            wanted[begin:end] = wanted[begin:end][order]
    return asked, end


@kernel
def ask(items: Any, first_id: int, sessions: Any, prefixes: Any, positions: Any, rows: Any, counts: Any) -> None:
    """Fill lookups (`LOOKUP_ITEM`) [n] of counts [n] ids in rows [n] of a frame. first_id: of the calls.

    sessions (`SESSION`), prefixes, positions: of all rows of the frame, as `RowKeys` has them.
    """
    for number in range(len(rows)):
        row, item = rows[number], items[number]
        item.call_id = first_id + number
        item.session, item.epoch = sessions[row].key, sessions[row].epoch
        item.row, item.position, item.ids = prefixes[row], positions[row], counts[number]


@kernel
def scan_rows(stage: Any, arrived: Any, lookups: Any, proposing: int, everything: int, proposed: Any, done: Any) -> Any:
    """The rows of a frame whose candidates can be found now, and those that lack nothing any more.

    stage, arrived [n], lookups [R, n]: see `RowFrame`. proposing, everything: bits in `arrived` of the roles whose
    slices determine the candidates, 0 if there are none, and of all roles. Returns the numbers of rows in `proposed`
    and in `done`.
    """
    found = complete = 0
    for row in range(len(stage)):
        if proposing and stage[row] != LOOKING_UP and stage[row] != COMPLETE:
            if arrived[row] & proposing == proposing:
                proposed[found] = row
                found += 1
        elif arrived[row] == everything and stage[row] == (LOOKING_UP if proposing else EXTENDING):
            waiting = False
            for role in range(len(lookups)):
                waiting |= lookups[role, row] != 0
            if not waiting:
                done[complete] = row
                complete += 1
    return found, complete


@kernel
def fill(logits: Any, role: int, rows: Any, counts: Any, places: Any, values: Any) -> None:
    """Store looked-up values in logits [R, B, W]: for rows [n] counts [n] values each, at places."""
    at = 0
    for number in range(len(rows)):
        for _ in range(counts[number]):
            logits[role, rows[number], places[at]] = values[at]
            at += 1


@kernel
def split_ids(ids: Any, counts: Any, columns: int, low: Any, pages: Any) -> None:
    """Encode ids as `actors.wire.ids` describes: row r has counts[r] of them, and `columns` page counts, 0 before."""
    at = 0
    for row in range(len(counts)):
        first = row * columns
        for _ in range(counts[row]):
            page = ids[at] >> 16
            low[at] = ids[at] & 0xFFFF
            if page < columns:
                pages[first + page] += 1
            at += 1


# -- estimates of what is outside the candidates ----------------------------------------------------------------------


@kernel
def _uncovered(logits: Any, count: int, logsumexp: float, heat: float) -> float:
    """1 - the probability of the candidates at a temperature. Exact, because slices carry the logsumexp of the row."""
    mass = 0.0
    for place in range(count):
        share = math.exp(logits[place] / heat - logsumexp)
        if not math.isnan(share):
            mass += share
    return 1.0 - mass


@kernel
def _log_uncovered(uncovered: float, logsumexp: float) -> float:
    """Log of the sum of exp(logits) outside the candidates."""
    return math.log(max(uncovered, _NOISE)) + logsumexp


@kernel
def _log_sum(logits: Any, count: int, heat: float) -> float:
    """Log of the sum of exp(logits / heat) over the candidates; far below any logit if there is none."""
    top = -_FAR
    for place in range(count):
        top = max(top, logits[place] / heat)
    total = 0.0
    for place in range(count):
        total += math.exp(min(logits[place] / heat - top, 0.0))
    return top + math.log(max(total, _TINY))


@kernel
def _lift_of_lowest_quarter(target: Any, guider: Any, combined: Any, count: int, heat: float, work: Any) -> float:
    """Log of the factor by which guidance raises the target's mass at the quarter of the candidates with the lowest
    guider logits; NaN if the guider has none of the candidates. combined: before anything is adjusted."""
    known = 0
    for place in range(count):
        if not (math.isnan(guider[place]) or math.isnan(target[place])):
            work[known] = guider[place]
            known += 1
    if not known:
        return np.nan
    last = np.partition(work[:known], known // 4)[known // 4]
    top = before = -_FAR
    for place in range(count):
        if guider[place] <= last and not math.isnan(target[place]):
            top = max(top, target[place] + (combined[place] - target[place]) / heat)
            before = max(before, target[place])
    lifted = plain = 0.0
    for place in range(count):
        if guider[place] <= last and not math.isnan(target[place]):
            lifted += math.exp(min(target[place] + (combined[place] - target[place]) / heat - top, 0.0))
            plain += math.exp(min(target[place] - before, 0.0))
    return top + math.log(max(lifted, _TINY)) - (before + math.log(max(plain, _TINY)))


@kernel
def _float32_spacing(value: float) -> float:
    """The distance from |value|, rounded to float32, to the next larger float32."""
    rounded = np.float64(np.float32(abs(value)))
    if rounded < 2.0**-126:
        return 2.0**-149
    return math.ldexp(1.0, math.frexp(rounded)[1] - 24)


# -- one row ----------------------------------------------------------------------------------------------------------


@kernel
def _combine(rule: int, logits: Any, row: int, count: int, sums: Any, alpha: float, out: Any) -> None:
    """Combined logits of a row's candidates (arXiv 2507.12759, equation 1).

    An id without a counterpart in a small model gets no guidance: its log-probability delta is 0, so its logit delta is
    the difference of the two logsumexp. An id that the primary lacks becomes -inf.
    """
    for place in range(count):
        target = logits[0, row, place]
        if math.isnan(target):
            out[place] = -np.inf
        elif rule == GUIDED:
            delta = logits[1, row, place] - logits[2, row, place]
            if math.isnan(delta):
                delta = sums[1, row] - sums[2, row]
            out[place] = target + alpha * delta
        else:
            out[place] = target


@kernel
def _find(ids: Any, count: int, wanted: int, begin: int) -> int:
    """First place from `begin` on whose id is not below the wanted one: binary search in ascending ids."""
    end = count
    while begin < end:
        middle = (begin + end) >> 1
        if ids[middle] < wanted:
            begin = middle + 1
        else:
            end = middle
    return begin


@kernel
def _mask_row(ids: Any, z: Any, count: int, legal: Any) -> None:
    """Set the logits z of ids that are not legal to -inf, in place. legal: one bit for each id, as int32 words."""
    for place in range(count):
        id_ = ids[place]
        word = id_ >> 5
        if word >= len(legal) or not (legal[word] >> (id_ & 31)) & 1:
            z[place] = -np.inf


@kernel
def _all_legal_known(ids: Any, target: Any, count: int, legal: Any) -> bool:
    """True if all legal ids, of which there are any, are candidates that the primary has. legal: see `_mask_row`."""
    if len(legal) == 0:
        return False
    known = found = 0
    for place in range(count):
        id_ = ids[place]
        word = id_ >> 5
        if word < len(legal) and (legal[word] >> (id_ & 31)) & 1:
            known += not math.isnan(target[place])
    for word in range(len(legal)):
        bits = np.uint32(legal[word])
        while bits:
            bits &= bits - np.uint32(1)
            found += 1
        if found > known:
            return False
    return True


@kernel
def adjust_row(ids: Any, z: Any, count: int, spec: Any, extra: Any, number: int) -> None:
    """Change one row in place, as vLLM does: ids ascending, z their logits.

    1. The bias is added. 2. The repetition penalty divides positive logits of ids in prompt and output and multiplies
    negative ones. 3. Frequency and presence penalties are subtracted from ids in the output. 4. Banned ids become -inf,
    and so do all that are not allowed or not legal.
    """
    offsets = extra.offsets
    place = 0
    for entry in range(offsets[_BIAS, number], offsets[_BIAS, number + 1]):
        place = _find(ids, count, extra.bias_ids[entry], place)
        if place < count and ids[place] == extra.bias_ids[entry]:
            z[place] += extra.biases[entry]
    place = 0
    for entry in range(offsets[_SEEN, number], offsets[_SEEN, number + 1]):
        place = _find(ids, count, extra.seen_ids[entry], place)
        if place < count and ids[place] == extra.seen_ids[entry]:
            if spec.repetition != 1:
                z[place] = z[place] / spec.repetition if z[place] > 0 else z[place] * spec.repetition
            if extra.seen_counts[entry]:
                z[place] += -spec.presence - spec.frequency * extra.seen_counts[entry]
    place = 0
    for entry in range(offsets[_BANNED, number], offsets[_BANNED, number + 1]):
        place = _find(ids, count, extra.banned[entry], place)
        if place < count and ids[place] == extra.banned[entry]:
            z[place] = -np.inf
    begin, end = offsets[_ALLOWED, number], offsets[_ALLOWED, number + 1]
    if end > begin:
        entry = begin
        for place in range(count):
            while entry < end and extra.allowed[entry] < ids[place]:
                entry += 1
            if entry == end or extra.allowed[entry] != ids[place]:
                z[place] = -np.inf
    if offsets[_LEGAL, number + 1] > offsets[_LEGAL, number]:
        _mask_row(ids, z, count, extra.legal[offsets[_LEGAL, number] : offsets[_LEGAL, number + 1]])


@kernel
def filter_row(z: Any, count: int, spec: Any, ceiling: float, least: float, most: float, work: Any) -> bool:
    """Divide one row by its temperature and filter it by min_p, top_k and top_p, in place: -inf for filtered ids.

    Greedy rows pass unchanged. Of equal logits the lowest id ranks first. ceiling: no logit outside is higher, in nats
    (-inf: nothing is outside). least, most: bounds on the log of the sum of exp(logit / temperature) outside. Returns
    True if the whole row would keep the same ids, so that the same one would be chosen.

    Example: top_p .9, weights 60, 30, 4, and outside at least 1, at most 6, none heavier than 4. The whole row weighs
    95 to 100, so its nucleus reaches to a weight of 85.5 to 90 and holds the ids of 60 and 30 in both cases: settled.
    With at most 10 outside it reaches to 93.6, and may hold the id of 4 or one outside: not settled.
    """
    if spec.temperature == 0:
        top = -np.inf
        for place in range(count):
            top = max(top, z[place])
        return top > ceiling
    ceiling /= spec.temperature
    for place in range(count):
        z[place] /= spec.temperature
    if not (spec.top_k > 0 or spec.top_p < 1 or spec.min_p > 0):
        return ceiling == -np.inf
    order = np.argsort(-z[:count], kind="mergesort")
    top = z[order[0]]
    top_k = spec.top_k if spec.top_k > 0 else count
    known = kept = 0
    inside = seen = 0.0
    for rank in range(count):
        place = order[rank]
        weight = math.exp(z[place] - top)
        known += z[place] > ceiling
        if rank >= top_k or weight < spec.min_p:
            weight = 0.0
        else:
            kept = rank + 1
        inside += weight
        if z[place] > ceiling:
            seen += weight
        work[rank] = weight
    # min_p or top_k leave nothing outside: then top_p, which comes after them, needs no id outside either.
    closed = (spec.top_k > 0 and known >= spec.top_k) or top + math.log(max(spec.min_p, 1e-300)) > ceiling
    cut_before = spec.top_k > 0 or spec.min_p > 0  # they may filter ids outside, which then weigh nothing
    lower = upper = inside
    if not closed:
        upper += math.exp(min(most - top, 700.0))
        if not cut_before:
            lower += math.exp(min(least - top, 700.0))
    # The first id always stays; others stay while the mass before them is below top_p of what min_p and top_k kept.
    reached, same = 0.0, True
    for rank in range(count):
        reached += work[rank]
        before = reached - work[rank]
        stays = rank < kept and (before < spec.top_p * lower or rank == 0)
        if rank < kept:
            same &= stays == (before < spec.top_p * upper or rank == 0)
        if not stays:
            z[order[rank]] = -np.inf
    return closed or (spec.top_p < 1 and seen >= spec.top_p * upper and same)


@kernel
def _choose(ids: Any, filtered: Any, count: int, sampled: bool, key: Any) -> Any:
    """The id with the highest sum of filtered logit and noise (Gumbel-max). Ties go to the lowest id.

    Most ids are passed over without a logarithm: an id that lies d > 0 nats below the best score so far wins only if
    its noise u is so close to 1 that 1 - u < exp(-d), and exp(-d) < 1 / (1 + d + d^2 / 2 + d^3 / 6).
    """
    best, chosen = -np.inf, ids[0]
    for place in range(count):
        z = filtered[place]
        if z == -np.inf:
            continue
        if not sampled:
            score = z
        else:
            u, d = uniform(key, ids[place]), best - z
            if d > 0 and (1.0 - u) * (1.0 + d * (1.0 + d * (0.5 + d / 6.0))) > _SURELY:
                continue
            score = z - math.log(-math.log(u))
        if score > best:
            best, chosen = score, ids[place]
    return chosen


@kernel
def decide(
    ids: Any,
    counts: Any,
    logits: Any,
    sums: Any,
    tempered: Any,
    ceilings: Any,
    at: Any,
    specs: Any,
    extra: Any,
    out: Any,
    filtered: Any,
) -> None:
    """Choose the tokens of n rows.

    ids [B, W], counts [B]: each row's candidates, ascending. logits [R, B, W]: of each role, NaN where it has no such
    id. sums [R, B]: logsumexp over each role's whole row. tempered [B]: the primary's at the request's temperature.
    ceilings [B]: no logit of the primary outside the candidates is higher. at [n]: the rows to decide. specs [n]:
    `SPEC`. extra: `RowAdjustments` of n rows. out [n]: `DECISION`. filtered [n, W]: combined, adjusted, over
    temperature, -inf where filtered.

    The mass of the primary outside the candidates is known exactly; below a temperature of .3 it is bounded by that at
    .3. Guidance raises it by a factor, for which the larger of two estimators counts:
    1. the ratio of the guider's and the guider base's mass outside, exact if their difference is the same everywhere;
    2. the factor at the quarter of the candidates with the lowest guider logits, most of which only the target proposed
    """
    width = ids.shape[1]
    work, own = np.empty(width), np.empty(width)
    for number in range(len(at)):
        row = at[number]
        count, spec, z = counts[row], specs[number], filtered[number]
        guided = spec.rule == GUIDED
        names, target = ids[row], logits[0, row]
        z[count:] = -np.inf
        _combine(spec.rule, logits, row, count, sums, spec.alpha, z)
        for place in range(count):
            own[place] = target[place]

        greedy = spec.temperature == 0
        scale = 1.0 if greedy else spec.temperature
        heat = max(spec.temperature, _COLDEST)
        uncovered = _uncovered(target, count, sums[0, row], 1.0)
        at_scale, sum_at_scale = uncovered, sums[0, row]
        if scale != 1:
            sum_at_scale = tempered[row]
            at_scale = _uncovered(target, count, sum_at_scale, scale)
        largest = uncovered
        if spec.temperature < _COLDEST:  # exp(z / heat) is exp(z) exp(z (1 / heat - 1)), and no z is above the ceiling
            log_mass = _log_uncovered(uncovered, sums[0, row])
            log_mass += (1 / heat - 1) * min(max(ceilings[row], -_FAR), _FAR)
        else:
            log_mass = _log_uncovered(at_scale, sum_at_scale)
        lift = 0.0
        if guided:
            of_guider = _uncovered(logits[1, row], count, sums[1, row], 1.0)
            of_base = _uncovered(logits[2, row], count, sums[2, row], 1.0)
            largest = max(largest, of_guider, of_base)
            ratio = _log_uncovered(of_guider, sums[1, row]) - _log_uncovered(of_base, sums[2, row])
            lift = spec.alpha * ratio / heat
            lowest = _lift_of_lowest_quarter(target, logits[1, row], z, count, heat, work)
            if not math.isnan(lowest):
                lift = max(lift, lowest)
            log_mass += lift

        if spec.adjusted:
            adjust_row(names, z, count, spec, extra, number)
            adjust_row(names, own, count, spec, extra, number)
        # True if everything that a grammar allows is a candidate, so that nothing that may be chosen is outside.
        words = extra.legal[extra.offsets[_LEGAL, number] : extra.offsets[_LEGAL, number + 1]]
        nothing_outside = spec.adjusted and _all_legal_known(names, target, count, words)
        legal = False
        for place in range(count):
            legal |= math.isfinite(z[place])
        decision = out[number]
        decision.no_legal_token = not legal
        decision.uncovered = largest
        if not legal:
            decision.token = decision.target_token = PADDING
            decision.outside, decision.settled = 0.0 if nothing_outside else 1.0, nothing_outside
            continue
        if nothing_outside:
            decision.outside, decision.settled = 0.0, True
            key = noise_key(spec.seed, spec.position)
            filter_row(own, count, spec, -np.inf, -np.inf, -np.inf, work)
            decision.target_token = _choose(names, own, count, not greedy, key)
            filter_row(z, count, spec, -np.inf, -np.inf, -np.inf, work)
            decision.token = _choose(names, z, count, not greedy, key)
            continue
        log_inside = _log_sum(z, count, heat)
        decision.outside = 1.0 / (1.0 + math.exp(min(max(log_inside - log_mass, -700.0), 700.0)))

        # Bounds for the primary alone: exact but for the rounding of its logsumexp to float32.
        slack = _float32_spacing(sum_at_scale)
        most = _log_uncovered(at_scale + slack, sum_at_scale)
        least = -np.inf
        if not spec.adjusted and at_scale - slack > 0:
            least = math.log(at_scale - slack) + sum_at_scale
        ceiling = min(ceilings[row], most * scale)  # at most all of the mass outside is one id's
        key = noise_key(spec.seed, spec.position)
        filters = not greedy and (spec.top_k > 0 or spec.top_p < 1 or spec.min_p > 0)
        if guided:
            filter_row(own, count, spec, ceiling, least, most, work)
            decision.target_token = _choose(names, own, count, not greedy, key)
            # Bounds for a guided row: the estimates, with margins. The choice of a row near temperature 0 hangs on a
            # single id, of which an estimate of mass says too little.
            ceiling = min(ceilings[row] + max(lift * heat, 0.0), log_mass * heat) + _LOGIT_MARGIN
            if spec.temperature < _COLDEST:
                ceiling = np.inf
            least, most = -np.inf, log_mass + _MASS_MARGIN / heat
        decision.settled = filter_row(z, count, spec, ceiling, least, most, work) and (filters or not guided)
        decision.token = _choose(names, z, count, not greedy, key)
        if not guided:
            decision.target_token = decision.token


@kernel
def choose(ids: Any, logits: Any, specs: Any, out: Any) -> None:
    """The chosen id of each row, out [n], from ids and logits [n, W] beyond which there is nothing. No row is empty."""
    width = ids.shape[1]
    work, z = np.empty(width), np.empty(width)
    for row in range(len(ids)):
        spec = specs[row]
        for place in range(width):
            z[place] = logits[row, place]
        filter_row(z, width, spec, -np.inf, -np.inf, -np.inf, work)
        out[row] = _choose(ids[row], z, width, spec.temperature > 0, noise_key(spec.seed, spec.position))


# -- log-probabilities ------------------------------------------------------------------------------------------------


@kernel
def log_total(rule: int, logits: Any, row: int, count: int, sums: Any, alpha: float, combined: Any) -> Any:
    """Log of the sum of exp(combined) over the whole vocabulary (nats); stores a row's combined logits in [W].

    Alone it is exactly the primary's logsumexp. With guidance the target's mass outside the candidates is scaled by the
    ratio of the small models' mass outside, which is exact if no mass is outside. On prompts of the embedded trio, with
    128 candidates of each model and no widening, the mean error was 0.0008 nats, and 0.1 nats without the scaling. If
    the candidates hold all of a small model's mass or more, as events of another vocabulary may, the factor of the
    candidates with the lowest guider logits is used instead.
    """
    _combine(rule, logits, row, count, sums, alpha, combined)
    if rule == ALONE:
        return sums[0, row]
    target, guider = logits[0, row], logits[1, row]
    of_guider = _uncovered(guider, count, sums[1, row], 1.0)
    of_base = _uncovered(logits[2, row], count, sums[2, row], 1.0)
    lift = alpha * (_log_uncovered(of_guider, sums[1, row]) - _log_uncovered(of_base, sums[2, row]))
    if min(of_guider, of_base) <= _NOISE:
        lowest = _lift_of_lowest_quarter(target, guider, combined, count, 1.0, np.empty(count))
        if not math.isnan(lowest):
            lift = lowest
    inside = _log_sum(combined, count, 1.0)
    outside = _log_uncovered(_uncovered(target, count, sums[0, row], 1.0), sums[0, row]) + lift
    larger = max(inside, outside)
    return larger + math.log1p(math.exp(min(inside, outside) - larger))


@kernel
def likeliest(logprobs: Any, count: int, most: int, places: Any) -> int:
    """The places [most] of at most so many highest log-probabilities; of equal ones the lowest place is first.

    NaN and -inf are left out. Returns the number of places.
    """
    found = 0
    for place in range(count):
        value = logprobs[place]
        if not value > -np.inf or most == 0 or (found == most and value <= logprobs[places[found - 1]]):
            continue
        at = min(found, most - 1)
        while at > 0 and logprobs[places[at - 1]] < value:
            places[at] = places[at - 1]
            at -= 1
        places[at] = place
        found = min(found + 1, most)
    return found
