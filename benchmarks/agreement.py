"""Models of any shape that agree with a given probability, at their full cost.

The output projections of every layer are zero: attention and the feed-forward part are computed, and add nothing. What
remains is a map from a token to the row of the next one, through embedding, norm and head, and these are shared: one
table of random directions x_t of the small models' width, padded with zeros for the target. With k one long cycle
through the vocabulary, the head's row of token k(t) is x_t, so that a row peaks at k(t): the target's, and with it the
combined one, always. The guider reads a share 1 - agreement of the tokens as others, and there peaks elsewhere. The
guider base has directions of its own: its rows are noise around zero. Norm weights scale each row to its peak,
whatever the hidden size. At temperature 0 and 1, guider and combined choice agree with probability `agreement`, and
no text repeats itself before the whole vocabulary has passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Qwen2Config

from actors.api.generation import Role
from actors.engine.dummy import dummy_model
from benchmarks.shapes import POSITIONS, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of a peak. The target's must stay above the guider's by more than the noise of both, whose deviation is about
# peak / sqrt(hidden size of the small models).
PEAKS: dict[Role, float] = {"target": 40.0, "guider": 20.0, "guider_base": 12.0}
_TABLE_SEED, _NOISE_SEED, _ORDER_SEED, _CHOICE_SEED = 1, 2, 3, 4


def agreeing_model(shape: Shape, role: Role, agreement: float) -> PreTrainedModel:
    """One role's model on the shape's device; `agreement` in [0, 1]."""
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement is {agreement}, a probability was expected")
    sizes, small = shape.sizes(role), shape.small
    assert sizes is not None
    assert small is not None
    # Tied, a token could only be followed by itself.
    config = Qwen2Config(**sizes, max_position_embeddings=POSITIONS, tie_word_embeddings=False)
    model = dummy_model(config, shape.device, shape.dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(PEAKS[role] / sizes["hidden_size"] ** 0.5)
        _share(model, role, agreement, shape.common, small["hidden_size"])
    return model.eval()


def _share(model: PreTrainedModel, role: Role, agreement: float, count: int, width: int) -> None:
    """Fill embedding and head of `count` tokens from the shared table of `width` columns."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table = _directions(count, width, _TABLE_SEED, embedding)
    order = _shuffled(count, _ORDER_SEED).to(embedding.device)  # all tokens as the cycle visits them
    read = torch.arange(count, device=embedding.device)  # as which token each is read
    if role == "guider":
        others = _shuffled(count, _CHOICE_SEED)[: round((1 - agreement) * count)].to(embedding.device)
        read[order[others]] = order.roll(-(count // 2))[others]
    heard = _directions(count, width, _NOISE_SEED, embedding) if role == "guider_base" else table[read]
    embedding.zero_()
    embedding[:count, :width] = (heard * width**0.5).to(embedding.dtype)
    head.zero_()
    head[order.roll(-1), :width] = table[order].to(head.dtype)


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _directions(count: int, width: int, seed: int, like: Tensor) -> Tensor:
    """Random unit vectors [count, width], float32, the same in every process with the same kind of device."""
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.randn(count, width, generator=generator, device=like.device)
    return torch.nn.functional.normalize(drawn, dim=1)
