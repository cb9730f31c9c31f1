"""Which alpha, if any, helps on your own data: a small sweep against the service, every problem in every setting.

    python -m cluster.jobs.choose_alpha --data mine.jsonl [--grader exact] [--prompt "Answer in one word. {question}"]

Each line of the data is a JSON object with a question and its right answer (--question and --answer name the columns).
The alpha is chosen by accuracy; the gain over the target is paired by problem, with a bootstrap interval and a p that
is adjusted for how many alphas were tried. Where no gain is sure it says so, and chooses 0. The last line is one JSON
object. It is an evaluation like any other: interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.jobs.config import Evaluation, checked
from cluster.jobs.evaluate import guarded, run
from cluster.jobs.grading import GRADERS
from cluster.jobs.reproduction import helps, points
from cluster.jobs.results import Results
from cluster.jobs.summary import Score, Summary, summarise

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's words as they are, and the defaults."""


def task_file(options: argparse.Namespace) -> Path:
    """The task that the options describe, written beside the results."""
    task = {
        "name": options.data.stem,
        "data": {"file": str(options.data.resolve())},
        "columns": {"question": options.question, "answer": options.answer},
        "prompt": options.prompt,
        "style": options.style,
        "grader": options.grader,
        "samples": options.samples,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    options.run.mkdir(parents=True, exist_ok=True)
    path: Path = options.run / "task.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def sweep(options: argparse.Namespace) -> Evaluation:
    """The evaluation that the options describe. Raises ConfigError."""
    return checked(
        {
            "run": str(options.run),
            "service": str(options.service),
            "tasks": [{"task": str(task_file(options)), "limit": options.limit}],
            "modes": ["target", "guided"],
            "alpha": options.alpha,
            "warmup_tokens": [options.warmup],
        }
    )


def choose(summary: Summary, evaluation: Evaluation) -> Score:
    """The guided variant that is right most often; of equals the one of the weakest guidance."""
    alphas = {name: abs(guidance.alpha) for name, guidance in evaluation.settings().items()}
    guided = [score for score in summary.overall if score.variant.mode == "guided"]
    return max(guided, key=lambda score: (score.pass_at_1.value, -alphas[score.variant.setting]))


def grading_example(results: Results) -> str:
    """How the first answer was read, for data whose grader or prompt does not fit."""
    gold = {(row.task, row.problem): row.answer for row in results.problems()}
    sample = next(iter(results.samples()))
    right = gold[sample.key.task, sample.key.problem]
    return (
        f"The grader read {sample.extracted!r} where {right!r} is right: if it reads answers wrongly, choose "
        "another --grader or a --prompt that asks for the answer in \\boxed{}."
    )


def report_choice(results: Results, evaluation: Evaluation, console: Console) -> dict[str, Any]:
    """Say what to choose and why; the same for the last line."""
    summary = summarise(results)
    table = Table("", "right", "over the target", "p (Holm)")
    for score in summary.overall:
        gain = points(score.difference) if score.difference else ""
        p = "" if score.p is None else f"{score.p:.3g}"
        table.add_row(str(score.variant), f"{score.pass_at_1.value:.1%}", gain, p)
    console.print(table)
    best = choose(summary, evaluation)
    alpha, over = evaluation.settings()[best.variant.setting].alpha, best.difference
    assert over is not None, "the target is part of every sweep"
    sure = helps(best)
    if not any(score.pass_at_1.value for score in summary.overall):
        words = f"No answer is right in any setting, so nothing can be chosen. {grading_example(results)}"
    elif sure:
        words = (
            f"Choose alpha {alpha:g}: its accuracy is {points(over)} over the target's, on {best.problems} problems."
        )
        if len(summary.steered) > 1:
            words += f" It is the best of {len(summary.steered)}, which flatters it: confirm it on other problems."
    elif over.value <= 0:
        words = (
            f"Guidance does not help here: the best alpha, {alpha:g}, is {points(over)} over the target. Leave it out."
        )
    else:
        words = (
            f"No gain is sure on these {best.problems} problems: the best alpha, {alpha:g}, is {points(over)} over "
            "the target, which chance alone may do. Leave guidance out, or try more problems or samples."
        )
    console.print(words, highlight=False, soft_wrap=True)
    return {
        "alpha": alpha if sure else 0.0,
        "helps": sure,
        "best": alpha,
        "difference": [over.value, over.low, over.high],
        "p": best.p,
        "problems": best.problems,
        "words": words,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep and choose; the exit status as of `cluster.jobs.evaluate`."""
    options = _options(arguments)
    console = Console(stderr=True)

    def work() -> dict[str, Any]:
        evaluation = sweep(options)
        run(evaluation, console, resume=not options.no_resume)
        return report_choice(Results(options.run), evaluation, console)

    status, result = guarded(work, console)
    if status == 0:
        print(json.dumps(result), flush=True)
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--data", type=Path, required=True, help="JSONL, a problem a line")
    parser.add_argument("--question", default="question", help="the column of the question")
    parser.add_argument("--answer", default="answer", help="the column of the right answer")
    parser.add_argument("--prompt", default="{question}", help="what is asked, with {question} in it")
    parser.add_argument("--style", choices=("chat", "raw"), default="chat", help="a user's message, or raw text")
    parser.add_argument("--grader", choices=[name for name in GRADERS if name != "multihop"], default="exact")
    parser.add_argument("--alpha", type=float, nargs="+", default=list(ALPHAS), help="what is tried")
    parser.add_argument("--warmup", type=int, default=0, help="tokens before guidance begins")
    parser.add_argument("--samples", type=int, default=1, help="answers to each problem in each setting")
    parser.add_argument("--limit", type=int, help="the first problems only")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--service", type=Path, default=Path("ray_config.yaml"), help="the Serve config file")
    parser.add_argument("--run", type=Path, help="the folder of the results (runs/choose_alpha-NAME)")
    parser.add_argument("--no-resume", action="store_true", help="throw away what the folder holds, and start over")
    options = parser.parse_args(arguments)
    options.run = options.run or Path("runs") / f"choose_alpha-{options.data.stem}"
    return options


if __name__ == "__main__":
    sys.exit(main())
