"""Runs ThinkLogit-DPO from end to end with the embedded trio: pairs, training, evaluation of the adapter.

    python -m cluster.demo.dpo [--run runs/dpo] [--no-resume]

Target and guider answer training questions, their right and wrong answers become pairs, the guider is trained on the
pairs, and held-out questions are answered with and without the adapter. It runs the three jobs of a cluster one after
another. After an interruption the same command resumes. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.jobs.config import load_evaluation
from cluster.jobs.dpo.training import load_training
from cluster.jobs.evaluate import run_job, sample
from cluster.jobs.preferences import load_preferences
from cluster.jobs.preferences import run as make_pairs
from cluster.jobs.results import Results
from cluster.jobs.statistics import Interval, difference
from cluster.jobs.summary import Variant, summarise
from cluster.jobs.train_dpo import train

CONFIGS = Path("cluster/jobs/configs")
DPO = "dpo"  # the adapter's name


def run(folder: Path, console: Console, *, resume: bool = True) -> dict[str, Any]:
    """Run all three jobs. Returns the JSON object of the last line."""
    evaluation, pairing = load_preferences(CONFIGS / "dpo" / "demo_pairs.yaml")
    made = make_pairs(evaluation.model_copy(update={"run": folder / "pairs"}), pairing, console, resume=resume)
    training = load_training(CONFIGS / "dpo" / "demo_training.yaml")
    changed = {"run": folder / "training", "pairs": Path(made["pairs"])}
    trained = train(training.model_copy(update=changed), console, resume=resume)
    asked = load_evaluation(CONFIGS / "demo_dpo.yaml")
    compared: dict[str, Any] = {"run": folder / "evaluation", "adapters": {"plain": None, DPO: trained["adapter"]}}
    sample(asked.model_copy(update=compared), console, resume=resume)
    results = Results(folder / "evaluation")
    console.print(table(results, asked.alpha))
    return {
        "adapter": trained["adapter"],
        "validation": trained["validation"],
        "accuracy": {str(score.variant): round(score.pass_at_1.value, 4) for score in summarise(results).overall},
        "dpo_over_guided": {f"{alpha:g}": _rounded(gain(results, alpha)) for alpha in asked.alpha},
    }


def table(results: Results, alphas: Sequence[float]) -> Table:
    """The share of right answers by model and alpha, and the gain of the adapter with its interval."""
    shares = {score.variant: score.pass_at_1.value for score in summarise(results).overall}
    shown = Table("", *(f"alpha {alpha:g}" for alpha in alphas), title="right answers to held-out questions")
    alone = {"target": Variant("target"), "guider": Variant("guider"), "guider-DPO": Variant("guider", DPO)}
    for name, variant in alone.items():
        shown.add_row(name, f"{shares[variant]:.1%}")
    for name, end in (("guided", ""), ("guided-DPO", f"-{DPO}")):
        shown.add_row(name, *(f"{shares[Variant('guided', f'a{alpha:g}{end}')]:.1%}" for alpha in alphas))
    gains = [gain(results, alpha) for alpha in alphas]
    shown.add_row("difference", *(f"{100 * g.value:+.1f} ({100 * g.low:+.1f} to {100 * g.high:+.1f})" for g in gains))
    return shown


def gain(results: Results, alpha: float) -> Interval:
    """Share of right answers of guided-DPO minus that of guided, paired by problem."""
    settings = (f"a{alpha:g}-{DPO}", f"a{alpha:g}")
    right: dict[str, dict[str, list[bool]]] = {setting: {} for setting in settings}
    for one in results.samples():
        if one.key.mode == "guided" and one.key.setting in right:
            right[one.key.setting].setdefault(one.key.problem, []).append(one.right)
    problems = sorted(right[settings[0]].keys() & right[settings[1]].keys())
    rates = [np.array([np.mean(right[setting][problem]) for problem in problems]) for setting in settings]
    return difference(rates[:1], rates[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/dpo"), help="the folder of all three jobs (%(default)s)")
    parser.add_argument("--no-resume", action="store_true", help="delete what the folder holds, and start over")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    return run_job(lambda: run(options.run, console, resume=not options.no_resume), console)


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


if __name__ == "__main__":
    sys.exit(main())
