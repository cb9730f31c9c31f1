"""Ids mapped one to one: padding changes no answer, answers are kept, and ways are compared on common problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.api.generation import ROLES
from benchmarks import one_to_one
from benchmarks.effect import OTHER_TARGET, prompt
from benchmarks.one_to_one import OneToOne, compare, mapped_answers
from cluster.demo.task import questions
from cluster.jobs.config import checked
from cluster.jobs.jsonl import rows
from cluster.jobs.workload import load_workload
from tests.support.local_service import trio_config

CONFIG = trio_config().with_target(str(OTHER_TARGET))


def test_padding_and_neighbours_change_no_answer() -> None:
    service = OneToOne(CONFIG)
    asked = [question for hops in (2, 4) for question in questions("held_out", hops, 3)]
    prompts = {role: [prompt(service.tokenizers[role], one) for one in asked] for role in ROLES}
    assert len({len(ids) for ids in prompts["target"]}) > 1
    together = service.replies(prompts, 1.0, 40)
    alone = [
        service.replies({role: [prompts[role][number]] for role in ROLES}, 1.0, 40)[0] for number in range(len(asked))
    ]
    assert together == alone
    word = together[0].split()[1]
    assert service.replies(prompts, 1.0, 40, [word])[0] == together[0][: together[0].index(word)]


def test_kept_answers_are_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = checked({"run": str(tmp_path), "tasks": [{"task": "multihop", "limit": 5}], "modes": ["guided"]})
    items, file = list(load_workload(evaluation).items()), tmp_path / "one_to_one.jsonl"
    first = mapped_answers(CONFIG, items[:3], file, batch=2)
    assert [row["problem"] for row in rows(file)] == [item.problem.id for item in items[:3]]
    whole = mapped_answers(CONFIG, items, file, batch=2)
    assert whole == first | whole
    assert len(whole) == len(list(rows(file))) == 5
    monkeypatch.setattr(one_to_one, "OneToOne", None)  # would be needed to answer
    assert mapped_answers(CONFIG, items, file, batch=2) == whole


def test_ways_are_compared_on_the_problems_that_both_answered() -> None:
    mapped = {("sums", str(n)): n < 2 for n in range(10)} | {("legs", "0"): True}
    guided = {("sums", str(n)): n < 6 for n in range(8)}
    (only,) = compare(mapped, guided)
    assert (only.task, only.problems) == ("sums", 8)
    assert (only.mapped.value, only.guided.value, only.gain.value) == (0.25, 0.75, 0.5)
    assert only.gain.low > 0
