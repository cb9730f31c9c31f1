"""What a report says in words and tables, alike on the page and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from actors.api.generation import ROLES
from cluster.jobs.statistics import Interval
from cluster.jobs.summary import AVERAGE, Score, Summary

SURE = 0.05  # p below which a difference counts as shown
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells; the first two columns name, the others are figures. notes: sentences below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(summary: Summary) -> list[Table]:
    """All of a report's, in their order."""
    found = [accuracy(summary), several(summary), costs(summary), behaviour(summary)]
    return [table for table in found if len(table.header) > 2]  # one answer a problem: there are no several


def accuracy(summary: Summary) -> Table:
    """pass@1 with its interval, what that is against the target, and how surely."""
    columns: dict[str, Callable[[Score], str]] = {
        "pass@1 [95 %]": lambda score: _rate_interval(score.pass_at_1),
        "gain over target [95 %]": lambda score: gain(score.gain),
        "points [95 %]": lambda score: _points(score.difference),
        "p": lambda score: UNKNOWN if score.p is None else p_value(score.p),
    }
    notes = [
        "Intervals: bootstrap over problems, paired with the target for gain and points. Gain is relative, and of "
        "averages. p: paired permutation test over problems, two-sided, adjusted (Holm) for all guided settings.",
    ]
    return _table(summary, "Right answers, in %", columns, notes)


def several(summary: Summary) -> Table:
    """pass@k and maj@k for every k that all problems of a task have samples for."""
    ks = sorted({k for scores in summary.scores.values() for score in scores for k in score.pass_at if k > 1})
    columns: dict[str, Callable[[Score], str]] = {}
    for k in ks:
        columns[f"pass@{k}"] = partial(_at, "pass_at", k)
    for k in ks:
        columns[f"maj@{k}"] = partial(_at, "majority_at", k)
    notes = [
        "pass@k: one of k answers is right (unbiased). maj@k: the most frequent of k answers is right, ties shared, "
        "expected over all draws of k."
    ]
    return _table(summary, "Right with several answers, in %", columns, notes)


def costs(summary: Summary) -> Table:
    """Tokens, time and GPU time a problem and a right answer."""
    columns: dict[str, Callable[[Score], str]] = {
        "tokens": lambda score: _amount(score.cost.tokens),
        "of them thinking": lambda score: _amount(score.cost.reasoning_tokens or None),
        "truncated": lambda score: _percent(score.cost.truncated),
        "guided": lambda score: _percent(score.cost.guided),
        "changed": lambda score: _percent(score.cost.changed),
        "tokens / right": lambda score: _amount(score.per_right(score.cost.tokens)),
        "s": lambda score: _amount(score.cost.seconds),
        "s / right": lambda score: _amount(score.per_right(score.cost.seconds)),
    }
    if _on_gpu(summary):
        columns["GPU-s"] = lambda score: _amount(score.cost.gpu_seconds)
        columns["GPU-s / right"] = lambda score: _amount(score.per_right(score.cost.gpu_seconds))
    notes = [
        "Means over answers, and the same per right answer. Truncated, guided and changed in %: answers that hit the "
        "limit of tokens, tokens under guidance, tokens that the target alone would have chosen otherwise.",
        f"Seconds are from request to last token{_concurrency_note(summary)}. {_gpu_note(summary)}",
    ]
    return _table(summary, "What an answer takes", columns, notes)


def behaviour(summary: Summary) -> Table:
    """Words of reasoning per mille."""
    columns: dict[str, Callable[[Score], str]] = {
        "words": lambda score: _amount(score.behaviours.words / score.samples),
        "branching": lambda score: f"{score.behaviours.per_mille(score.behaviours.branching):.2f}",
        "backtracking": lambda score: f"{score.behaviours.per_mille(score.behaviours.backtracking):.2f}",
        "self-verification": lambda score: f"{score.behaviours.per_mille(score.behaviours.verification):.2f}",
    }
    notes = ["Occurrences of each behaviour's words and phrases per 1,000 words; words are the mean of an answer."]
    return _table(summary, "How answers reason", columns, notes)


def verdict(summary: Summary) -> str:
    """The answer to the question that an evaluation asks, in a sentence or two."""
    best, target = summary.best, next((s for s in summary.overall if s.variant.mode == "target"), None)
    if best is None:
        return "Nothing was guided."
    if target is None or best.p is None or best.difference is None:
        return f"{_name(best)} is right in {_rate_interval(best.pass_at_1)} % of answers; the target alone did not run."
    shown = (
        f"{_name(best)} is right in {_rate_interval(best.pass_at_1)} % of answers, the target alone in "
        f"{_rate_interval(target.pass_at_1)} %: {gain(best.gain)} relative, p {p_value(best.p, equal='= ')}."
    )
    settings = len(summary.steered)
    if settings > 1:
        shown += f" It is the best of {settings} settings on these problems, which flatters it: confirm it on others."
    if best.p >= SURE:
        return f"Guidance is not shown to help. {shown}"
    return f"{'Guidance helps.' if best.difference.value > 0 else 'Guidance hurts.'} {shown}"


def completeness(summary: Summary) -> str:
    """How much of the run there is."""
    if summary.expected is None or summary.samples == summary.expected:
        return f"{summary.samples:,} answers."
    return f"Not finished: {summary.samples:,} of {summary.expected:,} answers. Figures are of what there is."


def gain(value: Interval | None) -> str:
    """A relative gain with its interval, in %."""
    if value is None:
        return UNKNOWN
    return f"{100 * value.value:+.1f} % [{_signed(100 * value.low)}, {_signed(100 * value.high)}]"


def p_value(p: float, equal: str = "") -> str:
    """Three digits; smaller ones as a bound. equal: what stands before a figure that is no bound."""
    return "< 0.001" if p < 0.001 else f"{equal}{p:.3f}"


def task_title(task: str, summary: Summary) -> str:
    """A task's name as tables and plots show it."""
    return f"average of {len(summary.scores) - 1}" if task == AVERAGE else task


def _table(summary: Summary, title: str, columns: dict[str, Callable[[Score], str]], notes: Sequence[str]) -> Table:
    rows = tuple(
        (task_title(task, summary), str(score.variant), *(show(score) for show in columns.values()))
        for task, scores in summary.scores.items()
        for score in scores
    )
    return Table(title, ("task", "mode", *columns), rows, tuple(notes))


def _name(score: Score) -> str:
    name = str(score.variant)
    return name[0].upper() + name[1:]


def _at(field: str, k: int, score: Score) -> str:
    by_k: Mapping[int, float] = getattr(score, field)
    return _percent(by_k.get(k))


def _on_gpu(summary: Summary) -> bool:
    return bool(summary.gpus and any(summary.gpus.values()))


def _gpu_note(summary: Summary) -> str:
    if summary.gpus is None:
        return "GPU-seconds are left out: config.yaml has no service section."
    if not _on_gpu(summary):
        return "The models ran on CPU: there are no GPU-seconds."
    held = ", ".join(f"{role.replace('_', ' ')} {summary.gpus[role]:g}" for role in ROLES)
    return (
        f"GPU-seconds are seconds x GPUs of the roles that took part ({held}); answers in flight together share them, "
        "so that they are what an answer holds, not what it alone costs."
    )


def _concurrency_note(summary: Summary) -> str:
    return f", {summary.concurrency} answers in flight" if summary.concurrency else ""


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def _rate_interval(rate: Interval) -> str:
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _points(value: Interval | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{100 * value.value:+.1f} [{_signed(100 * value.low)}, {_signed(100 * value.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else "+∞"


def _amount(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
