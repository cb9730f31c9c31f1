"""Decoding compared with plain transformers forwards: the same seed gives the same tokens under all circumstances."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from tests.support.local_service import WEIGHTS, LocalService, decode, local_service, trio_config
from tests.support.near_ties import all_same, same
from tests.support.oracle import ALPHA, Case, Oracle
from tests.support.tiers import slow
from tests.support.trio import chat_prompts, decode_all, finished, request, tokens
from tests.support.watched import watched

LENGTH = 32
SAMPLINGS = (
    Sampling(temperature=0, max_tokens=LENGTH),
    Sampling(temperature=0.6, top_p=0.95, max_tokens=LENGTH),
    Sampling(temperature=1.0, max_tokens=LENGTH),
)
FREE_TEXT = ("Once upon a time", "The rival of Ada is", "1, 2, 3,", "Ünïcödé and 漢字", "Who", "def main():\n    ")
PROMPTS = (20, slow(200))  # each with every way of sampling


def config(mode: str, **exchange: Any) -> Any:
    return trio_config(exchange={"mode": mode, **exchange}, coordinator={"max_sessions": 600, "max_waiting": 600})


def requests_to(service: LocalService, prompts: int) -> list[Generate]:
    """Requests for every prompt with every way of sampling: questions of two and three hops, and free text."""
    texts = [(text, True) for hops in (2, 3) for text in chat_prompts(prompts * 2 // 5, hops)]
    texts += [(f"{FREE_TEXT[i % len(FREE_TEXT)]} {i}", False) for i in range(prompts - len(texts))]
    return [
        request(service.tokenizers, text, sampling=sampling, seed=1_000 * way + i, chat=chat, guidance=Guidance(ALPHA))
        for way, sampling in enumerate(SAMPLINGS)
        for i, (text, chat) in enumerate(texts)
    ]


class ConcurrentAnswers:
    """Answers of the service to all requests at once, by exchange mode; decoded on first use."""

    def __init__(self, engines: Mapping[Role, Engine], prompts: int) -> None:
        self._engines, self._prompts = engines, prompts
        self._answers: dict[str, tuple[list[Generate], list[list[int]]]] = {}

    async def answers(self, mode: str) -> tuple[list[Generate], list[list[int]]]:
        """The requests in shuffled order, and their tokens."""
        if mode not in self._answers:
            async with local_service(config(mode), self._engines) as service:
                requests = requests_to(service, self._prompts)
                random.Random(0).shuffle(requests)
                self._answers[mode] = requests, tokens(await decode_all(service.coordinators[0], requests))
        return self._answers[mode]


@pytest.fixture(scope="module", params=PROMPTS)
def concurrent(trio_engines: Mapping[Role, Engine], request: pytest.FixtureRequest) -> ConcurrentAnswers:
    return ConcurrentAnswers(trio_engines, request.param)


def case(one: Generate, answer: list[int]) -> Case:
    """Convert an answer to the oracle's form."""
    sampling = one.sampling
    return Case(one.request_id, one.prompts["target"], answer, one.seed, sampling.temperature, sampling.top_p, LENGTH)


async def test_whole_rows_decode_as_plain_forwards_do(concurrent: ConcurrentAnswers) -> None:
    requests, answers = await concurrent.answers("full")
    tally = Oracle().hold([case(one, answer) for one, answer in zip(requests, answers, strict=True)])
    print(f"{len(answers)} answers: {tally}")  # shown with -rP
    assert tally.places > 5 * len(requests)
    assert tally.near_ties < 0.001 * tally.places


async def test_slices_decode_as_whole_rows_do(concurrent: ConcurrentAnswers) -> None:
    requests, full = await concurrent.answers("full")
    again, sliced = await concurrent.answers("topk")
    assert [one.request_id for one in again] == [one.request_id for one in requests]
    differing = [one for one, a, b in zip(requests, full, sliced, strict=True) if not same(a, b)]
    print(f"{len(full) - len(differing)} of {len(full)} answers from slices equal those from whole rows")
    # Only a draw from a whole distribution may come from the mass that no slice shows; it is below 0.0005 a row.
    assert all(one.sampling.temperature == 1 and one.sampling.top_p == 1 for one in differing)
    assert len(differing) <= 0.001 * len(full)


async def test_other_sessions_change_no_token(
    concurrent: ConcurrentAnswers, trio_engines: Mapping[Role, Engine]
) -> None:
    requests, together = await concurrent.answers("full")
    async with local_service(config("full"), trio_engines) as service:
        for one, expected in list(zip(requests, together, strict=True))[:20]:
            assert all_same(tokens(await decode_all(service.coordinators[0], [one])), [expected])


# -- the same in other circumstances


async def answers_of(service: LocalService, requests: Sequence[Generate], at_once: int) -> list[list[int]]:
    """Decode the requests, so many at a time, and return their tokens."""
    found: list[list[int]] = []
    for begin in range(0, len(requests), at_once):
        found += tokens(await decode_all(service.coordinators[0], requests[begin : begin + at_once]))
    return found


async def test_one_and_sixteen_sessions_decode_alike(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(config("topk"), trio_engines) as service:
        requests = requests_to(service, 10)[::2][:16]
        together, alone = await answers_of(service, requests, 16), await answers_of(service, requests, 1)
        assert all_same(together, alone)


async def test_the_chunks_of_a_prefill_change_no_token(trio_engines: Mapping[Role, Engine]) -> None:
    found = []
    for chunk in (7, 2_048):
        models = {role: {"path": str(WEIGHTS / role), "prefill_chunk": chunk} for role in ROLES}
        async with local_service(trio_config(models=models), trio_engines) as service:
            found.append(await answers_of(service, requests_to(service, 10)[::2], 16))
    assert all_same(*found)


# -- other vocabularies


def with_folder(role: Role, folder: Path, engines: Mapping[Role, Engine]) -> tuple[Any, Mapping[Role, Engine]]:
    """The trio's configuration and engines, with another model in one role."""
    models = {each: {"path": str(folder if each == role else WEIGHTS / each)} for each in ROLES}
    changed = trio_config(models=models)
    return changed, {**engines, role: load_role(changed, role)}


def permuted(folder: Path, role: Role, new_ids: Mapping[int, int]) -> None:
    """Write the role's model with other ids for its added tokens."""
    shutil.copytree(WEIGHTS / role, folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            moved = tensor.clone()
            moved[list(new_ids.values())] = tensor[list(new_ids)]
            weights[name] = moved
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["eos_token_id"] = [new_ids[i] for i in settings["eos_token_id"]]
        settings["pad_token_id"] = new_ids[settings["pad_token_id"]]
        (folder / name).write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert not new_ids.keys() & set(tokenizer["model"]["vocab"].values())
    for token in tokenizer["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


async def test_a_guider_with_other_ids_for_its_special_tokens_guides_alike(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    async with local_service(config("topk"), trio_engines) as service:
        texts = [one.prompts["target"] for one in requests_to(service, 10)]
        expected = await answers_of(service, requests_to(service, 10), 16)
        added = sorted(service.tokenizers["guider"].added_tokens.values())
    permuted(tmp_path / "guider", "guider", dict(zip(added, [*added[2:], *added[:2]], strict=True)))
    changed, engines = with_folder("guider", tmp_path / "guider", trio_engines)
    async with local_service(changed, engines) as service:
        requests = requests_to(service, 10)
        assert [one.prompts["target"] for one in requests] == texts
        assert requests[0].prompts["guider"] != texts[0]
        assert all_same(await answers_of(service, requests, 16), expected)


def target_without_marks(folder: Path) -> Path:
    """A copy of the target to which the marks of thinking are text."""
    shutil.copytree(WEIGHTS / "target", folder / "target")
    file = folder / "target" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "think" not in token["content"]]
    file.write_text(json.dumps(tokenizer))
    return folder / "target"


async def test_a_guider_reads_its_own_token_for_the_end_of_thinking(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    changed, engines = with_folder("target", target_without_marks(tmp_path), trio_engines)
    with watched(engines) as trio:
        async with local_service(changed, trio.engines) as service:
            end = {role: service.tokenizers[role].encode("</think>") for role in ROLES}
            assert len(end["target"]) > len(end["guider"]) == 1
            thinking = Thinking(start="<think>", max_tokens=6)
            one = request(service.tokenizers, chat_prompts(1)[0], thinking=thinking)
            answer = await decode(service.coordinators[0], replace(one, drafts=0))  # no drafts behind what is read
            assert finished(answer).usage.reasoning_tokens == 6 + len(end["target"])
            assert answer.tokens[6 : 6 + len(end["target"])] == end["target"]
            assert "think" not in answer.reasoning + answer.content
            for role in ROLES:
                read = [extend.tokens for extend in trio.watched[role].extends]
                assert any(list(extended[-len(end[role]) :]) == end[role] for extended in read)
                assert sum(end["guider"][0] in extended for extended in read) == (role != "target")


async def test_thinking_that_ends_by_several_tokens_reaches_its_minimum(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    changed, engines = with_folder("target", target_without_marks(tmp_path), trio_engines)
    async with local_service(changed, engines) as service:
        lengths = []
        for least in (0, 120):
            thinking, sampling = Thinking(start="<think>", min_tokens=least), Sampling(max_tokens=160)
            one = request(service.tokenizers, chat_prompts(1)[0], thinking=thinking, sampling=sampling)
            answers = [await decode(service.coordinators[0], replace(one, drafts=drafts)) for drafts in (0, 4)]
            assert answers[0].tokens == answers[1].tokens
            lengths.append(finished(answers[0]).usage.reasoning_tokens)
    assert lengths[0] < 120 <= lengths[1]
