from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from actors.engine.attention import AttentionBackend, LayerCall, RaggedBatch, Span
from actors.engine.backends import Gathered, PerSession
from actors.engine.inputs import Batch, Layout


@pytest.mark.parametrize("backend", [PerSession(), Gathered()])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_the_formula(
    backend: AttentionBackend, window: int | None, softcap: float | None, sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 65, 2, 8, generator=generator).unbind()
    query = torch.randn(8, 4, 8, generator=generator)
    sink = torch.randn(4, generator=generator) if sinks else None
    spans = (Span(0, 3, 32, 10), Span(3, 1, 0, 1), Span(4, 3, 16, 3))  # and one token of padding
    layout = Layout(8, 0, 3, 3, 10)
    flat = torch.tensor(layout.flatten(Batch([0] * 7, [0] * 7, [64] * 7, spans, []), 64))
    step = RaggedBatch(spans, 8, layout.read(flat).write, partial(layout.read_varlen, flat))
    out = backend.attend(step, query, keys, values, LayerCall(0.3, window, softcap, sink))
    assert out.shape == (8, 4, 8)
    assert torch.count_nonzero(out[7]) == 0
    for span in spans:
        for i in range(span.count):
            position = span.length - span.count + i
            low = 0 if window is None else max(0, position - window + 1)
            rows = slice(span.start + low, span.start + position + 1)
            for head in range(4):
                scores = keys[rows, head // 2] @ query[span.first + i, head] * 0.3
                scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
                scores = scores if sink is None else torch.cat([scores, sink[head, None]])
                weights = F.softmax(scores, dim=0)[: position + 1 - low]
                expected = weights @ values[rows, head // 2]
                torch.testing.assert_close(out[span.first + i, head], expected, rtol=1e-4, atol=1e-5)
