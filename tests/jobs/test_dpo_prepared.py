"""Preference pairs as token ids: those of the pairs job, those in TRL's plain-text form, and other datasets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from actors.api.generation import Role
from actors.config import ConfigError
from actors.preflight import load_tokenizers
from actors.text.tokenizer import RoleTokenizer
from cluster.jobs.dpo.prepared import prepare
from cluster.jobs.dpo.training import Training
from tests.support.local_service import trio_config

PLAIN = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Ben."}


@pytest.fixture(scope="module")
def tokenizers() -> Mapping[Role, RoleTokenizer]:
    return load_tokenizers(trio_config())


def training(**changed: Any) -> Training:
    return Training(run=Path("run"), pairs=Path("pairs"), **changed)


def splits(row: Mapping[str, Any], validation: str = "validation") -> DatasetDict:
    return DatasetDict({split: Dataset.from_list([dict(row)] * 2) for split in ("train", validation)})


@pytest.mark.parametrize("validation", ["validation", "test"])
def test_plain_pairs_are_used_and_their_answers_are_complete(
    tokenizers: Mapping[Role, RoleTokenizer], validation: str
) -> None:
    guider = tokenizers["guider"]
    made = prepare(splits(PLAIN, validation), {"guider": guider}, training())
    assert {split: len(pairs) for split, pairs in made.pairs.items()} == {"train": 2, "validation": 2}
    pair = made.pairs["train"][0]
    assert pair.prompts == {"guider": guider.encode("Who?")}
    assert pair.answers["chosen"] == [*guider.encode("Ada."), guider.eos_ids[0]]


def test_columns_of_the_pairs_job_choose_kinds_and_ends(tokenizers: Mapping[Role, RoleTokenizer]) -> None:
    guider: dict[Role, RoleTokenizer] = {"guider": tokenizers["guider"]}
    row = PLAIN | {"kind": "target_right", "chosen_finished": False, "rejected_finished": True}
    assert not prepare(splits(row), guider, training(kinds=["guider_right"])).pairs["train"]
    pair = prepare(splits(row), guider, training(kinds=["target_right"])).pairs["train"][0]
    assert pair.answers["chosen"] == tokenizers["guider"].encode("Ada.")


@pytest.mark.parametrize(
    ("dataset", "changed", "sentence"),
    [
        (Dataset.from_list([PLAIN]), {}, "one split without a name, but needs train and validation"),
        (DatasetDict({"train": Dataset.from_list([PLAIN])}), {}, "has the splits train, but needs"),
        (
            splits({"question": "Who?", "chosen": "Ada."}),
            {},
            "train split lacks prompt, rejected; its columns",
        ),
        (splits(PLAIN), {"objective": "guided"}, "lacks target_prompt, guider_base_prompt"),
        (splits(PLAIN), {"kinds": ["target_right"]}, "lacks kind"),
        (splits(PLAIN | {"prompt": [{"role": "user", "content": "Who?"}]}), {}, "prompt must be text, not list"),
        (splits(PLAIN | {"chosen": None}), {}, "chosen must be text, not NoneType"),
    ],
)
def test_a_dataset_in_another_form_is_refused_by_name(
    tokenizers: Mapping[Role, RoleTokenizer], dataset: Any, changed: dict[str, Any], sentence: str
) -> None:
    alone: dict[Role, RoleTokenizer] = {"guider": tokenizers["guider"]}
    used = tokenizers if changed.get("objective") == "guided" else alone
    with pytest.raises(ConfigError, match=sentence):
        prepare(dataset, used, training(**changed))
