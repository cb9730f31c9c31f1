"""Chooses alpha for your own data: a small sweep on the service, with every problem at every alpha.

    python -m cluster.jobs.choose_alpha --data mine.jsonl [--grader exact] [--prompt "Answer in one word. {question}"]

Each line of the data is a JSON object with a question and its right answer; --question and --answer name the columns.
The alpha with the highest accuracy is chosen. Its gain over the target is paired by problem, with a bootstrap interval
and a p adjusted for the number of alphas. If the gain is not significant, alpha is 0. The last line of output is one
JSON object. After an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.jobs.config import Evaluation, checked
from cluster.jobs.evaluate import run, run_job
from cluster.jobs.grading import GRADERS
from cluster.jobs.reproduction import helps, points
from cluster.jobs.results import Results
from cluster.jobs.summary import Score, Summary, summarise

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, and shows defaults."""


def task_file(options: argparse.Namespace) -> Path:
    """Write the task that the options describe into the run's folder. Returns the file."""
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
    """The guided variant with the highest accuracy; among equals, the one with the smallest alpha."""
    alphas = {name: abs(guidance.alpha) for name, guidance in evaluation.settings().items()}
    guided = [score for score in summary.overall if score.variant.mode == "guided"]
    return max(guided, key=lambda score: (score.pass_at_1.value, -alphas[score.variant.setting]))


def grading_example(results: Results) -> str:
    """A sentence with the first graded answer, to show that the grader or the prompt may not fit the data."""
    gold = {(row.task, row.problem): row.answer for row in results.problems()}
    sample = next(iter(results.samples()))
    right = gold[sample.key.task, sample.key.problem]
    return (
        f"The grader read the answer {sample.extracted!r}, and the right answer is {right!r}. If it misreads answers, "
        "choose another --grader, or a --prompt that requests the answer in \\boxed{}."
    )


def report_choice(results: Results, evaluation: Evaluation, console: Console) -> dict[str, Any]:
    """Print which alpha to choose, and why. Returns the JSON object of the last line."""
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
        words = f"No answer is right in any setting, so no alpha can be chosen. {grading_example(results)}"
    elif sure:
        words = (
            f"Choose alpha {alpha:g}: its accuracy is {points(over)} over the target's, on {best.problems} problems."
        )
        if len(summary.steered) > 1:
            words += f" The best of {len(summary.steered)} is likely overestimated: confirm it on other problems."
    elif over.value <= 0:
        words = (
            f"Guidance does not help here: the best alpha, {alpha:g}, is {points(over)} over the target. Do not use it."
        )
    else:
        words = (
            f"No gain is significant on these {best.problems} problems: the best alpha, {alpha:g}, is {points(over)} "
            "over the target, which may be chance. Use no guidance, or try more problems or samples."
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
    """Sweep and choose. Returns the exit status, as of `cluster.jobs.evaluate`."""
    options = _options(arguments)
    console = Console(stderr=True)

    def work() -> dict[str, Any]:
        evaluation = sweep(options)
        run(evaluation, console, resume=not options.no_resume)
        return report_choice(Results(options.run), evaluation, console)

    return run_job(work, console)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--data", type=Path, required=True, help="JSONL, one problem a line")
    parser.add_argument("--question", default="question", help="the column of the question")
    parser.add_argument("--answer", default="answer", help="the column of the right answer")
    parser.add_argument("--prompt", default="{question}", help="the prompt, with {question} in it")
    parser.add_argument("--style", choices=("chat", "raw"), default="chat", help="a user's message, or raw text")
    parser.add_argument("--grader", choices=[name for name in GRADERS if name != "multihop"], default="exact")
    parser.add_argument("--alpha", type=float, nargs="+", default=list(ALPHAS), help="the alphas to try")
    parser.add_argument("--warmup", type=int, default=0, help="tokens before guidance begins")
    parser.add_argument("--samples", type=int, default=1, help="answers to each problem in each setting")
    parser.add_argument("--limit", type=int, help="use the first problems only")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--service", type=Path, default=Path("ray_config.yaml"), help="the Serve config file")
    parser.add_argument("--run", type=Path, help="the folder of the results (runs/choose_alpha-NAME)")
    parser.add_argument("--no-resume", action="store_true", help="delete what the folder holds, and start over")
    options = parser.parse_args(arguments)
    options.run = options.run or Path("runs") / f"choose_alpha-{options.data.stem}"
    return options


if __name__ == "__main__":
    sys.exit(main())
