"""Prints the findings of `cluster.check` as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from huggingface_hub.constants import HF_HUB_CACHE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.preflight import Finding
from cluster.estimate import Estimate, free_disk, size

CONTEXTS = (2_048, 8_192, 32_768)  # tokens of one session; the tables count the sessions of each length that fit
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def show(console: Console, estimates: Sequence[Estimate], gpus: Sequence[int], found: Sequence[Finding]) -> None:
    """Print the costs, the cache folder and every finding."""
    console.print(costs_table(estimates))
    if gpus:
        console.print(f"GPUs of this machine: {', '.join(size(gpu) for gpu in gpus)}")
        console.print(fit_table(estimates, min(gpus)))
    console.print(f"Hub cache: {HF_HUB_CACHE}, {size(free_disk())} free", highlight=False, soft_wrap=True)
    show_findings(console, found)


def show_findings(console: Console, found: Sequence[Finding]) -> None:
    """Print one line for each finding."""
    for finding in found:
        text = f"[{_STYLES[finding.severity]}]{finding.severity}[/] {finding.role}: {escape(finding.message)}"
        console.print(text, highlight=False, soft_wrap=True)


def costs_table(estimates: Sequence[Estimate]) -> Table:
    """For each role: weights, dtype, cache, positions, and the sessions that the cache holds at least."""
    table = Table()
    table.add_column("")
    for costs in estimates:
        table.add_column(costs.role)
    rows: dict[str, Callable[[Estimate], str]] = {
        "model": lambda costs: escape(costs.path),
        "weights": lambda costs: size(costs.weights_bytes) + ("" if costs.here else " (not here)"),
        "dtype": lambda costs: costs.dtype,
        "cache per token": lambda costs: size(costs.cache_token_bytes),
        "cache": _cache,
        "beside, on a GPU": lambda costs: size(costs.reserve.total),
        "positions": lambda costs: f"{costs.position_limit:,}",
        "GPUs": lambda costs: costs.share,
        "sessions x context": lambda costs: _sessions(costs.cache_tokens, costs.position_limit),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(costs) for costs in estimates))
    return table


def fit_table(estimates: Sequence[Estimate], gpu: int) -> Table:
    """For each role on a GPU: the sessions x context that fit its share of GPUs of `gpu` bytes each."""
    table = Table(title=f"Room on GPUs of {size(gpu)}", title_justify="left")
    for name in ("role", "share", "cache tokens that fit", "sessions x context"):
        table.add_column(name)
    for costs in estimates:
        if costs.gpus:
            tokens = costs.fitting_tokens(gpu)
            table.add_row(costs.role, costs.share, f"{tokens:,}", _sessions(tokens, costs.position_limit))
    return table


def _cache(costs: Estimate) -> str:
    least = "auto, at least " if costs.measured else ""
    return f"{least}{costs.cache_tokens:,} tokens, {size(costs.cache_bytes)}"


def _sessions(tokens: int, limit: int) -> str:
    contexts = sorted({min(context, limit) for context in CONTEXTS})
    return "\n".join(f"{tokens // context:,} x {context:,}" for context in contexts)
