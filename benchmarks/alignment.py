"""Measures the divergence of guidance across two vocabularies from an oracle's.

    python -m benchmarks.alignment [--places 100] [--draws 4096] [--pairs PATTERN] [--save]

The models are trigrams: a target trained mostly on English and code, a guider trained on worked arithmetic and
mathematics too, and a base that was not. At places of held-out texts, the target's distribution is guided at alpha 1
by an oracle's estimate of the target's next token (drawn continuations, tokenised by the target), and by the estimate
of each method. The table shows the KL divergence from the first to the second, in nats, of

    none        no guidance
    published   ids mapped one to one through equal bytes, on logits; a target's token without a counterpart gets no
                delta, and the small models read an unknown token for it
    charitable  the same on log-probabilities
    one to one  that, and the small models read the true tokens of the text so far
    aligned     what the service does
    chance      what the oracle's draws add to each of these: a quarter of how far one half of them is from the other

All see probabilities through the oracle's grain: half of one draw that counts is added to each event, of as many draws
as a method's total on what was drawn (a factor that all events share changes nothing). Tokenizers are trained on the
spot (BPE3: 5,000 byte pairs, all numbers of up to three digits; BPE1: 6,000, single digits; a unigram model of 3,000
pieces), and published ones are read where their packages are installed (benchmarks/real_tokenizers.py). Two more tables
show figures of running text for each pair, and its cost to a coordinator. The last line is one JSON object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from actors.decoding.cross_vocab.translators import Alignment
from actors.text.alignment_cache import align
from actors.text.tokenizer import RoleTokenizer
from benchmarks.aligned import AlignedModel
from benchmarks.alignment_costs import Costs, measure_costs
from benchmarks.alignment_oracle import Oracle, Place
from benchmarks.attribution import Attribution, attribute
from benchmarks.byte_tokenizer import ByteTokenizer
from benchmarks.corpora import Corpus, corpora, mixture
from benchmarks.real_tokenizers import real_tokenizers
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.trained_tokenizers import ONE_DIGIT, THREE_DIGITS, byte_pairs, unigram
from benchmarks.trigrams import UNKNOWN, Trigrams

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

PLACES = 100
DRAWS = 4096  # continuations, for each place and model
NUMBERS = " ".join(f"{number:03}" for number in range(1000)) * 500  # which all become tokens
KINDS = ("reasoning", "math")
COLUMNS = ("none", "published", "charitable", "one to one", "aligned", "chance")
# Shares of the texts that each model reads; a base begins where the target's English and code end.
READ: Mapping[str, Mapping[str, float]] = {
    "target": {"english": 0.5, "code": 0.5, "reasoning": 0.05, "math": 0.05},
    "guider": {"english": 0.25, "code": 0.25, "reasoning": 0.9, "math": 0.9},
    "guider_base": {"english": 0.5, "code": 0.5, "reasoning": 0.1, "math": 0.1},
}
SKIPPED = {"guider_base": {"english": 0.5, "code": 0.5}}
_APART = 7  # tokens of the target from one place to the next
_FIRST = 16  # tokens before the first place
_HALVES = 4  # halves differ by twice their own noise, the whole has half of it
_NONE = 1e-6  # probability that is none
_SHIFT = 2.0  # nats: how much the normalisers of guider and base logits differ, standard deviation
_TRAINED = 300_000  # characters of each kind that a tokenizer is trained on


@dataclass(frozen=True)
class Pair:
    """A target and small models of another tokenizer, all of them trigrams of the same texts."""

    name: str
    target: RoleTokenizer
    small: RoleTokenizer
    texts: Mapping[str, Corpus]

    @cached_property
    def ours(self) -> ByteTokenizer:
        """The target's vocabulary."""
        return ByteTokenizer(self.target)

    @cached_property
    def theirs(self) -> ByteTokenizer:
        """The small models'."""
        return ByteTokenizer(self.small)

    @cached_property
    def counterparts(self) -> Ids:
        """[target width] id of the small models' token with the same bytes, -1 for none."""
        return self.theirs.counterparts(self.ours)

    @cached_property
    def alignment(self) -> Alignment:
        """The service's alignment of the two vocabularies."""
        return align(self.target, self.small)

    def train(self, role: str) -> Trigrams:
        """The model of a role."""
        tokenizer = self.ours if role == "target" else self.theirs
        text = mixture(self.texts, READ[role], SKIPPED.get(role))
        return Trigrams(tokenizer.encode(text), tokenizer.width, tokenizer.text_ids)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Means over places of one kind of text, in nats; by the names of COLUMNS."""

    pair: str
    kind: str
    places: int
    nats: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Grain:
    """Resolution of the oracle at one place. guider, base: the events drawn, [target width]. step: half a draw."""

    guider: NDArray[np.bool_]
    base: NDArray[np.bool_]
    step: float

    @classmethod
    def of(cls, guider: Floats, base: Floats) -> Grain:
        """Built from the number of times that each event was drawn."""
        return cls(guider > 0.0, base > 0.0, 0.5 / max(1.0, min(float(guider.sum()), float(base.sum()))))

    def delta(self, guider: Floats, base: Floats) -> Floats:
        """The guidance delta from probabilities of the events; NaN where there is no such event."""
        added: Floats = self._logs(guider, self.guider) - self._logs(base, self.base)
        return np.nan_to_num(added, nan=0.0)

    def _logs(self, shares: Floats, drawn: NDArray[np.bool_]) -> Floats:
        logs: Floats = np.log(shares + self.step * np.clip(np.nansum(shares[drawn]), _NONE, 1.0))
        return logs


class Comparison:
    """All methods beside the oracle, for one pair."""

    def __init__(self, pair: Pair, draws: int = DRAWS) -> None:
        self.pair = pair
        self._target, self._guider, self._base = (pair.train(role) for role in READ)
        self._oracle = Oracle(pair.ours, pair.theirs, draws // 2)

    def measure(self, kind: str, places: int, done: Callable[[], None]) -> Divergence:
        """Mean divergences at `places` of one kind of held-out text."""
        ids = self.pair.ours.encode(self.pair.texts[kind].held_out)[: _FIRST + _APART * places]
        small = [AlignedModel(self.pair.alignment, model) for model in (self._guider, self._base)]
        found = []
        for index, token in enumerate(ids):
            if index >= _FIRST and (index - _FIRST) % _APART == 0:
                said = self.pair.ours.decode(ids[:index])
                read = self.pair.theirs.encode(said.decode(errors="ignore"))
                found.append(self._compare(Place(ids, index, said, read), [model.masses() for model in small]))
                done()
            for model in small:
                model.push(token)
        means = np.mean(found, axis=0).tolist()
        return Divergence(self.pair.name, kind, len(found), dict(zip(COLUMNS, means, strict=True)))

    def _compare(self, place: Place, aligned: Sequence[Floats]) -> list[float]:
        """Each column's divergence at one place."""
        rngs = [np.random.default_rng([place.index, half]) for half in range(2)]
        halves = self._oracle.counts((self._guider, self._base), place, rngs)
        whole = np.sum(halves, axis=0)
        grain = Grain.of(*whole)
        mapped = self._counterpart_ids(place)
        shift = np.random.default_rng(place.index).normal(0.0, _SHIFT)
        row = self._target(place.ids[: place.index])
        one, other, oracle, *methods = (
            log_softmax(row + added)
            for added in (
                *(grain.delta(*map(_normal, counts)) for counts in (*halves, whole)),
                np.zeros(len(row)),
                self._one_to_one(mapped, grain, shift),
                self._one_to_one(mapped, grain),
                self._one_to_one(place.small, grain),
                grain.delta(*map(np.exp, aligned)),
            )
        )
        chance = (divergence(one, other) + divergence(other, one)) / 2 / _HALVES
        return [*(divergence(oracle, method) for method in methods), chance]

    def _counterpart_ids(self, place: Place) -> list[int]:
        mapped: Ids = self.pair.counterparts[list(place.ids[: place.index])]
        return [UNKNOWN if id_ < 0 else id_ for id_ in mapped.tolist()]

    def _one_to_one(self, read: Sequence[int], grain: Grain, shift: float = 0.0) -> Floats:
        """The delta of tokens with a counterpart, after the small models have read these ids."""
        counterparts = self.pair.counterparts
        rows = [np.exp(model(read)) for model in (self._guider, self._base)]
        added = grain.delta(*(np.where(counterparts >= 0, row[counterparts], np.nan) for row in rows))
        return np.where(counterparts >= 0, added + shift, 0.0)


def _normal(counts: Floats) -> Floats:
    normal: Floats = counts / max(1.0, float(counts.sum()))
    return normal


def divergence(right: Floats, other: Floats) -> float:
    """KL, in nats, of distributions as their logs."""
    return float(np.exp(right) @ (right - other))


def log_softmax(row: Floats) -> Floats:
    """Logs of the distribution of these logits."""
    shifted: Floats = row - row.max()
    normal: Floats = shifted - np.log(np.exp(shifted).sum())
    return normal


# -- the report


def pairs(texts: Mapping[str, Corpus]) -> dict[str, Callable[[], Pair]]:
    """Every pair that can be measured here, by name: target -> small models."""
    read = [corpus.train[:_TRAINED] for corpus in texts.values()]
    known: dict[str, Callable[[], RoleTokenizer]] = {
        "BPE3": lambda: byte_pairs([*read, NUMBERS], 5000, THREE_DIGITS),
        "BPE1": lambda: byte_pairs(read, 6000, ONE_DIGIT),
        "unigram": lambda: unigram([line for text in read for line in text.split("\n")], 3000),
    }
    real = real_tokenizers()
    chosen = [
        ("BPE3", "BPE1"),
        ("BPE1", "BPE3"),
        ("unigram", "BPE1"),
        ("BPE1", "unigram"),
        ("Llama 3", "Qwen"),
        ("Mistral", "Qwen"),
        ("Tekken", "Qwen"),
        ("Qwen", "Llama 3"),
    ]

    def find(name: str) -> RoleTokenizer:
        return real[name] if name in real else known[name]()

    def opener(target: str, small: str) -> Callable[[], Pair]:
        return lambda: Pair(f"{target} -> {small}", find(target), find(small), texts)

    return {f"{one} -> {two}": opener(one, two) for one, two in chosen if {one, two} <= known.keys() | real.keys()}


def table(found: Sequence[Divergence]) -> Table:
    """One row for each pair and kind of text."""
    shown = Table("target -> pair", "text", "places", *COLUMNS, title="KL to an oracle, nats")
    for one in found:
        shown.add_row(one.pair, one.kind, str(one.places), *(f"{one.nats[column]:.3f}" for column in COLUMNS))
    return shown


def texts_table(found: Mapping[str, Sequence[Attribution]]) -> Table:
    """Figures of running text for each pair."""
    shown = Table("target -> pair", "text", *Attribution.COLUMNS, title="running text")
    for pair, rows in found.items():
        for one in rows:
            shown.add_row(pair, one.kind, *one.cells())
    return shown


def costs_table(found: Mapping[str, Costs]) -> Table:
    """The cost of each pair to a coordinator."""
    shown = Table("target -> pair", *Costs.COLUMNS, title="costs")
    for pair, costs in found.items():
        shown.add_row(pair, *costs.cells())
    return shown


def result(
    found: Sequence[Divergence], running: Mapping[str, Sequence[Attribution]], costs: Mapping[str, Costs], draws: int
) -> dict[str, Any]:
    """The benchmark's JSON object."""
    rows: dict[str, Any] = {
        pair: {"kl": {}, "text": {one.kind: one.values() for one in some}, "costs": costs[pair].values()}
        for pair, some in running.items()
    }
    for one in found:
        rows[one.pair]["kl"][one.kind] = {column: round(value, 4) for column, value in one.nats.items()}
    return {"draws": draws, "pairs": rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--places", type=int, default=PLACES, help=f"of each pair and kind of text ({PLACES})")
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"for each place and model ({DRAWS})")
    parser.add_argument("--pairs", default="", help="a regular expression that the names of the pairs match")
    options = parser.parse_args()
    texts = corpora()
    chosen = {name: load for name, load in pairs(texts).items() if re.search(options.pairs, name)}
    found: list[Divergence] = []
    running: dict[str, list[Attribution]] = {}
    costs: dict[str, Costs] = {}
    with progress(console()) as bar:
        task = bar.add_task("", total=len(chosen) * len(KINDS) * options.places)
        for name, load in chosen.items():
            bar.update(task, description=name)
            pair = load()
            parts = pair.ours, pair.theirs, pair.alignment
            running[name] = [attribute(kind, text.held_out, *parts) for kind, text in texts.items()]
            costs[name] = measure_costs(pair.alignment, texts["english"].held_out, pair.small.width)
            comparison = Comparison(pair, options.draws)
            found += [comparison.measure(kind, options.places, lambda: bar.advance(task)) for kind in KINDS]
    for shown in (table(found), texts_table(running), costs_table(costs)):
        console().print(shown)
    publish("alignment", result(found, running, costs, options.draws), options.save)


if __name__ == "__main__":
    main()
