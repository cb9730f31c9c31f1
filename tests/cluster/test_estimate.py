"""The arithmetic of memory and disk, compared with published models."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from actors.config import load_config
from actors.engine.memory import Reserve
from cluster.check_report import costs_table
from cluster.estimate import Estimate, disk_findings, memory_findings, size
from cluster.serve_file import read_service_config
from tests.support.local_ray import ROOT
from tests.support.published_trio import H100, H200, memory_rows, published_estimates

GB = 10**9
TARGET = Estimate(
    role="target",
    path="Qwen/Qwen2.5-32B",
    here=True,
    weights_bytes=65_500_000_000,
    dtype="bfloat16",
    cache_token_bytes=262_144,
    cache_tokens=100_000,
    position_limit=131_072,
    gpus=1.0,
    reserve=Reserve(context=1 * GB, rows=1 * GB, top_k=GB // 2, graphs=1 * GB, step=GB // 2),
)


def test_a_role_that_fits_its_share_yields_no_finding() -> None:
    assert memory_findings([TARGET], [141 * GB]) == []


def test_an_oversized_role_is_shown_the_arithmetic_and_a_fitting_cache() -> None:
    (finding,) = memory_findings([TARGET], [80 * GB])
    assert finding.severity == "error"
    fitting = TARGET.fitting_tokens(80 * GB)
    assert "65.5 GB of weights and 100,000 tokens x 262.1 kB = 26.2 GB of cache" in finding.message
    assert f"lower cache_tokens to {fitting:,}" in finding.message
    assert memory_findings([replace(TARGET, cache_tokens=fitting)], [80 * GB]) == []


def test_weights_larger_than_the_share_need_more_gpus() -> None:
    (finding,) = memory_findings([replace(TARGET, gpus=0.5)], [80 * GB])
    assert "raise its num_gpus" in finding.message
    assert "lower cache_tokens" not in finding.message


def test_ranks_share_weights_and_cache() -> None:
    assert memory_findings([replace(TARGET, ranks=2)], [80 * GB]) == []
    (finding,) = memory_findings([replace(TARGET, ranks=2)], [40 * GB])
    assert f"70.4 GB (2 x 1 x 40.0 GB x 0.98, less {TARGET.reserve})" in finding.message


def test_a_measured_cache_must_hold_the_longest_session() -> None:
    measured = replace(TARGET, measured=True, cache_tokens=TARGET.position_limit)
    (finding,) = memory_findings([measured], [80 * GB])
    assert f"lower max_position to {measured.fitting_tokens(80 * GB):,}" in finding.message
    table = Console(width=200, file=io.StringIO(), record=True)
    table.print(costs_table([measured]))
    assert "auto, at least 131,072 tokens, 34.4 GB" in table.export_text()


def test_the_reserve_is_taken_from_every_rank() -> None:
    assert TARGET.room(80 * GB) == int(78.4 * GB) - TARGET.reserve.total
    assert replace(TARGET, ranks=2).room(80 * GB) == 2 * TARGET.room(80 * GB)


def test_without_gpus_memory_yields_no_finding() -> None:
    assert memory_findings([TARGET], []) == []
    assert memory_findings([replace(TARGET, gpus=0)], [8 * GB]) == []


def test_missing_weights_are_reported_with_the_download_command() -> None:
    (finding,) = disk_findings([replace(TARGET, here=False)], free=100 * GB)
    assert finding.severity == "warning"
    assert "hf download Qwen/Qwen2.5-32B" in finding.message


def test_a_disk_too_small_for_missing_weights_is_an_error() -> None:
    found = disk_findings([replace(TARGET, here=False)], free=10 * GB)
    assert [finding.severity for finding in found] == ["warning", "error"]
    assert "65.5 GB must be downloaded and 10.0 GB are free" in found[1].message


def test_sizes_are_shown_in_powers_of_ten() -> None:
    assert [size(n) for n in (384, 262_144, 2_800_000, 65_500_000_000)] == ["384 B", "262.1 kB", "2.8 MB", "65.5 GB"]


@pytest.mark.parametrize(("gigabytes", "gpu"), [(80, H100), (141, H200)])
def test_the_tables_of_the_published_trio_are_what_the_check_computes(gigabytes: int, gpu: int, tmp_path: Path) -> None:
    file = ROOT / "cluster" / "jobs" / "configs" / "services" / f"qwen32b_one_{gigabytes}gb.yaml"
    estimates = published_estimates(read_service_config(file), tmp_path)
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert "\n".join(memory_rows(estimates, gpu)) in page
    assert memory_findings([*estimates.values()], [gpu]) == []
    assert sum(costs.gpus for costs in estimates.values()) <= 1


def test_the_trio_of_the_readme_fits_its_gpu(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(args:.*?)```", text, re.DOTALL)
    estimates = published_estimates(load_config(yaml.safe_load(block)["args"]), tmp_path)
    assert memory_findings([*estimates.values()], [H200]) == []
