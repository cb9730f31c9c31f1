"""Runs target and guider base once over the answers of all pairs, and stores their slices for the guided objective."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import load_from_disk

from actors.api.generation import Role
from actors.config import ModelConfig
from actors.engine.loader import load_model
from actors.replica.build import source_of
from cluster.jobs.dpo.event_logprobs import Slices, log_events, others
from cluster.jobs.dpo.prepared import SIDES
from cluster.jobs.pairs import SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512  # positions in one forward: their whole rows are in memory together
SHARD = 32  # pairs in one file


@dataclass(frozen=True, slots=True)
class Scores:
    """The slices of one model on the answers of one split, one file for every SHARD pairs.

    A file holds the positions of its pairs end to end, chosen before rejected: `ids` [n, k + 1] of each position's
    events, the answer's own token first, and `logs` [n, k + 2], their log-probabilities and that of all other tokens.
    """

    folder: Path

    def has(self, first: int) -> bool:
        """True if the SHARD pairs from number `first` on are scored."""
        return self._file(first).is_file()

    def read(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and logs of the pairs from number `first` on."""
        with np.load(self._file(first), allow_pickle=False) as kept:
            return kept["ids"], kept["logs"]

    def write(self, first: int, ids: np.ndarray, logs: np.ndarray) -> None:
        """Store ids and logs in one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self._file(first).with_suffix(".part")
        with fresh.open("wb") as out:
            np.savez(out, ids=ids, logs=logs)
        os.replace(fresh, self._file(first))

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.npz"


def score_splits(model: ModelConfig, role: Role, ids: Path, scores: Path, width: int, vocabulary: int) -> None:
    """Load a role's model in this process, and score both splits of the dataset in `ids`.

    The target chooses the events, so it must be scored first.
    """
    loaded, data = load_model(source_of(model)).model, load_from_disk(str(ids))
    for split in SPLITS:
        events = None if role == "target" else Scores(scores / "target" / split)
        score(loaded, role, data[split], Scores(scores / role / split), events, width=width, vocabulary=vocabulary)


def score(
    model: PreTrainedModel, role: Role, rows: Any, scores: Scores, events: Scores | None, *, width: int, vocabulary: int
) -> None:
    """Score all answers of `rows`, a dataset of `PairIds`. Existing files are kept.

    events: scores of another model, whose events are used; None: choose `width` events beside each answer token.
    vocabulary: ids below it are tokens of every model.
    """
    for first in range(0, len(rows), SHARD):
        if scores.has(first):
            continue
        ids, logs, place = [], [], 0
        given = None if events is None else torch.from_numpy(events.read(first)[0].astype(np.int64))
        for pair in _each(rows[first : first + SHARD]):
            for side in SIDES:
                for own, tokens in _rows(model, pair[f"{role}_prompt_ids"], pair[f"{side}_ids"], vocabulary):
                    chosen = others(own, tokens, width) if given is None else given[place : place + len(tokens)]
                    place += len(tokens)
                    ids.append(chosen.to(torch.int32).cpu().numpy())
                    logs.append(log_events(own, chosen.to(own.device)).cpu().numpy())
        scores.write(first, np.concatenate(ids), np.concatenate(logs))


def packed(batch: Mapping[str, list[Any]], first: int, target: Scores, base: Scores, alpha: float) -> dict[str, Any]:
    """The slice columns of the pairs from number `first` on."""
    ids, of_target = target.read(first)
    of_base = base.read(first)[1]
    fixed = of_target - alpha * of_base
    columns: dict[str, list[bytes]] = {f"{side}_slices": [] for side in SIDES}
    place = 0
    for pair in _each(batch):
        for side in SIDES:
            end = place + len(pair[f"{side}_ids"])
            columns[f"{side}_slices"].append(Slices(ids[place:end], fixed[place:end]).pack())
            place = end
    return columns


def _each(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


@torch.no_grad()
def _rows(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], vocabulary: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits [n, vocabulary] that predict the answer's tokens [n], in chunks of at most CHUNK positions."""
    ids = torch.tensor([*prompt, *answer], device=model.get_input_embeddings().weight.device)
    cache = None
    for first in range(0, len(ids) - 1, CHUNK):
        last = min(first + CHUNK, len(ids) - 1)
        output = model(input_ids=ids[None, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        begin = max(first, len(prompt) - 1)
        if begin < last:
            yield output.logits[0, begin - first :, :vocabulary], ids[begin + 1 : last + 1].to(output.logits.device)
