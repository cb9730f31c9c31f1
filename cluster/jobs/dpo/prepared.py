"""Preference pairs as token ids, for the trainer.

Prompts and answers are tokenised from their texts. The end token follows an answer that ended by itself, and is left
out after a truncated one, so that the guider does not learn to end there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from actors.api.generation import Role
from actors.config import ConfigError
from actors.text.tokenizer import RoleTokenizer
from cluster.jobs.dpo.training import Training
from cluster.jobs.pairs import KINDS, SPLITS, Split, column

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

    dataset: of `cluster.jobs.preferences`, or in TRL's plain-text form with the columns prompt, chosen and rejected.
    Its validation split may be named test. tokenizers: of the guider, or of all roles for the guided objective. The
    roles' tokenizers must have one vocabulary. Raises ConfigError for a dataset in another form.
    """
    made: dict[Split, list[PairIds]] = {}
    too_long = 0
    for split in SPLITS:
        rows = _split(dataset, split)
        _check_columns(rows.column_names, split, tokenizers, training)
        every = list(_pairs(rows, tokenizers, training))
        made[split] = [pair for pair in every if pair.tokens <= training.max_tokens]
        too_long += len(every) - len(made[split])
    return Prepared(made, too_long)


def _pairs(rows: Any, tokenizers: Mapping[Role, RoleTokenizer], training: Training) -> Iterator[PairIds]:
    guider = tokenizers["guider"]
    for row in rows:
        if row.get("kind", training.kinds[0]) not in training.kinds:
            continue
        prompts = {role: tokenizer.encode(_text(row, column("prompt", role))) for role, tokenizer in tokenizers.items()}
        ends = {side: list(guider.eos_ids[:1]) if row.get(f"{side}_finished", True) else [] for side in SIDES}
        yield PairIds(prompts, {side: guider.encode_continuation(_text(row, side)) + ends[side] for side in SIDES})


def _split(dataset: Any, split: Split) -> Any:
    names = (split, "test") if split == "validation" else (split,)
    found = [name for name in names if isinstance(dataset, Mapping) and name in dataset]
    if not found:
        has = f"the splits {', '.join(dataset)}" if isinstance(dataset, Mapping) else "one split without a name"
        raise ConfigError(
            f"pairs: the dataset has {has}, but needs train and validation (or test): save a DatasetDict of both, for "
            "example by datasets.Dataset.train_test_split"
        )
    return dataset[found[0]]


def _check_columns(
    names: Collection[str], split: Split, tokenizers: Mapping[Role, RoleTokenizer], training: Training
) -> None:
    """Refuse rows without the columns that the training reads. Without the others, each answer ended by itself."""
    needed = [*(column("prompt", role) for role in tokenizers), *SIDES]
    if set(training.kinds) != set(KINDS):
        needed.append("kind")
    if missing := [name for name in needed if name not in names]:
        raise ConfigError(
            f"pairs: the {split} split lacks {', '.join(missing)}; its columns are {', '.join(names)}. Give the "
            "guider's prompt and both answers as text: prompt, chosen, rejected; objective: guided also needs "
            "target_prompt and guider_base_prompt, and kinds needs kind"
        )


def _text(row: Mapping[str, Any], name: str) -> str:
    text = row[name]
    if not isinstance(text, str):
        raise ConfigError(
            f"pairs: {name} must be text, not {type(text).__name__}; turn messages into text with the guider's chat "
            "template, special tokens included"
        )
    return text
