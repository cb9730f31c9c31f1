"""Compiles every kernel, or loads it from the cache, before a process is ready.

    python -m actors.decoding.warmup

The command fills the cache: in an image, and before tests that start many processes at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from actors.api.generation import ROLES
from actors.api.sampling_params import Sampling
from actors.decoding.candidates import BlockLayout, CandidateBlock
from actors.decoding.compiling import cache_folder, cache_misses, check_processor
from actors.decoding.decision import choose, decide, spec_columns
from actors.decoding.kernels import ALL, ALONE, GUIDED, SentRows, locate_rows, split_ids
from actors.decoding.penalties import adjustments
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS


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
    rows, none = np.array([1], np.int32), np.zeros(0, np.float32)
    starts = np.empty((1, 4), np.int64)
    locate_rows(rows, rows, 0 * rows, 4, starts)
    one, two, three = np.zeros((3, 1), np.float32)
    sent = SentRows(starts, np.zeros(1, np.uint16), np.zeros(0, np.uint16), 0, one, two, three, none)
    for column in (sent.low, sent.page_counts, sent.logits, sent.logsumexp, sent.tempered, sent.required):
        column.flags.writeable = False  # as those of messages
    block.store_rows(ROLES[0], at, sent, at, ALL, np.arange(4), np.ones(1))
    choose(ids, logits, [sampling], [1], [1])
    for names in (ids[0], ids[0].astype(np.int32)):
        split_ids(names, np.array([3]), 1, np.empty(3, np.uint16), np.zeros(1, np.uint16))


if __name__ == "__main__":
    compile_kernels()
    print(f"{cache_misses()} kernels compiled, the others were in {cache_folder()}")
