"""Preference pairs as token ids, for the trainer.

Prompts and answers are tokenised from their texts. The end token follows an answer that ended by itself, and is left
out after a truncated one, so that the guider does not learn to end there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from actors.api.generation import Role
from actors.text.tokenizer import RoleTokenizer
from cluster.jobs.dpo.training import Training
from cluster.jobs.pairs import SPLITS, Split, column

Side: TypeAlias = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, slots=True)
class PairIds:
    """One pair. prompts: in each role's own template. answers: with the end token if they ended by themselves."""

    prompts: Mapping[Role, list[int]]
    answers: Mapping[Side, list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of the guider's prompt and the longer answer together."""
        return len(self.prompts["guider"]) + max(map(len, self.answers.values()))

    def row(self) -> dict[str, list[int]]:
        """The columns of TRL's DPO trainer, and the prompts of target and guider base if these are scored."""
        prompts = {column("prompt_ids", role): ids for role, ids in self.prompts.items()}
        return prompts | {f"{side}_ids": ids for side, ids in self.answers.items()}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The pairs of both splits, and the number that was left out because they are too long."""

    pairs: Mapping[Split, list[PairIds]]
    too_long: int


def prepare(dataset: Mapping[str, Any], tokenizers: Mapping[Role, RoleTokenizer], training: Training) -> Prepared:
    """The pairs of a saved dataset that this training uses.

    tokenizers: of the guider, or of all roles for the guided objective. The roles' tokenizers must have one vocabulary.
    """
    made: dict[Split, list[PairIds]] = {}
    too_long = 0
    for split in SPLITS:
        every = list(_pairs(dataset[split], tokenizers, training))
        made[split] = [pair for pair in every if pair.tokens <= training.max_tokens]
        too_long += len(every) - len(made[split])
    return Prepared(made, too_long)


def _pairs(rows: Any, tokenizers: Mapping[Role, RoleTokenizer], training: Training) -> Iterator[PairIds]:
    guider = tokenizers["guider"]
    for row in rows:
        if row["kind"] not in training.kinds:
            continue
        prompts = {role: tokenizer.encode(row[column("prompt", role)]) for role, tokenizer in tokenizers.items()}
        ends = {side: list(guider.eos_ids[:1]) if row[f"{side}_finished"] else [] for side in SIDES}
        yield PairIds(prompts, {side: guider.encode(row[side]) + ends[side] for side in SIDES})
