"""The guided distribution on events, and the stored slices of target and guider base."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.jobs.dpo.event_logprobs import Slices, guided_log_probs, log_events, others

ALPHA, ROWS, VOCABULARY = 0.7, 6, 40


def logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(9))


def fixed(target: torch.Tensor, base: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return log_events(target, ids) - ALPHA * log_events(base, ids)


def test_events_of_all_tokens_give_the_guided_distribution() -> None:
    target, guider, base = logits(1), logits(2), logits(3)
    ids = others(target, tokens(), VOCABULARY - 1)
    found = guided_log_probs(log_events(guider, ids), fixed(target, base, ids), ALPHA)
    whole = (target + ALPHA * (guider - base)).log_softmax(-1)
    torch.testing.assert_close(found[:, :-1], whole.gather(-1, ids), atol=1e-4, rtol=0)


def test_events_are_the_own_token_then_the_targets_likeliest_others() -> None:
    target, own = logits(1), tokens()
    ids = others(target, own, 5)
    assert ids[:, 0].tolist() == own.tolist()
    for row, token, found in zip(target, own.tolist(), ids[:, 1:].tolist(), strict=True):
        assert found == [each for each in row.argsort(descending=True).tolist() if each != token][:5]


def test_remaining_tokens_are_one_event_with_the_ratio_of_their_masses() -> None:
    target, guider, base = logits(1), logits(2), logits(3)
    ids = others(target, tokens(), 5)
    found = guided_log_probs(log_events(guider, ids), fixed(target, base, ids), ALPHA)

    def masses(rows: torch.Tensor) -> torch.Tensor:
        inside = rows.softmax(-1).gather(-1, ids)
        return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1)

    weights = masses(target) * (masses(guider) / masses(base)) ** ALPHA
    torch.testing.assert_close(found.exp(), weights / weights.sum(-1, keepdim=True))


def test_a_guider_equal_to_its_base_leaves_the_target_alone() -> None:
    target, base = logits(1), logits(3)
    ids = others(target, tokens(), 5)
    found = guided_log_probs(log_events(base, ids), fixed(target, base, ids), ALPHA)
    torch.testing.assert_close(found, log_events(target, ids))


def test_the_gradient_of_events_raises_the_guiders_own_token() -> None:
    target, base = logits(1), logits(3)
    guider = logits(2).requires_grad_()
    ids = others(target, tokens(), 5)
    own = guided_log_probs(log_events(guider, ids), fixed(target, base, ids), ALPHA)[:, 0]
    (gradient,) = torch.autograd.grad(own.sum(), guider)
    assert (gradient[torch.arange(ROWS), ids[:, 0]] > 0).all(), "raising the token's logit raises its probability"


def test_packed_slices_round_trip_and_another_width_is_refused() -> None:
    draw = np.random.default_rng(0)
    kept = Slices(draw.integers(9_000, size=(7, 4)), draw.normal(size=(7, 5)))
    back = Slices.unpack(kept.pack(), 3)
    assert (back.ids == kept.ids).all()
    np.testing.assert_allclose(back.fixed, kept.fixed, rtol=1e-3)
    with pytest.raises(ValueError, match="width 4"):
        Slices.unpack(kept.pack(), 4)
