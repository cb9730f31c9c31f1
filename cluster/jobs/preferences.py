"""Makes the preference pairs that ThinkLogit-DPO trains a guider on: samples target and guider, grades and pairs.

    python -m cluster.jobs.preferences CONFIG.yaml [--run FOLDER] [--no-resume] [--dry-run]
    ray job submit --working-dir . -- python -m cluster.jobs.preferences CONFIG.yaml --run /shared/FOLDER

CONFIG.yaml is the file of an evaluation on training problems, without modes and settings, and with `pairs`:

run: runs/preferences
service: ray_config.yaml
tasks: [{task: math_train, samples: 4}]
pairs: {most: 10000, per_problem: 4, min_chosen_tokens: 0, validation: 0.1}      # all keys: cluster/jobs/pairs.py

Samples are stored and resumed like those of an evaluation. The pairs go to the subfolder `pairs`: a saved `datasets`
folder with the splits train and validation in TRL's preference format, and a card with counts. Pairs depend only on the
samples and the `pairs` section, so a run with another section generates no new samples. The last line of output is one
JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.api.generation import ROLES
from actors.api.guidance import Guidance
from actors.config import ConfigError, ServiceConfig, load_config
from actors.preflight import load_tokenizers
from cluster.jobs.client import Item, plan_item
from cluster.jobs.config import Arm, Evaluation, checked, validated
from cluster.jobs.dry_run import dry_run
from cluster.jobs.evaluate import run_job, sample, sampling_options
from cluster.jobs.grading import grade
from cluster.jobs.pairs import SAMPLED, SPLITS, Kind, Pair, Pairing, PromptedProblem, Split, pairs
from cluster.jobs.results import Results, RunError
from cluster.jobs.workload import Workload
from cluster.serve_file import read_mapping

EVALUATION_ONLY = ("modes", "alpha", "warmup_tokens", "schedules", "expect")  # keys that this job's file may not have


class WrongPair(RunError):
    """A chosen answer is graded wrong, or a rejected one right."""


def load_preferences(path: Path) -> tuple[Evaluation, Pairing]:
    """The evaluation and the pairing in a file. Raises ConfigError naming every wrong key."""
    given = dict(read_mapping(path))
    pairing = validated(Pairing, given.pop("pairs", None) or {})
    if refused := [key for key in EVALUATION_ONLY if key in given]:
        raise ConfigError(f"{', '.join(refused)}: target and guider are sampled alone; leave it out")
    return checked(given | {"modes": list(SAMPLED)}), pairing


def prompted_problems(workload: Workload, service: ServiceConfig) -> list[PromptedProblem]:
    """Every problem with each role's prompt in the guided mode, as text that includes special tokens."""
    tokenizers = load_tokenizers(service)
    guided = Arm("guided", "a1", Guidance(1.0))
    prompted = []
    for task, problems in workload.tasks:
        for problem in problems:
            ids = plan_item(Item(task, problem, guided, 0, 0), service, tokenizers).prompts
            prompts = {role: tokenizers[role].decode(ids[role], skip_special=False) for role in ROLES}
            prompted.append(PromptedProblem(task.name, problem.id, problem.question, prompts))
    return prompted


def check_grades(made: Mapping[Split, Sequence[Pair]], workload: Workload) -> None:
    """Grade both answers of every pair again. Raises WrongPair."""
    graders = {task.name: task.grader for task, _ in workload.tasks}
    gold = {(row.task, row.problem): row.answer for row in workload.problem_rows()}
    for pair in (pair for split in made.values() for pair in split):
        task, problem = pair.problem.task, pair.problem.id
        for one, wanted in ((pair.chosen, True), (pair.rejected, False)):
            if grade(graders[task], one.text, gold[task, problem]).right != wanted:
                raise WrongPair(
                    f"{task}, problem {problem}: the answer {one.key} is {'not ' * wanted}right when it is graded again"
                )


def write(made: Mapping[Split, Sequence[Pair]], counts: Mapping[str, Any], folder: Path) -> None:
    """Replace `folder` by the saved splits and their card, in one step. Raises RunError if a split is empty."""
    from datasets import Dataset, DatasetDict, disable_progress_bars  # seconds of import

    disable_progress_bars()
    if empty := [split for split in SPLITS if not made[split]]:
        raise RunError(
            f"no pairs for {' and '.join(empty)}: target and guider must differ in which problems they answer right. "
            f"Use more problems or samples, or lower pairs.min_chosen_tokens ({json.dumps(counts['samples'])})"
        )
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    DatasetDict({split: Dataset.from_list([pair.row() for pair in made[split]]) for split in SPLITS}).save_to_disk(
        fresh
    )
    (fresh / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(dataset_card(counts), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def count(
    made: Mapping[Split, Sequence[Pair]], results: Results, pairing: Pairing, service: ServiceConfig
) -> dict[str, Any]:
    """The counts of the card: samples and right samples, pairs, problems and answer lengths."""
    samples: dict[str, dict[str, int]] = {mode: {"answers": 0, "right": 0, "cut": 0} for mode in SAMPLED}
    for one in results.samples():
        row = samples[one.key.mode]
        row["answers"] += 1
        row["right"] += one.right
        row["cut"] += one.finish == "length"
    return {
        "models": {role: service.models.role(role).path for role in ROLES},
        "samples": samples,
        "problems": {split: len({pair.problem.question for pair in made[split]}) for split in SPLITS},
        "pairs": {split: {kind: len(_of(made[split], kind)) for kind in pairing.kinds} for split in SPLITS},
        "tokens": {kind: _lengths([p for split in SPLITS for p in _of(made[split], kind)]) for kind in pairing.kinds},
        "pairing": pairing.model_dump(mode="json"),
    }


def dataset_card(counts: Mapping[str, Any]) -> str:
    """The counts as a dataset card in Markdown."""
    models, samples, pairs_, tokens = (counts[key] for key in ("models", "samples", "pairs", "tokens"))
    lines = [
        "# Preference pairs for ThinkLogit-DPO",
        "",
        "Each row has a right answer (`chosen`) and a wrong one (`rejected`) to one problem. One is the target's, the",
        "other the guider's. `prompt` is the guider's prompt, special tokens included. `chosen_finished` and",
        "`rejected_finished` are true if the answer ended by itself, so that training includes its end token.",
        "",
        "| answers of | model | answers | right | truncated |",
        "|---|---|---|---|---|",
        *(
            f"| {mode} | {models[mode]} | {row['answers']:,} | {row['right'] / max(1, row['answers']):.1%} "
            f"| {row['cut']:,} |"
            for mode, row in samples.items()
        ),
        "",
        "| pairs | train | validation | chosen, tokens (10 %, median, 90 %) | rejected |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {pairs_['train'][kind]:,} | {pairs_['validation'][kind]:,} "
            f"| {_three(tokens[kind]['chosen'])} | {_three(tokens[kind]['rejected'])} |"
            for kind in tokens
        ),
        f"| of problems | {counts['problems']['train']:,} | {counts['problems']['validation']:,} | | |",
        "",
        "No problem is in both splits. The pairs were made with:",
        "",
        "```json",
        json.dumps(counts["pairing"]),
        "```",
    ]
    return "\n".join(lines) + "\n"


def table(counts: Mapping[str, Any]) -> Table:
    """Pairs by kind and split."""
    shown = Table("pairs", *SPLITS)
    for kind in counts["tokens"]:
        shown.add_row(kind, *(f"{counts['pairs'][split][kind]:,}" for split in SPLITS))
    return shown


def run(evaluation: Evaluation, pairing: Pairing, console: Console, *, resume: bool = True) -> dict[str, Any]:
    """Generate missing samples and make the pairs. Returns the JSON object of the last line."""
    workload = sample(evaluation, console, resume=resume)
    results = Results(evaluation.run)
    service = load_config(results.config()["service"])  # the one that generated the samples
    made = pairs(results.samples(), prompted_problems(workload, service), pairing)
    check_grades(made, workload)
    counts = count(made, results, pairing, service)
    folder = evaluation.run / "pairs"
    write(made, counts, folder)
    console.print(table(counts))
    return {"pairs": str(folder)} | {key: counts[key] for key in ("samples", "problems")} | {"counts": counts["pairs"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the pairs, or only check the file with --dry-run. Returns the exit status."""
    options, console = sampling_options(__doc__, arguments), Console(stderr=True)

    def work() -> dict[str, Any]:
        evaluation, pairing = load_preferences(options.config)
        evaluation = evaluation.at(options.run)
        if options.dry_run:
            return dry_run(evaluation, console)
        return run(evaluation, pairing, console, resume=not options.no_resume)

    return run_job(work, console)


def _of(made: Sequence[Pair], kind: Kind) -> list[Pair]:
    return [pair for pair in made if pair.kind == kind]


def _lengths(made: Sequence[Pair]) -> dict[str, list[float]]:
    """The 10th, 50th and 90th percentile of the tokens of each side."""
    if not made:
        return {"chosen": [], "rejected": []}
    tokens = {"chosen": [pair.chosen.tokens for pair in made], "rejected": [pair.rejected.tokens for pair in made]}
    return {name: np.percentile(values, (10, 50, 90)).tolist() for name, values in tokens.items()}


def _three(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
