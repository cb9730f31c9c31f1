"""The memory that a model takes on a GPU beside its weights and its cache: arithmetic, without torch.

`cache_tokens: auto` gives the cache what is left of the role's share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from actors.engine.errors import LoadError
from actors.engine.sizing import hidden_widths, row_width

GIB = 1 << 30
MAX_ROWS = 4_096  # rows held for look-ups
MIN_ROWS = 256  # for rows of any width, so that one extend can request so many
ROWS_PER_SESSION = 32  # a session with drafts holds 9; the rest is rows of forwards that others still hold in part
REDUCED_ROWS = 64  # reduced to top-k slices at once
TOP_K_BYTES = 32  # per logit that is reduced: keys of 64 bits, their parts and the selection
CONTEXT_BYTES = 3 << 28  # of a process on a GPU: CUDA's context, kernels, and work spaces of libraries
GRAPH_BYTES, GRAPHS = 4 << 20, 64  # of one captured graph beside its tensors; graphs that are kept
GRAPH_TOKENS = 512  # of the largest graph: 64 sessions that check 8 tokens each
CHECK_TOKENS = 8  # of a session in a step, at most, if it reads no prompt
USABLE = 0.98  # of a GPU's memory; the rest is lost between blocks
HOST_SHARE = 1 / 8  # of a machine's memory, for the cache of one role on a CPU
UNIT = 32  # tokens that caches are counted in
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes, or "max"


@dataclass(frozen=True, slots=True)
class AutoCache:
    """`cache_tokens: auto` of a role, and the work that its memory must have room for."""

    share: float  # of its GPU's memory, 1 for all of it; on a CPU it is of no account
    sessions: int  # that are decoded together
    longest: int  # tokens of the longest session, which the cache must hold
    chunk: int  # tokens of prompts in one step

    @property
    def least(self) -> int:
        """Tokens of the longest session in whole units."""
        return -(-self.longest // UNIT) * UNIT

    @property
    def most(self) -> int:
        """Tokens of all sessions together: a larger cache would stay empty."""
        return self.sessions * self.least

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step: prompts, and a check of drafts of every session."""
        return self.chunk + CHECK_TOKENS * self.sessions


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that a process on a GPU takes beside weights and cache."""

    context: int
    rows: int  # held for look-ups
    top_k: int  # of the largest reduction
    graphs: int
    step: int  # activations of the largest step

    @property
    def total(self) -> int:
        """Their sum in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """Such as: 0.75 context + 0.23 rows + 0.07 top_k + 0.80 graphs + 0.40 step = 2.25 GiB."""
        parts = [f"{getattr(self, field.name) / GIB:.2f} {field.name}" for field in fields(self)]
        return f"{' + '.join(parts)} = {self.total / GIB:.2f} GiB"


def host_bytes() -> int:
    """Bytes of this machine's memory, or of its container's limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text().strip() if _LIMIT.exists() else ""
    return min(whole, int(limit)) if limit.isdecimal() else whole


def held_rows(sessions: int) -> int:
    """Rows that are held for look-ups where so many sessions are decoded together."""
    return max(MIN_ROWS, min(MAX_ROWS, ROWS_PER_SESSION * sessions))


def reserve(width: int, rows: int, auto: AutoCache, step: int, *, graphs: bool) -> Reserve:
    """The reserve of a model with rows of `width` logits, of which `rows` are held. step: bytes of the largest step.

    A captured step takes the bytes of its share of `step`, and its logits twice: in the graph's memory, and in the
    outputs that graphs of all sizes up to the largest share.
    """
    captured = min(GRAPH_TOKENS, CHECK_TOKENS * _power_of_two(auto.sessions))
    own = GRAPHS * GRAPH_BYTES + 3 * 4 * width * captured + step * captured // max(auto.step_tokens, captured)
    return Reserve(
        context=CONTEXT_BYTES,
        rows=4 * width * rows,
        top_k=TOP_K_BYTES * width * min(rows, REDUCED_ROWS),
        graphs=own if graphs else 0,
        step=step,
    )


def estimated_reserve(config: Mapping[str, Any], auto: AutoCache) -> Reserve:
    """The reserve of a model in 16 bit with CUDA graphs, from its config.json: nothing is loaded or measured.

    The largest step takes the gate, the other half and their product of one layer, and a few hidden states.
    """
    hidden, inner = hidden_widths(config)
    step = 2 * auto.step_tokens * (3 * inner + 6 * hidden)
    return reserve(row_width(config), held_rows(auto.sessions), auto, step, graphs=True)


def host_tokens(name: str, token_bytes: int, auto: AutoCache) -> int:
    """Tokens of cache of a role on a CPU: those that fit its share of the machine, whatever else is in memory.

    Raises LoadError for a model called `name` if the longest session does not fit.
    """
    whole = host_bytes()
    why = f"{HOST_SHARE:g} of the {whole / GIB:.2f} GiB of this machine"
    return fitting_tokens(name, int(HOST_SHARE * whole), token_bytes, auto, why)


def fitting_tokens(name: str, left: int, token_bytes: int, auto: AutoCache, why: str) -> int:
    """Tokens of cache that fit `left` bytes, in whole units, at most `auto.most`.

    Raises LoadError for a model called `name` if the longest session does not fit. why: where the bytes come from.
    """
    tokens = max(0, min(left // token_bytes, auto.most)) // UNIT * UNIT
    if tokens < auto.longest:
        needed = f"{auto.longest:,} tokens, a session's, take {auto.longest * token_bytes / GIB:.2f} GiB"
        lower = f"Set max_position: to at most {tokens:,}, or g" if tokens else "G"
        out = f"{lower}ive the role more memory (on a GPU by num_gpus), or set cache_tokens: to a number."
        raise LoadError(name, f"cache_tokens: auto: {needed}, and {left / GIB:.2f} GiB are left ({why})", out)
    return tokens


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
