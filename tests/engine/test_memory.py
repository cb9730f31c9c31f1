"""The memory of a role on a GPU beside weights and cache, and the cache that it leaves."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.engine import memory
from actors.engine.errors import LoadError
from actors.engine.graphs import MAX_Q, MAX_SEQUENCES
from actors.engine.memory import (
    GIB,
    GRAPH_TOKENS,
    MAX_ROWS,
    MIN_ROWS,
    TOP_K_BYTES,
    AutoCache,
    estimated_reserve,
    fitting_tokens,
    held_rows,
    host_bytes,
    host_tokens,
    reserve,
)
from actors.engine.rows import top_k_on_device
from tests.support.published_trio import CONFIGS

AUTO = AutoCache(share=0.5, sessions=4, longest=100, chunk=64)


class LargestSum(TorchDispatchMode):
    """The most bytes that tensors made by operations have together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]:
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def test_tensors_of_a_reduction_take_at_most_the_counted_bytes_a_logit() -> None:
    logits = torch.randn(4, 20_000)
    with LargestSum() as watch:
        top_k_on_device(logits, 16)
    assert 0.7 * TOP_K_BYTES < watch.peak / logits.numel() <= TOP_K_BYTES


def test_the_largest_graph_is_the_largest_bucket() -> None:
    assert GRAPH_TOKENS == MAX_SEQUENCES * MAX_Q[-1]


def test_rows_are_held_by_sessions_within_bounds() -> None:
    assert [held_rows(sessions) for sessions in (1, 64, 1_000)] == [MIN_ROWS, 2_048, MAX_ROWS]


def test_every_part_of_the_reserve_grows_with_the_sessions_but_the_context() -> None:
    few, many = (estimated_reserve(CONFIGS["target"], AutoCache(1.0, n, 4_096, 2_048)) for n in (8, 64))
    assert few.context == many.context
    assert few.top_k == many.top_k  # a reduction has a limit of its own
    assert all(getattr(few, part) < getattr(many, part) for part in ("rows", "graphs", "step"))


def test_without_graphs_their_part_is_nothing() -> None:
    parts = [reserve(1_000, 256, AUTO, 1 << 20, graphs=graphs) for graphs in (True, False)]
    assert parts[0].total - parts[1].total == parts[0].graphs > 0 == parts[1].graphs


def test_a_cache_fills_what_is_left_in_whole_units_up_to_all_sessions() -> None:
    assert fitting_tokens("m", 1_000 * 255, 1_000, AUTO, "") == 224
    assert fitting_tokens("m", 1_000 * 100_000, 1_000, AUTO, "") == AUTO.most == 4 * 128


@pytest.mark.parametrize(
    ("left", "remedy"),
    [(GIB // 2, "Set max_position: to at most 64, or give"), (-GIB, "Give the role more memory")],
)
def test_a_session_that_does_not_fit_is_refused_with_figures_in_gib(left: int, remedy: str) -> None:
    with pytest.raises(LoadError) as refused:
        fitting_tokens("some/model", left, GIB // 128, AUTO, "1.00 GiB of 2.00")
    needed = f"100 tokens, a session's, take 0.78 GiB, and {left / GIB:.2f} GiB are left (1.00 GiB of 2.00)"
    assert needed in str(refused.value)
    assert remedy in str(refused.value)


def test_on_a_cpu_a_cache_takes_an_eighth_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 8 * 256 * 1_000)
    assert host_tokens("m", 1_000, AUTO) == 256
    with pytest.raises(LoadError, match=r"0\.125 of the .* GiB of this machine"):
        host_tokens("m", 10_000, AUTO)


def test_a_containers_limit_is_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMIT", limit)
    whole = host_bytes()
    limit.write_text("max\n")
    assert host_bytes() == whole
    limit.write_text("1000000\n")
    assert host_bytes() == 1_000_000
