"""Compiles every kernel, or loads it from the cache, before a process is ready.

    python -m actors.decoding.warmup

The command fills the cache: in an image, and before tests that start many processes at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from actors.api.generation import ROLES, Role
from actors.api.sampling_params import Sampling
from actors.decoding.candidates import CandidateBlock, RowProposal, RowSlice
from actors.decoding.compiling import cache_folder, cache_misses, check_processor
from actors.decoding.decision import RowSamplingSpec, choose, decide
from actors.decoding.penalties import adjustments
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS


@cache
def compile_kernels() -> None:
    """Call every kernel once, with the types that decoding gives it. Takes half a minute if nothing is cached.

    Raises UnsupportedProcessor.
    """
    check_processor()
    ids, logits, nothing = np.array([0, 2, 3]), np.array([2.0, 1.0, 0.5], np.float32), np.zeros(0)
    part, empty = RowSlice(ids, logits, nothing, 3.0, 3.0), RowSlice(ids[:0], logits[:0], nothing, 3.0)
    slices: dict[Role, RowSlice] = {"target": part, "guider": part, "guider_base": empty}
    sampling = Sampling(temperature=0.5, top_p=0.9, logit_bias=((2, 1.0),))
    spec = RowSamplingSpec(1.0, sampling, 1, 1, adjustments(sampling, (), {}), top=2)
    for roles in (ROLES, ROLES[:1]):
        required = dict.fromkeys(roles, NO_REQUIRED_LOGITS)
        block = CandidateBlock([RowProposal(required, {role: slices[role] for role in roles})])
        rows, places, _ = block.missing_logits(roles[-1], np.arange(4))
        block.fill(roles[-1], rows, places, np.ones(len(rows), np.float32))
        decide(block, [0], [spec], "target", guided=len(roles) > 1)
    choose(ids[None], logits[None].astype(np.float64), [sampling], [1], [1])


if __name__ == "__main__":
    compile_kernels()
    print(f"{cache_misses()} kernels compiled, the others were in {cache_folder()}")
