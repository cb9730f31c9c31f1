"""Measures how large the cache of a loaded model can be: `cache_tokens: auto` on the native engine."""

from __future__ import annotations

import logging

import torch

from actors.engine.attention import Span
from actors.engine.inputs import Batch
from actors.engine.memory import CHECK_TOKENS, CONTEXT_BYTES, GIB, UNIT, USABLE, AutoCache, fitting_tokens, host_tokens
from actors.engine.memory import reserve as reserve_of
from actors.engine.native_runner import NativeRunner

log = logging.getLogger(__name__)


def fit_cache(runner: NativeRunner, auto: AutoCache, rows: int, name: str) -> None:
    """Give a runner without sessions, whose cache holds the longest session, as large a cache as fits.

    rows: that are held for look-ups. Raises LoadError for the model called `name` if the longest session does not fit.
    """
    on_gpu = runner.device.type == "cuda"
    tokens = _gpu_tokens(runner, auto, rows, name) if on_gpu else host_tokens(name, runner.cache.token_bytes, auto)
    runner.resize(tokens)
    taken = tokens * runner.cache.token_bytes / GIB
    log.info("%s: cache_tokens: auto: %d tokens, %.2f GiB", name, tokens, taken)


def _gpu_tokens(runner: NativeRunner, auto: AutoCache, rows: int, name: str) -> int:
    device, token_bytes = runner.device, runner.cache.token_bytes
    step, graphs = _step_bytes(runner, auto, rows), runner.graphs is not None
    runner.cache.resize(UNIT)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    held, share = torch.cuda.memory_reserved(device), int(auto.share * USABLE * total)
    reserve = reserve_of(runner.width, rows, auto, step, graphs=graphs)
    room = min(share - held, free + CONTEXT_BYTES)  # the context is held already, and is in the reserve
    why = f"{share / GIB:.2f} GiB of {total / GIB:.2f}, {held / GIB:.2f} of weights, {free / GIB:.2f} free; {reserve}"
    log.info("%s: %s", name, why)
    return fitting_tokens(name, room - reserve.total, token_bytes, auto, why)


def _step_bytes(runner: NativeRunner, auto: AutoCache, rows: int) -> int:
    """Bytes that the largest step takes at its peak, without its logits."""
    batch = largest_step(auto, runner.cache.trash, rows)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    logits = runner.run(batch)
    return torch.cuda.max_memory_allocated(runner.device) - before - logits.nbytes


def largest_step(auto: AutoCache, trash: int, rows: int) -> Batch:
    """A chunk of a prompt at the end of the longest session, beside checks of drafts of all others, of shorter ones.

    All attend to the same rows of the pool, and are written to `trash`. rows: most that a step keeps.
    """
    chunk, check = min(auto.chunk, auto.longest), min(CHECK_TOKENS, auto.longest)
    short = max(check, auto.longest // auto.sessions)
    spans = [Span(0, chunk, 0, auto.longest)]
    spans += [Span(chunk + at * check, check, 0, short) for at in range(auto.sessions - 1)]
    positions = [position for span in spans for position in range(span.length - span.count, span.length)]
    count = len(positions)
    keep = range(max(chunk - 1, count - rows), count)
    return Batch([0] * count, positions, [trash] * count, spans, keep)
