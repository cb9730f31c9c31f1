import pytest
import torch
from torch import nn

from actors.engine.batch_invariant import TILE, BatchInvariantLinear


@pytest.mark.parametrize(("wide", "out"), [(256, 128), (128, 384), (48, 2048)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_rows_bits_are_the_same_in_any_batch(wide: int, out: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(wide, out, bias=bias)
    tiled, x = BatchInvariantLinear(linear), torch.randn(1, 8 * TILE, wide)
    with torch.inference_mode():
        alone = torch.cat([tiled(part) for part in torch.split(x, TILE, dim=1)], dim=1)
        for rows in range(TILE, 8 * TILE + 1, TILE):
            assert torch.equal(tiled(x[:, :rows]), alone[:, :rows])
        torch.testing.assert_close(alone, linear(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiled(x[:, :3]), linear(x[:, :3]))
