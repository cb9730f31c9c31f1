"""Compiles every kernel, or loads it from the cache, before a process is ready.

    python -m actors.warmup

The command fills the cache: in an image, and before tests that start many processes at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from actors.api.generation import ROLES
from actors.api.sampling_params import Sampling
from actors.decoding.candidates import Answered, BlockLayout, CandidateBlock, ReceivedColumns, Stages
from actors.decoding.compiling import cache_folder, cache_misses, check_processor
from actors.decoding.decision import choose, decide, spec_columns
from actors.decoding.kernels import ALL, ALONE, GUIDED, SESSION, SentRows, ask, locate_rows, scan_rows, split_ids
from actors.decoding.penalties import adjustments
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS
from actors.wire.messages import LOOKUP_ITEM, ROWS_ITEM


@cache
def compile_kernels() -> None:
    """Call every kernel once, with the types that decoding gives it. Takes half a minute if nothing is cached.

    Raises UnsupportedProcessor.
    """
    check_processor()
    at, ids, logits = np.array([0]), np.array([[0, 2, 3]]), np.array([[2.0, 1.0, 0.5]])
    sampling = Sampling(temperature=0.5, top_p=0.9, logit_bias=((2, 1.0),))
    extra = adjustments(sampling, (), {})
    for roles in (ROLES, ROLES[:1]):
        block = CandidateBlock(1, BlockLayout(dict.fromkeys(roles, NO_REQUIRED_LOGITS), dict.fromkeys(roles, 3)))
        for role in roles:
            block.store(role, at, ids, logits, np.zeros((1, 0)), np.full(1, 3.0), np.full(1, 3.0))
        block.merge(at)
        rows, counts, places, _ = block.missing_logits(roles[-1], at, np.arange(4))
        block.fill(roles[-1], rows, counts, places, np.ones(len(places), np.float32))
        rule = GUIDED if len(roles) > 1 else ALONE
        decide(block, at, spec_columns([(rule, 1.0, sampling, 1, 1)]), [extra], [(2, 1)])
    stage, arrived, lookups = np.zeros(1, np.uint8), np.zeros(1, np.uint8), np.zeros((1, 1), np.int32)
    one, low = np.zeros(1, np.float32), np.zeros(1, np.uint16)
    items, starts = np.array([(1, 1, 1, 0)], ROWS_ITEM), np.empty((1, 4), np.int64)
    sent = SentRows(starts, low, low[:0], 0, one, one.copy(), one.copy(), one[:0])
    for column in (items, sent.low, sent.page_counts, sent.logits, sent.logsumexp, sent.tempered, sent.required):
        column.flags.writeable = False  # as those of messages
    assert locate_rows(items, 4, 0, (1, 0, 1, 1, 1, 0), at.copy(), starts)
    block.store_rows(ROLES[0], at, sent, at, ALL, np.arange(4), np.ones(1))
    answered, received = Answered(at, at, at, at + 1), ReceivedColumns(sent, items, at.copy())
    block.store_answers(ROLES[0], received, answered, 1, np.arange(4), np.ones(1), Stages(stage, arrived))
    scan_rows(stage, arrived, lookups, 1, 1, at.copy(), at.copy())
    hashes, asked = np.zeros(1, np.uint64), np.empty(1, LOOKUP_ITEM)
    ask(asked, 1, np.zeros(1, SESSION), hashes, at, at, at + 1)
    choose(ids, logits, [sampling], [1], [1])
    for names in (ids[0], ids[0].astype(np.int32)):
        split_ids(names, np.array([3]), 1, np.empty(3, np.uint16), np.zeros(1, np.uint16))


if __name__ == "__main__":
    compile_kernels()
    print(f"{cache_misses()} kernels compiled, the others were in {cache_folder()}")
