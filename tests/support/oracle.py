"""The expected result of decoding, by plain transformers forwards.

The oracle knows transformers, the formula z = z_target + alpha * (z_guider - z_guider_base) and the documented
definition of a choice, and nothing of this project's decoding. For each token of an answer it computes its own choice
after the tokens before. If all choices agree, it would have decoded the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

WEIGHTS = Path(__file__).parents[2] / "cluster" / "demo" / "weights"
ROLES = ("target", "guider", "guider_base")
ALPHA = 1.0
NEAR_TIE = 1e-4  # plain forwards differ from the engine's by about 1e-5
BATCH = 100

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """One answer of the service in token ids, and its request."""

    name: str
    prompt: list[int]
    answer: list[int]
    seed: int  # of this choice, not of the request
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """The oracle's choice, and the margin by which it is preferred to the answer's token."""

    token: int
    margin: float


@dataclass
class Tally:
    """Counts of the comparison of many answers with the oracle."""

    places: int = 0
    near_ties: int = 0
    largest: float = 0.0  # margin of a place that differs

    def __str__(self) -> str:
        return f"{self.places} places, {self.near_ties} near ties, largest margin {self.largest:.1e}"


class Oracle:
    """The trio in transformers, whole rows in float64."""

    def __init__(self) -> None:
        self._models = {role: AutoModelForCausalLM.from_pretrained(WEIGHTS / role).eval() for role in ROLES}
        self._ends = {role: list(model.generation_config.eos_token_id) for role, model in self._models.items()}
        self.end = self._ends["target"][0]

    def hold(self, cases: Sequence[Case]) -> Tally:
        """Compare every token of every answer with the oracle's choice, and each answer's end with the request."""
        tally = Tally()
        by_length = sorted(cases, key=lambda case: len(case.prompt) + len(case.answer))
        for begin in range(0, len(by_length), BATCH):
            batch = by_length[begin : begin + BATCH]
            for case, rows in zip(batch, self._rows(batch), strict=True):
                _hold_one(tally, case, rows)
                ends = [place for place, token in enumerate(case.answer) if token == self.end]
                assert ends == [len(case.answer) - 1] or (not ends and len(case.answer) == case.max_tokens), case
        return tally

    def combined(self, prompt: list[int], answer: list[int], alpha: float) -> Row:
        """Combined rows [tokens, V] from which an answer's tokens are chosen."""
        z = {role: self.alone(role, prompt, answer) for role in ROLES}
        return z["target"] + alpha * (z["guider"] - z["guider_base"])

    def alone(self, role: str, prompt: list[int], answer: list[int]) -> Row:
        """One model's own rows [tokens, V] for an answer's tokens."""
        return self._logits(role, [Case("", prompt, answer, 0, 0.0, 1.0, len(answer))])[0]

    def _rows(self, cases: Sequence[Case]) -> list[Row]:
        """For each answer, the combined rows [tokens, V] from which its tokens are chosen."""
        z = {role: self._logits(role, cases) for role in ROLES}
        return [
            z_target + ALPHA * (z_guider - z_base)
            for z_target, z_guider, z_base in zip(z["target"], z["guider"], z["guider_base"], strict=True)
        ]

    @torch.inference_mode()
    def _logits(self, role: str, cases: Sequence[Case]) -> list[Row]:
        """One plain causal forward over right-padded sequences; the end tokens' probabilities add up in the first."""
        whole = [case.prompt + case.answer[:-1] for case in cases]
        width = max(map(len, whole))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in whole])
        logits = self._models[role](input_ids=ids, use_cache=False).logits
        first, *others = self._ends[role]
        rows = []
        for case, z in zip(cases, logits, strict=True):
            row = z[len(case.prompt) - 1 : len(case.prompt) - 1 + len(case.answer)].double().numpy()
            row[:, first] = np.logaddexp.reduce(row[:, [first, *others]], axis=1)
            row[:, others] = -np.inf if role == "target" else 0.0
            rows.append(row)
        return rows


def judge(z: Row, case: Case, place: int) -> Judgement:
    """The choice from one row: temperature, nucleus, then the largest sum of logit and noise, ties to the lowest id."""
    token = case.answer[place]
    if case.temperature == 0:
        best = int(np.argmax(z))
        return Judgement(best, float(z[best] - z[token]))
    scaled = z / case.temperature
    nucleus, outside = _nucleus(scaled, case.top_p, token)
    scores = scaled[nucleus] + noise(case.seed, len(case.prompt) + place, nucleus)
    best = int(np.argmax(scores))
    margin = outside if outside is not None else float(scores[best] - scores[nucleus == token][0])
    return Judgement(int(nucleus[best]), margin)


def _nucleus(scaled: Row, top_p: float, token: int) -> tuple[NDArray[np.int64], float | None]:
    """The ids in the nucleus, ascending, and the probability by which `token` misses it; None if it is inside."""
    if top_p >= 1:
        return np.arange(len(scaled)), None
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    count = max(1, int(np.searchsorted(before, top_p)))
    nucleus = np.sort(order[:count])
    return nucleus, None if token in nucleus else float(before[order == token][0] - top_p)


def noise(seed: int, position: int, ids: NDArray[Any]) -> NDArray[np.float64]:
    """Gumbel noise of tokens at a position: 52 hashed bits, in the middle of their interval."""
    row = _mixed(np.array([(seed + (position + 1) * _GOLDEN) % 2**64], np.uint64))
    bits = _mixed(row + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return np.asarray(-np.log(-np.log(((bits >> np.uint64(12)) + 0.5) / 2**52)))


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice of a request: two rounds of the hash over the request's seed and the choice's index."""
    once = _mixed(np.array([(seed + (choice + 1) * _GOLDEN) % 2**64], np.uint64))
    return int(_mixed(once)[0])


_GOLDEN = 0x9E3779B97F4A7C15


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hold_one(tally: Tally, case: Case, rows: Row) -> None:
    for place, (token, z) in enumerate(zip(case.answer, rows, strict=True)):
        judgement = judge(z, case, place)
        tally.places += 1
        if judgement.token != token:
            assert judgement.margin < NEAR_TIE, (case.name, place, token, judgement)
            tally.near_ties += 1
            tally.largest = max(tally.largest, judgement.margin)
