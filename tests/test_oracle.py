"""The running service against plain transformers forwards: same seed, same tokens.

The oracle knows transformers, the formula z = z_target + alpha * (z_guider - z_guider_base) and the documented
definition of a choice, and nothing of this project's decoding. At each place of an answer it is asked what it would
have chosen after the tokens before; where all places agree, it would have decoded the same answer.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.decoding.guidance import Guidance
from actors.decoding.parameters import Sampling, Thinking
from actors.forward import Engine
from actors.model import load_role
from actors.requests import ROLES, Generate, Role
from benchmarks.local import WEIGHTS, LocalService, decode, local_service, trio_config
from tests.trio import chat_prompts, decode_all, finished, request, tokens
from tests.watched import watched

LENGTH = 32
NEAR_TIE = 1e-4  # plain forwards differ from the engine's by about 1e-5
SAMPLINGS = (
    Sampling(temperature=0, max_tokens=LENGTH),
    Sampling(temperature=0.6, top_p=0.95, max_tokens=LENGTH),
    Sampling(temperature=1.0, max_tokens=LENGTH),
)
ALPHA = 1.0
FREE_TEXT = ("Once upon a time", "The rival of Ada is", "1, 2, 3,", "Ünïcödé and 漢字", "Who", "def main():\n    ")
PROMPTS = 200
BATCH = 100


# -- the oracle


class Oracle:
    """The trio in transformers, whole rows in float64."""

    def __init__(self) -> None:
        self._models = {role: AutoModelForCausalLM.from_pretrained(WEIGHTS / role).eval() for role in ROLES}
        self._ends = {role: list(model.generation_config.eos_token_id) for role, model in self._models.items()}
        self.end = self._ends["target"][0]

    def rows(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[NDArray[np.float64]]:
        """Per sequence, the combined rows [tokens of the answer, V] that each of its tokens is chosen from."""
        z = {role: self._logits(role, prompts, answers) for role in ROLES}
        return [
            z_target + ALPHA * (z_guider - z_base)
            for z_target, z_guider, z_base in zip(z["target"], z["guider"], z["guider_base"], strict=True)
        ]

    @torch.inference_mode()
    def _logits(
        self, role: Role, prompts: Sequence[list[int]], answers: Sequence[list[int]]
    ) -> list[NDArray[np.float64]]:
        """One plain causal forward over right-padded sequences; the end tokens' probabilities add up in the first."""
        whole = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, whole))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in whole])
        logits = self._models[role](input_ids=ids, use_cache=False).logits
        first, *others = self._ends[role]
        rows = []
        for prompt, answer, z in zip(prompts, answers, logits, strict=True):
            row = z[len(prompt) - 1 : len(prompt) - 1 + len(answer)].double().numpy()
            row[:, first] = np.logaddexp.reduce(row[:, [first, *others]], axis=1)
            row[:, others] = -np.inf if role == "target" else 0.0
            rows.append(row)
        return rows


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise(seed: int, position: int, ids: NDArray[Any]) -> NDArray[np.float64]:
    """Gumbel noise of tokens at a position: 52 hashed bits, in the middle of their interval."""
    golden = 0x9E3779B97F4A7C15
    row = mixed(np.array([(seed + (position + 1) * golden) % 2**64], np.uint64))
    bits = mixed(row + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(golden))
    return np.asarray(-np.log(-np.log(((bits >> np.uint64(12)) + 0.5) / 2**52)))


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the oracle chooses, and by how much it prefers that to the token in question."""

    token: int
    margin: float


def judge(z: NDArray[np.float64], sampling: Sampling, seed: int, position: int, token: int) -> Judgement:
    """The choice from one row: temperature, nucleus, then the largest sum of logit and noise, ties to the lowest id."""
    if sampling.temperature == 0:
        best = int(np.argmax(z))
        return Judgement(best, float(z[best] - z[token]))
    scaled = z / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    count = max(1, int(np.searchsorted(before, sampling.top_p))) if sampling.top_p < 1 else len(order)
    nucleus = np.sort(order[:count])
    scores = scaled[nucleus] + noise(seed, position, nucleus)
    best = int(np.argmax(scores))
    if token in nucleus:
        return Judgement(int(nucleus[best]), float(scores[best] - scores[nucleus == token][0]))
    return Judgement(int(nucleus[best]), float(before[order == token][0] - sampling.top_p))  # how far outside it is


@dataclass
class Tally:
    """What came of holding many answers against the oracle."""

    places: int = 0
    near_ties: int = 0
    largest: float = 0.0  # margin of a place that differs

    def __str__(self) -> str:
        return f"{self.places} places, {self.near_ties} near ties, largest margin {self.largest:.1e}"


def hold(oracle: Oracle, requests: Sequence[Generate], answers: Sequence[list[int]]) -> Tally:
    """Hold every token of every answer against the oracle's choice, and each answer's end against the request."""
    tally = Tally()
    by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompts["target"]) + len(answers[i]))
    for begin in range(0, len(by_length), BATCH):
        batch = by_length[begin : begin + BATCH]
        prompts = [requests[i].prompts["target"] for i in batch]
        for i, rows in zip(batch, oracle.rows(prompts, [answers[i] for i in batch]), strict=True):
            _hold_one(tally, requests[i], answers[i], rows)
            ends = [place for place, token in enumerate(answers[i]) if token == oracle.end]
            assert ends == [len(answers[i]) - 1] or (not ends and len(answers[i]) == LENGTH)
    return tally


def _hold_one(tally: Tally, one: Generate, answer: list[int], rows: NDArray[np.float64]) -> None:
    start = len(one.prompts["target"])
    for place, (token, z) in enumerate(zip(answer, rows, strict=True)):
        judgement = judge(z, one.sampling, one.seed, start + place, token)
        tally.places += 1
        if judgement.token != token:
            assert judgement.margin < NEAR_TIE, (one.request_id, place, token, judgement)
            tally.near_ties += 1
            tally.largest = max(tally.largest, judgement.margin)


# -- the service


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def config(mode: str, **exchange: Any) -> Any:
    return trio_config(exchange={"mode": mode, **exchange}, coordinator={"max_sessions": 600, "max_waiting": 600})


def requests_to(service: LocalService, prompts: int = PROMPTS) -> list[Generate]:
    """Every prompt with every way of sampling: questions of two and three hops, and free text."""
    texts = [(text, True) for hops in (2, 3) for text in chat_prompts(prompts * 2 // 5, hops)]
    texts += [(f"{FREE_TEXT[i % len(FREE_TEXT)]} {i}", False) for i in range(prompts - len(texts))]
    return [
        request(service.tokenizers, text, sampling=sampling, seed=1_000 * way + i, chat=chat, guidance=Guidance(ALPHA))
        for way, sampling in enumerate(SAMPLINGS)
        for i, (text, chat) in enumerate(texts)
    ]


class Company:
    """What the service answered to all requests at once, by exchange; decoded when first asked for."""

    def __init__(self, engines: Mapping[Role, Engine]) -> None:
        self._engines = engines
        self._answers: dict[str, tuple[list[Generate], list[list[int]]]] = {}

    async def answers(self, mode: str) -> tuple[list[Generate], list[list[int]]]:
        """The requests, shuffled, and their tokens."""
        if mode not in self._answers:
            async with local_service(config(mode), self._engines) as service:
                requests = requests_to(service)
                random.Random(0).shuffle(requests)
                self._answers[mode] = requests, tokens(await decode_all(service.coordinators[0], requests))
        return self._answers[mode]


@pytest.fixture(scope="module")
def company(trio_engines: Mapping[Role, Engine]) -> Company:
    return Company(trio_engines)


async def test_whole_rows_decode_as_plain_forwards_do(oracle: Oracle, company: Company) -> None:
    requests, answers = await company.answers("full")
    tally = hold(oracle, requests, answers)
    print(f"{len(answers)} answers: {tally}")  # shown with -rP
    assert tally.places > 5 * len(requests)
    assert tally.near_ties < 0.001 * tally.places


async def test_slices_decode_as_whole_rows_do(company: Company) -> None:
    requests, full = await company.answers("full")
    again, sliced = await company.answers("topk")
    assert [one.request_id for one in again] == [one.request_id for one in requests]
    differing = [one for one, a, b in zip(requests, full, sliced, strict=True) if a != b]
    print(f"{len(full) - len(differing)} of {len(full)} answers from slices equal those from whole rows")
    # Only a draw from a whole distribution may come from the mass that no slice shows; it is below 0.002 a row.
    assert all(one.sampling.temperature == 1 and one.sampling.top_p == 1 for one in differing)
    assert len(differing) <= 0.005 * len(full)


async def test_company_changes_no_token(company: Company, trio_engines: Mapping[Role, Engine]) -> None:
    requests, together = await company.answers("full")
    async with local_service(config("full"), trio_engines) as service:
        for one, expected in list(zip(requests, together, strict=True))[:20]:
            assert tokens(await decode_all(service.coordinators[0], [one])) == [expected]


# -- the same in other circumstances


async def answers_of(service: LocalService, requests: Sequence[Generate], at_once: int) -> list[list[int]]:
    """Tokens of the requests, so many of them side by side."""
    found: list[list[int]] = []
    for begin in range(0, len(requests), at_once):
        found += tokens(await decode_all(service.coordinators[0], requests[begin : begin + at_once]))
    return found


async def test_one_and_sixteen_sessions_decode_alike(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(config("topk"), trio_engines) as service:
        requests = requests_to(service, 10)[::2][:16]
        assert await answers_of(service, requests, 16) == await answers_of(service, requests, 1)


async def test_the_chunks_of_a_prefill_change_no_token(trio_engines: Mapping[Role, Engine]) -> None:
    found = []
    for chunk in (7, 2_048):
        models = {role: {"path": str(WEIGHTS / role), "prefill_chunk": chunk} for role in ROLES}
        async with local_service(trio_config(models=models), trio_engines) as service:
            found.append(await answers_of(service, requests_to(service, 10)[::2], 16))
    assert found[0] == found[1]


# -- other vocabularies


def with_folder(role: Role, folder: Path, engines: Mapping[Role, Engine]) -> tuple[Any, Mapping[Role, Engine]]:
    """The trio's configuration and engines with another model in one role."""
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
        assert await answers_of(service, requests, 16) == expected


async def test_a_target_that_spells_the_thinkings_end_lets_the_guider_read_its_own_token(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    shutil.copytree(WEIGHTS / "target", tmp_path / "target")
    file = tmp_path / "target" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "think" not in token["content"]]
    file.write_text(json.dumps(tokenizer))
    changed, engines = with_folder("target", tmp_path / "target", trio_engines)
    with watched(engines) as trio:
        async with local_service(changed, trio.engines) as service:
            end = {role: service.tokenizers[role].encode("</think>") for role in ROLES}
            assert len(end["target"]) > len(end["guider"]) == 1
            thinking = Thinking(start="<think>", max_tokens=6)
            one = request(service.tokenizers, chat_prompts(1)[0], thinking=thinking)
            answer = await decode(service.coordinators[0], one)
            assert finished(answer).usage.reasoning_tokens == 6 + len(end["target"])
            assert answer.tokens[6 : 6 + len(end["target"])] == end["target"]
            assert "think" not in answer.reasoning + answer.content
            for role in ROLES:
                read = [extend.tokens for extend in trio.watched[role].extends]
                assert any(list(extended[-len(end[role]) :]) == end[role] for extended in read)
                assert sum(end["guider"][0] in extended for extended in read) == (role != "target")
