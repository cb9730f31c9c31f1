"""Measures the effect of preference training: the embedded trio's guider, with several seeds, objectives and pairs.

    python -m benchmarks.preference [--pairs FOLDER] [--seeds 5] [--others 2] [--n 200] [--save]

Every guider is trained by `cluster.jobs.train_dpo` on pairs of `cluster.jobs.preferences`, sampled first where
no folder of them is given. It then guides the target with plain transformers forwards, greedily: alpha is chosen on
validation questions, 100 of each of 2 to 5 hops, and `n` of each, held out, are asked at that alpha, at 1, the
published one, and at 1.5, where the untrained guider is over-confident. `--seeds` are of the default training,
`--others` of each variant of it.

The last line is a JSON object. Of each variant: alphas, the chosen ones by seed, and of best, at_1 and at_1.5 the mean
share of right answers over hops and seeds, by_hops, and over: the difference to the untrained guider with its 95 %
interval, paired by question.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from actors.engine.loader import ModelSource, load_model
from benchmarks.results_file import arguments, console, progress, publish
from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.accuracy import Term, guided, replies
from cluster.demo.task import Question, Split, grade, questions
from cluster.jobs.dpo.training import Training, load_training
from cluster.jobs.preferences import load_preferences
from cluster.jobs.preferences import run as make_pairs
from cluster.jobs.statistics import Floats, Interval, difference
from cluster.jobs.train_dpo import train
from cluster.launch import local_ray
from tests.support.local_service import WEIGHTS

CONFIGS = Path("cluster/jobs/configs/dpo")
HOPS = (2, 3, 4, 5)
ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5)
PUBLISHED, OVERCONFIDENT = 1.0, 1.5
VALIDATION = 100  # questions of each hop count by which alpha is chosen
WHERE = ("best", "at_1", "at_1.5")
DEFAULT = "dpo"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "target_right alone": {"kinds": ("target_right",)},
    "guider_right alone": {"kinds": ("guider_right",)},
    "supervised on chosen": {"loss": "sft"},
    "guided objective": {"objective": "guided", "alpha": OVERCONFIDENT, "learning_rate": 1e-4},
}


@dataclass(slots=True)
class Measured:
    """Results of one variant's seeds. rates: by where they were asked, [questions] of each hop count, one row a
    seed."""

    alphas: list[float] = field(default_factory=list)
    rates: dict[str, list[list[Floats]]] = field(default_factory=lambda: {where: [] for where in WHERE})


class Trio:
    """The target and its guider base, which any guider can be put beside."""

    def __init__(self) -> None:
        self._target, self._base = (self.load(role) for role in ("target", "guider_base"))
        self._tokenizer: Tokenizer = trio_tokenizer.build()

    def guider(self, adapter: str | None = None) -> PreTrainedModel:
        """The committed guider, with an adapter."""
        return self.load("guider", adapter)

    def rates(self, guider: PreTrainedModel, alpha: float, split: Split, n: int) -> list[Floats]:
        """1 for each question that is answered right, 0 for others: [n] by hop count."""
        return self._rates(guided(self._target, guider, self._base, alpha), split, n)

    def _rates(self, terms: Sequence[Term], split: Split, n: int) -> list[Floats]:
        def right(asked: Sequence[Question]) -> Floats:
            texts = replies(terms, self._tokenizer, asked)
            return np.array([float(grade(text, one)) for text, one in zip(texts, asked, strict=True)])

        return [right(questions(split, hops, n)) for hops in HOPS]

    def measure(self, guider: PreTrainedModel, n: int, into: Measured) -> None:
        """Choose alpha on validation questions, the smallest of equals, and ask held-out ones."""
        chosen = max(ALPHAS, key=lambda alpha: (_mean(self.rates(guider, alpha, "validation", VALIDATION)), -alpha))
        into.alphas.append(chosen)
        for where, alpha in zip(WHERE, (chosen, PUBLISHED, OVERCONFIDENT), strict=True):
            into.rates[where].append(self.rates(guider, alpha, "held_out", n))

    def alone(self, guider: PreTrainedModel, split: Split, n: int) -> list[Floats]:
        """`rates` of the guider by itself."""
        return self._rates([Term(guider)], split, n)

    @staticmethod
    def load(role: str, adapter: str | None = None) -> PreTrainedModel:
        """A model of the committed trio."""
        return load_model(ModelSource(str(WEIGHTS / role), device="cpu", adapter=adapter)).model


def run(pairs: Path, folder: Path, seeds: Mapping[str, int], n: int, done: Callable[[], None]) -> dict[str, Measured]:
    """Train and measure every variant; `done` is called after each guider."""
    trio, measured = Trio(), {"guided": Measured()} | {name: Measured() for name in seeds}
    trio.measure(trio.guider(), n, measured["guided"])
    done()
    for name, count in seeds.items():
        for seed in range(count):
            training = _training(pairs, folder / f"{name}-{seed}".replace(" ", "-"), seed, VARIANTS[name])
            adapter = train(training, console())["adapter"]
            trio.measure(trio.guider(adapter), n, measured[name])
            done()
    return measured


def result(measured: Mapping[str, Measured], n: int) -> dict[str, Any]:
    """The benchmark's JSON object."""
    plain = {where: _over_seeds(rates) for where, rates in measured["guided"].rates.items()}
    rows: dict[str, Any] = {}
    for name, one in measured.items():
        rows[name] = {"seeds": len(one.alphas), "alphas": one.alphas}
        for where in WHERE:
            rates = _over_seeds(one.rates[where])
            rows[name][where] = {
                "right": round(_mean(rates), 4),
                "by_hops": {str(hops): round(float(some.mean()), 4) for hops, some in zip(HOPS, rates, strict=True)},
                "over": _rounded(difference(rates, plain[where])),
            }
    return {"questions": n * len(HOPS), "variants": rows}


def table(shown: Mapping[str, Any]) -> Table:
    """One row a variant: right answers, and how much more than with the untrained guider."""
    made = Table("guider", "seeds", *WHERE, title="guided accuracy")
    for name, row in shown["variants"].items():
        cells = [
            "{:.3f} {:+.3f} ({:+.3f} to {:+.3f})".format(row[where]["right"], *row[where]["over"]) for where in WHERE
        ]
        made.add_row(name, str(row["seeds"]), *cells)
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=Path, help="what cluster.jobs.preferences made; sampled first if not given")
    parser.add_argument("--seeds", type=int, default=5, help="of the default training (5)")
    parser.add_argument("--others", type=int, default=2, help="of each other variant (2)")
    parser.add_argument("--n", type=int, default=200, help="held-out questions of each hop count (200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAY_ADDRESS"] = "local"
    seeds = {name: options.seeds if name == DEFAULT else options.others for name in VARIANTS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pairs = options.pairs
        if pairs is None:
            evaluation, pairing = load_preferences(CONFIGS / "demo_pairs.yaml")
            pairs = Path(
                make_pairs(evaluation.model_copy(update={"run": folder / "pairs"}), pairing, console())["pairs"]
            )
        stack.enter_context(local_ray(num_cpus=2))
        bar = stack.enter_context(progress(console()))
        task = bar.add_task("guiders", total=1 + sum(seeds.values()))
        found = result(run(pairs, folder, seeds, options.n, lambda: bar.advance(task)), options.n)
    console().print(table(found))
    publish("preference", found, options.save)


def _training(pairs: Path, folder: Path, seed: int, changed: Mapping[str, Any]) -> Training:
    """The demonstration's training with what the variant changes."""
    base = load_training(CONFIGS / "demo_training.yaml").model_dump()
    return Training.model_validate(base | {"pairs": pairs, "run": folder, "seed": seed} | dict(changed))


def _over_seeds(rates: Sequence[Sequence[Floats]]) -> list[Floats]:
    """Mean over the seeds, for each question."""
    means: list[Floats] = [np.mean(same, axis=0) for same in zip(*rates, strict=True)]
    return means


def _mean(rates: Sequence[Floats]) -> float:
    return float(np.mean([each.mean() for each in rates]))


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


if __name__ == "__main__":
    main()
