"""Measures if better guiders make better guided targets: three guiders of the embedded trio, each with the same target.

    python -m benchmarks.guiders [--n 200] [--save]

half-trained: tuned for half as many steps as the committed guider. trained: the committed one. reinforced: the
half-trained one, tuned on by reinforcement (GRPO, arXiv 2402.03300, with TRL) that rewards right answers and nothing
else, on training questions whose facts it was shown. Answers are greedy, with plain transformers forwards; alpha is
chosen on validation questions, and `n` held-out ones of each of 2 to 5 hops are asked.

The last line is a JSON object: of each guider the share of right answers that it gives alone, and guided by it at the
chosen alpha, at 1 and at 1.5, with 95 % intervals; reward, the mean over the first and the last steps of reinforcement.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.preference import HOPS, WHERE, Measured, Trio
from benchmarks.results_file import arguments, console, publish
from cluster.demo.lessons import Curriculum, DocumentPacker
from cluster.demo.task import answer_in, known_facts
from cluster.demo.tokenizer import MARKUP, build
from cluster.demo.train import Recipe, fit
from cluster.jobs.statistics import Floats, Interval, pass_at_1
from tests.support.local_service import WEIGHTS

STEPS, PROMPTS, EACH = 100, 16, 8  # of reinforcement: steps, and in each so many questions with so many answers
RATE = 2e-4
SEED = 5
ENDS = 10  # steps at the beginning and at the end whose rewards are told


def half_trained(bar: Progress) -> PreTrainedModel:
    """The guider base, tuned as the guider was for half as long."""
    schedule = Recipe().guider
    model = copy.deepcopy(Trio.load("guider_base"))
    task = bar.add_task("half-trained", total=schedule.steps // 2, loss=0.0)
    reader = DocumentPacker(build(), Curriculum(known_facts(), 0.0, 1.0, max_hops=max(HOPS)))
    fit(model, reader, replace(schedule, steps=schedule.steps // 2), bar, task)
    return model


def reinforced(guider: PreTrainedModel, folder: str, heard: Callable[[float], None]) -> PreTrainedModel:
    """A copy of the guider that was rewarded for right answers. heard: called with each step's share of them."""
    draw, lessons = random.Random(SEED), Curriculum(known_facts(), 0.0, 1.0, max_hops=max(HOPS))
    asked = [lessons.question(draw) for _ in range(STEPS * PROMPTS)]
    rows = [{"prompt": MARKUP.prompt(question), "answer": question.answer} for question in asked]

    def reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        rewards = [float(answer_in(text) == right) for text, right in zip(completions, answer, strict=True)]
        heard(sum(rewards) / len(rewards))
        return rewards

    trainer = GRPOTrainer(
        model=copy.deepcopy(guider),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(WEIGHTS / "guider", padding_side="left"),
        args=GRPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=PROMPTS * EACH,
            num_generations=EACH,
            max_completion_length=MARKUP.budget(max(HOPS)),
            learning_rate=RATE,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model: PreTrainedModel = trainer.model
    return model.eval()


def measure(trio: Trio, guider: PreTrainedModel, n: int) -> dict[str, Any]:
    """Accuracy of the guider alone and of the target guided by it."""
    found = Measured()
    trio.measure(guider, n, found)
    return {
        "alone": _share(trio.alone(guider, "held_out", n)),
        "alpha": found.alphas[0],
    } | {where: _share(rates[0]) for where, rates in found.rates.items()}


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One row a guider."""
    columns = ("alone", *WHERE)
    shown = Table("guider", "alpha", *columns, title="right answers to held-out questions")
    for name, row in rows.items():
        shown.add_row(name, f"{row['alpha']:g}", *("{:.3f} ({:.3f} to {:.3f})".format(*row[key]) for key in columns))
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--n", type=int, default=200, help="held-out questions of each hop count (200)")
    options = parser.parse_args()
    torch.set_num_threads(2)
    trio = Trio()
    with Progress(console=console()) as bar, tempfile.TemporaryDirectory() as folder:
        half = half_trained(bar)
        task = bar.add_task("reinforced", total=STEPS)
        rewards: list[float] = []

        def heard(reward: float) -> None:
            rewards.append(reward)
            bar.advance(task)

        guiders = {"half-trained": half, "trained": trio.guider(), "reinforced": reinforced(half, folder, heard)}
        task = bar.add_task("asked", total=len(guiders))
        rows = {}
        for name, guider in guiders.items():
            rows[name] = measure(trio, guider, options.n)
            bar.advance(task)
    console().print(table(rows))
    reward = [round(sum(some) / len(some), 4) for some in (rewards[:ENDS], rewards[-ENDS:])]
    publish("guiders", {"questions": options.n * len(HOPS), "reward": reward, "guiders": rows}, options.save)


def _share(rates: list[Floats]) -> list[float]:
    share: Interval = pass_at_1(rates)
    return [round(value, 4) for value in (share.value, share.low, share.high)]


if __name__ == "__main__":
    main()
