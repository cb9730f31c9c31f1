"""The published way to guide a target of another family: ids mapped one to one. Plain transformers forwards, greedy.

    python -m benchmarks.one_to_one EVALUATION.yaml [--setting a1] [--limit N] [--batch 32] [--answers FILE] [--save]

Answers the tasks of an evaluation whose samples are in its folder, and compares the right answers with those of its
guided mode at that setting, paired by problem. Finished answers are kept in --answers (RUN/one_to_one.jsonl), so the
same command resumes. The last line is a list of JSON objects, one for each task: the rate of right answers, and the
guided mode's rate minus it, each with its 95 % interval.

A target's token that is no token of the small models gets no delta, which is taken of logits, and the small models read
an unknown token in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig
from actors.engine.loader import load_model
from actors.preflight import load_tokenizers
from actors.replica.build import source_of
from benchmarks.baselines import PaddedBatch
from benchmarks.byte_tokenizer import ByteTokenizer
from benchmarks.results_file import arguments, console, progress, publish
from cluster.jobs.client import Item, plan_item
from cluster.jobs.config import load_evaluation
from cluster.jobs.grading import grade
from cluster.jobs.jsonl import LineFile, rows
from cluster.jobs.results import Results
from cluster.jobs.statistics import Interval, difference, pass_at_1
from cluster.jobs.workload import load_workload
from cluster.serve_file import read_service_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answers = dict[tuple[str, str], bool]  # by task and problem: True if the answer is right


class OneToOne:
    """The three models of a configuration, guided the published way."""

    def __init__(self, config: ServiceConfig) -> None:
        self.tokenizers = load_tokenizers(config)
        self._models: dict[Role, PreTrainedModel] = {
            role: load_model(source_of(config.models.role(role))).model for role in ROLES
        }
        target, guider = self.tokenizers["target"], self.tokenizers["guider"]
        mapped = ByteTokenizer(guider).counterparts(ByteTokenizer(target))
        mapped[list(target.eos_ids)] = guider.eos_ids[0]
        self._there, self._ids = torch.tensor(mapped >= 0), torch.tensor(mapped[mapped >= 0])
        unknown = guider.eos_ids[-1]  # the trio's padding, as in the published pair
        self._read = torch.tensor(np.where(mapped >= 0, mapped, unknown))

    def replies(
        self, prompts: Mapping[Role, Sequence[Sequence[int]]], alpha: float, limit: int, stops: Sequence[str] = ()
    ) -> list[str]:
        """Answers to prompts, given by role in its own ids; at most `limit` tokens, and cut at the first stop text."""
        batches = {role: PaddedBatch(model, prompts[role], limit) for role, model in self._models.items()}
        logits = {role: batch.prefill() for role, batch in batches.items()}
        tokenizer = self.tokenizers["target"]
        said: list[list[int]] = [[] for _ in prompts["target"]]
        unfinished, width = set(range(len(said))), len(self._there)
        for left in reversed(range(limit)):
            combined = logits["target"].double()
            delta = (logits["guider"].double() - logits["guider_base"].double())[:, self._ids]
            combined[:, :width][:, self._there] += alpha * delta
            chosen = combined[:, :width].argmax(-1)
            for number in sorted(unfinished):
                token = int(chosen[number])
                if token in tokenizer.eos_ids:
                    unfinished.remove(number)
                    continue
                said[number].append(token)
                if stops and any(stop in tokenizer.decode(said[number]) for stop in stops):
                    unfinished.remove(number)
            if not unfinished or not left:
                break
            mapped = self._read[chosen]
            read = {"target": chosen, "guider": mapped, "guider_base": mapped}
            logits = {role: batch.step(read[role]) for role, batch in batches.items()}
        return [_cut(tokenizer.decode(ids), stops) for ids in said]


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@dataclass(frozen=True, slots=True)
class Compared:
    """Right answers to one task. gain: the guided mode's rate minus that of the published mapping."""

    task: str
    problems: int
    mapped: Interval
    guided: Interval
    gain: Interval

    def values(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        figures = {"mapped": self.mapped, "guided": self.guided, "gain": self.gain}
        rounded = {name: [round(x, 4) for x in (each.value, each.low, each.high)] for name, each in figures.items()}
        return {"task": self.task, "problems": self.problems} | rounded


def compare(mapped: Answers, guided: Answers) -> list[Compared]:
    """Both ways on the problems that both have answered, by task."""
    found = []
    for task in dict.fromkeys(task for task, _ in mapped):
        common = sorted(key for key in mapped if key[0] == task and key in guided)
        ours, theirs = (np.array([float(answers[key]) for key in common]) for answers in (guided, mapped))
        if common:
            rates = (pass_at_1([theirs]), pass_at_1([ours]), difference([ours], [theirs]))
            found.append(Compared(task, len(common), *rates))
    return found


def guided_answers(run: Path, setting: str) -> Answers:
    """The answers of an evaluation's guided mode at a setting. Of several samples of a problem, the first counts."""
    samples = (sample for sample in Results(run).samples() if sample.key.number == sample.key.seed == 0)
    return {
        (sample.key.task, sample.key.problem): sample.right
        for sample in samples
        if (sample.key.mode, sample.key.setting) == ("guided", setting)
    }


def mapped_answers(config: ServiceConfig, items: Sequence[Item], file: Path, batch: int) -> Answers:
    """Answer the items that `file` lacks, `batch` at a time, and add them to it. Returns the answers to all items."""
    found = {} if not file.exists() else {(row["task"], row["problem"]): bool(row["right"]) for row in rows(file)}
    missing = [item for item in items if (item.task.name, item.problem.id) not in found]
    if missing:
        service, kept = OneToOne(config), LineFile(file)
        kept.open()
        with progress(console()) as bar:
            for some in bar.track(_batches(missing, batch), description="answers, mapped one to one"):
                made = [plan_item(item, config, service.tokenizers) for item in some]
                prompts = {role: [one.prompts[role] for one in made] for role in ROLES}
                sampling, alpha = made[0].sampling, some[0].arm.guidance.alpha
                assert sampling.max_tokens is not None, "the tasks limit their answers"
                texts = service.replies(prompts, alpha, sampling.max_tokens, sampling.stop)
                for item, text in zip(some, texts, strict=True):
                    right = grade(item.task.grader, text, item.problem.answer).right
                    found[item.task.name, item.problem.id] = right
                    kept.append({"task": item.task.name, "problem": item.problem.id, "right": right, "text": text})
        kept.close()
    return {key: found[key] for key in ((item.task.name, item.problem.id) for item in items)}


def _batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items of each task, in batches of prompts of about the same length."""
    found: list[Sequence[Item]] = []
    for task in dict.fromkeys(item.task.name for item in items):
        own = sorted((item for item in items if item.task.name == task), key=lambda item: len(item.problem.prompt))
        found += [own[begin : begin + size] for begin in range(0, len(own), size)]
    return found


def table(setting: str, compared: Sequence[Compared]) -> Table:
    """Both ways and their difference, by task."""
    shown = Table("task", "problems", "mapped one to one", f"guided {setting}", "guided - mapped")
    for each in compared:
        shown.add_row(each.task, str(each.problems), str(each.mapped), str(each.guided), str(each.gain))
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("evaluation", type=Path, help="the YAML file of a finished evaluation")
    parser.add_argument("--setting", default="a1", help="of the guided mode, whose alpha is used (a1)")
    parser.add_argument("--limit", type=int, help="ask the first problems of each task only")
    parser.add_argument("--batch", type=int, default=32, help="problems decoded together (32)")
    parser.add_argument("--answers", type=Path, help="where answers are kept (one_to_one.jsonl in the run's folder)")
    options = parser.parse_args()
    evaluation = load_evaluation(options.evaluation)
    workload, asked = load_workload(evaluation), Counter[str]()
    items = []
    for item in workload.items():
        if (item.arm.mode, item.arm.setting, item.number) == ("guided", options.setting, 0):
            asked[item.task.name] += 1
            if options.limit is None or asked[item.task.name] <= options.limit:
                items.append(item)
    if not items:
        parser.error(f"{options.evaluation} has no guided setting {options.setting}")
    file = options.answers or evaluation.run / "one_to_one.jsonl"
    mapped = mapped_answers(read_service_config(evaluation.service), items, file, options.batch)
    compared = compare(mapped, guided_answers(evaluation.run, options.setting))
    console().print(table(options.setting, compared))
    publish("one_to_one", [each.values() for each in compared], options.save)


if __name__ == "__main__":
    main()
