"""FlashAttention's operator on extents and on pages, reductions of rows, and a graph whose capture fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.engine.graphs import CapturedRunner, CaptureFailed
from actors.engine.inputs import Layout
from actors.engine.rows import top_k, top_k_on_device
from benchmarks.first_gpu.device import CUDA, DEVICE, Say, milliseconds

HEADS, KV_HEADS, HEAD_DIM, SCALE = 40, 8, 128, 128**-0.5  # of Qwen2.5-32B
PAGE, POOL = 256, 4_096  # rows
BYTES_PER_S = 4e12  # about what the memory of an H200 gives
FLASH: Callable[..., Any] = torch.ops.aten._flash_attention_forward


class Sequences(NamedTuple):
    """New tokens, held tokens and the first pool row of each sequence of one call."""

    counts: Sequence[int]
    lengths: Sequence[int]
    starts: Sequence[int]


CASES = {
    "decode": Sequences([1] * 8, [1, 130, 900, 33, 0, 0, 700, 257], [7, 131, 301, 2000, 0, 0, 3001, 2600]),
    "check": Sequences([8, 5, 1, 8], [600, 5, 1, 1500], [3, 1025, 1100, 1200]),
    "mixed": Sequences([600, 1, 17], [900, 77, 17], [5, 1000, 1111]),
}
PAGED = Sequences([8, 1, 8], [1000, 700, 1800], [0, 1024, 2048])  # each begins with a page


def made_up(of: Sequences, rows: int) -> tuple[Tensor, Tensor]:
    """Random queries [T, heads, d] of a call, and keys and values [2, rows, kv_heads, d]."""
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    return torch.randn(sum(of.counts), HEADS, HEAD_DIM, **options), torch.randn(2, rows, KV_HEADS, HEAD_DIM, **options)


def attend(
    query: Tensor,
    pools: Tensor,
    of: Sequences,
    max_k: int,
    *,
    window: int | None = None,
    pages: bool = False,
    operator: Callable[..., Any] = FLASH,
) -> Tensor:
    """The operator, called as `actors.engine.flash` does. pages: by a table of pages."""
    numbers = [0, *accumulate(of.counts)], [*of.starts, 0], of.lengths
    ends, starts, lengths = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in numbers)
    options: dict[str, Any] = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    if pages:
        of_longest = torch.arange(-(-max(of.lengths) // PAGE), dtype=torch.int32, device=DEVICE)
        options["block_table"] = starts[:-1, None] // PAGE + of_longest
        pools = pools.view(2, -1, PAGE, KV_HEADS, HEAD_DIM)
    sizes = max(of.counts), max_k, 0.0, True, False
    output: Tensor = operator(query, *pools, ends, starts, *sizes, scale=SCALE, seqused_k=lengths, **options)[0]
    return output


def error(query: Tensor, pools: Tensor, of: Sequences, output: Tensor, window: int | None = None) -> float:
    """The largest difference of an output from attention in float64, over the tokens of sequences that hold any."""
    worst, ends = 0.0, accumulate(of.counts)
    for end, count, length, start in zip(ends, *of, strict=True):
        if not length:
            continue
        tokens, position = slice(end - count, end), torch.arange(length - count, length, device=DEVICE)[:, None]
        key = torch.arange(length, device=DEVICE)
        seen = (key <= position) & (key > position - (window or length))
        part = pools[:, start : start + length].double().transpose(1, 2)
        keys, values = part.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = query[tokens].double().transpose(0, 1) @ keys.transpose(1, 2) * SCALE
        expected = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)
        worst = max(worst, float((output[tokens].double() - expected).abs().max()))
    return round(worst, 4)


def semantics(say: Say, operator: Callable[..., Any] = FLASH) -> None:
    """Extents, windows, and a `max_k` above the lengths, as a graph has it."""
    errors = {}
    for name, of in CASES.items():
        query, pools = made_up(of, POOL)
        for window in (None, 7, 300):
            for max_k in (max(of.lengths), POOL, 262_144):
                output = attend(query, pools, of, max_k, window=window, operator=operator)
                errors[f"{name}, window {window}, max_k {max_k}"] = error(query, pools, of, output, window)
    worst = max(errors, key=errors.__getitem__)
    say("extents against float64; rounding explains .02", worst=errors[worst], at=worst)


def attention(say: Say) -> None:
    """Semantics, and the time of one layer's attention, by extents and by pages."""
    semantics(say)
    kinds = {"extents": False}
    if "block_table" in str(torch.ops.aten._flash_attention_forward.default._schema):
        kinds["pages"] = True
        query, pools = made_up(PAGED, POOL)
        say("pages against float64", worst=error(query, pools, PAGED, attend(query, pools, PAGED, POOL, pages=True)))
    for sessions, context in ((1, 1_024), (1, 4_096), (1, 16_384), (1, 32_768), (16, 4_096), (64, 4_096)):
        facts = {"floor_ms": round(1e3 * 4 * sessions * context * KV_HEADS * HEAD_DIM / BYTES_PER_S, 3)}
        for count in (1, 8):
            of = Sequences([count] * sessions, [context] * sessions, range(0, sessions * context, context))
            query, pools = made_up(of, sessions * context)
            for kind, pages in kinds.items():
                run = partial(attend, query, pools, of, context, pages=pages)
                facts[f"{count}_by_{kind}_ms"] = milliseconds(run)
        say("attention of one layer", sessions=sessions, context=context, **facts)


def rows(say: Say, width: int = 152_064, counts: Sequence[int] = (1, 8, 64, 512)) -> None:
    """Reductions of rows, the memory that they take, and a capture that fails."""
    for count in counts:
        logits = torch.randn(count, width, device=DEVICE)
        facts: dict[str, Any] = {"equal": all(map(torch.equal, top_k_on_device(logits, 128), top_k(logits, 128)))}
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            top_k_on_device(logits, 128)
            facts["extra_mib"] = (torch.cuda.max_memory_allocated() - before) >> 20
        facts["on_device_ms"] = milliseconds(partial(top_k_on_device, logits, 128))
        facts["topk_ms"] = milliseconds(partial(torch.topk, logits, 128))
        facts["logsumexp_ms"] = milliseconds(partial(torch.logsumexp, logits, -1))
        say("top 128 of rows", rows=count, **facts)
    if CUDA:
        failed_capture(say)


def failed_capture(say: Say) -> None:
    """After a capture that fails, the thread must be on its own stream again."""

    def waits(layout: Layout, flat: Tensor, spans: object) -> Tensor:
        return flat + int(flat.sum())

    before, layout, why = torch.cuda.current_stream(), Layout(1, 1, 1, 1, 1), "nothing"
    try:
        CapturedRunner(waits, DEVICE).run(layout, [0] * layout.size, [])
    except CaptureFailed as failed:
        why = str(failed)[:120]
    say("a capture that waits for the device", raised=why, same_stream=torch.cuda.current_stream() == before)
