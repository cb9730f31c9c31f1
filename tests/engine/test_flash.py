"""The metadata of the flash back end, tested with an emulation of its operator, which itself needs a GPU."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from actors.engine.attention import LayerCall, RaggedBatch, Span
from actors.engine.backends import Gathered
from actors.engine.flash import FlashAttention, flash_supported
from actors.engine.inputs import Batch, Layout
from tests.support.varlen import emulated_flash

POOL = 400


def ragged(draw: random.Random, sequences: int) -> list[Span]:
    """Spans at odd starts: decoding, verifications and chunks of prompts."""
    spans, first, start = [], 0, draw.randrange(5)
    for _ in range(sequences):
        count = draw.choice([1, 1, 2, 5, 8, 17])
        length = count + draw.choice([0, 1, 13, 30])
        spans.append(Span(first, count, start, length))
        first, start = first + count, start + length + draw.randrange(3)
    assert start <= POOL
    return spans


def step(spans: list[Span], layout: Layout) -> RaggedBatch:
    real = sum(span.count for span in spans)
    numbers = layout.flatten(Batch([1] * real, [0] * real, [0] * real, spans, []), POOL)
    flat = torch.tensor(numbers)
    return RaggedBatch(tuple(spans), layout.tokens, layout.read(flat).write, partial(layout.read_varlen, flat))


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (3, 2), (40, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_batches_are_attended_as_the_gathered_back_end_does(
    seed: int, padding: tuple[int, int], window: int | None
) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    spans = ragged(draw, draw.randint(1, 7))
    batch = Batch([], [], [], spans, [])
    tokens = sum(span.count for span in spans) + padding[0]
    ours = step(spans, Layout(tokens, 0, len(spans) + padding[1], max(batch.max_q, 2), batch.max_k))
    keys, values = torch.randn(2, POOL + 1, 2, 16, generator=generator).unbind()
    query = torch.randn(tokens, 6, 16, generator=generator)
    call = LayerCall(0.3, window, None, None)
    backend = FlashAttention(emulated_flash)
    out = backend.attend(ours, query, keys, values, call)
    assert backend.static
    torch.testing.assert_close(out, Gathered().attend(ours, query, keys, values, call))
    assert torch.count_nonzero(out[tokens - padding[0] :]) == 0


def test_a_padded_decode_bucket_has_one_token_a_sequence() -> None:
    """A kernel with one query for each sequence takes token b as that of sequence b."""
    ours = step([Span(0, 1, 7, 9), Span(1, 1, 32, 1)], Layout(8, 0, 8, 1, 1024))
    varlen = ours.varlen_on(torch.device("cpu"))
    assert varlen.cu_q.tolist() == list(range(9))
    assert varlen.lengths.tolist() == [9, 1, 0, 0, 0, 0, 0, 0]
    assert varlen.padding.tolist() == [False, False] + [True] * 6
    query = torch.randn(8, 2, 8)
    pools = torch.randn(2, POOL + 1, 2, 8)
    out = FlashAttention(emulated_flash).attend(ours, query, pools[0], pools[1], LayerCall(1.0, None, None, None))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("width", "call"),
    [
        (12, LayerCall(1.0, None, None, None)),
        (264, LayerCall(1.0, None, None, None)),
        (16, LayerCall(1.0, None, 5.0, None)),
        (16, LayerCall(1.0, None, None, torch.zeros(2))),
    ],
)
def test_layers_that_the_operator_cannot_do_attend_gathered(width: int, call: LayerCall) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the operator was called")

    backend = FlashAttention(refused)
    ours = step([Span(0, 2, 3, 5)], Layout(2, 0, 1, 2, 5))
    query, pools = torch.randn(2, 2, width), torch.randn(2, POOL + 1, 1, width)
    out = backend.attend(ours, query, pools[0], pools[1], call)
    assert torch.equal(out, Gathered().attend(ours, query, pools[0], pools[1], call))
    assert not backend.static


def test_the_operator_of_this_torch_has_the_arguments_that_are_passed() -> None:
    """A recent torch accepts the call, and fails when it chooses a kernel, because a CPU has none."""
    ours = step([Span(0, 2, 3, 5)], Layout(2, 0, 1, 2, 5))
    query, pools = torch.randn(2, 2, 16), torch.randn(2, POOL + 1, 2, 16)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        FlashAttention().attend(ours, query, pools[0], pools[1], LayerCall(1.0, 3, None, None))


def test_a_cpu_and_float32_are_not_for_it() -> None:
    assert not flash_supported(torch.device("cpu"), torch.bfloat16)
    assert not flash_supported(torch.device("cuda"), torch.float32)
