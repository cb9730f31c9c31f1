"""The jobs' client: the requests that it builds, and how it repeats them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from actors.api.generation import ROLES, Delta, Event, Finished, Generate, Rejected, Usage
from actors.config import ConfigError
from actors.preflight import load_tokenizers
from cluster.jobs import client as client_module
from cluster.jobs.client import LOSSES, Client, Item, Unanswered
from cluster.jobs.config import UNGUIDED, Arm, checked
from cluster.jobs.sample import ALONE
from cluster.jobs.task_loading import Problem, Task
from router.backend import Overloaded, Status, Unavailable
from tests.support.local_service import trio_config
from tests.support.watched import until

CONFIG = trio_config()
TOKENIZERS = load_tokenizers(CONFIG)
USAGE = Usage(5, 2, 0, 0, 0, 0, 0.0)
END = Finished("stop", USAGE)
Script = Callable[[], AsyncIterator[Event]]


class Scripted:
    """A backend that replays scripted attempts; the last is repeated."""

    def __init__(self, *attempts: list[Event | Exception]) -> None:
        self.attempts, self.requests = list(attempts), 0
        self.closed = 0

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        attempt = self.attempts[min(self.requests, len(self.attempts) - 1)]
        self.requests += 1
        try:
            for event in attempt:
                if isinstance(event, Exception):
                    raise event
                yield event
                await asyncio.sleep(0)
        finally:
            self.closed += 1

    async def status(self) -> Status:
        return Status()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 1e-4)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE_S", 1e-3)


def task(**keys: Any) -> Task:
    demo = {"hops": [2], "split": "held_out", "n": 4}
    given: dict[str, Any] = {
        "name": "questions",
        "data": {"demo": demo},
        "prompt": "{question}",
        "style": "chat",
        "grader": "multihop",
        "samples": 1,
        "max_tokens": 30,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    return Task.model_validate(given | keys)


def item(arm: Arm | None = None, seed: int = 0, number: int = 0, problem: str = "7", **keys: Any) -> Item:
    text = "Who is the rival of Ada?"
    return Item(task(**keys), Problem(problem, text, "Ben", text), arm or guided(), seed, number)


def guided(**keys: Any) -> Arm:
    return checked({"run": "x", "tasks": ["multihop"], "modes": ["guided"]} | keys).arms()[0]


def client(backend: Scripted, **keys: Any) -> Client:
    return Client(backend, CONFIG, TOKENIZERS, **keys)


def test_a_samples_seed_is_shared_by_its_modes_and_settings_only() -> None:
    alone = Arm("target", ALONE, UNGUIDED)
    assert item(alone).choice_seed == item(guided(alpha=[0.5])).choice_seed
    others = [item(seed=1), item(number=1), item(problem="8"), item(name="others")]
    assert len({item().choice_seed, *(other.choice_seed for other in others)}) == 5
    assert item().choice_seed == 18060674801305240028  # another hash would change the samples of a resumed run


def test_chat_uses_each_roles_template_and_raw_text_is_unchanged() -> None:
    backend = Scripted([END])
    chat, raw = client(backend).request(item()), client(backend).request(item(style="raw"))
    assert set(chat.prompts) == set(raw.prompts) == set(ROLES)
    for role in ROLES:
        tokenizer = TOKENIZERS[role]
        messages = [{"role": "user", "content": "Who is the rival of Ada?"}]
        assert chat.prompts[role] == tokenizer.encode(tokenizer.render(messages))
        assert tokenizer.decode(raw.prompts[role]).strip() == "Who is the rival of Ada?"


@pytest.mark.parametrize("mode", ROLES)
def test_a_role_alone_gets_its_own_prompt_and_no_guidance(mode: Any) -> None:
    request = client(Scripted([END])).request(item(Arm(mode, ALONE, UNGUIDED)))
    assert request.primary == mode
    assert set(request.prompts) == {mode}
    assert request.guidance.never_guides()


def test_sampling_comes_from_the_task_and_guidance_from_the_arm() -> None:
    request = client(Scripted([END]), drafts=3).request(item(guided(alpha=[0.5], warmup_tokens=[8]), stop=["\n\n"]))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 0.95, 30)
    assert sampling.stop == ("\n\n",)
    assert (request.guidance.alpha, request.guidance.warmup_tokens, request.drafts) == (0.5, 8, 3)


def test_a_request_that_does_not_fit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"questions, problem 7, guided a1: .*ask for at most"):
        client(Scripted([END])).request(item(max_tokens=10_000_000))


async def test_lost_and_refused_requests_are_repeated_without_duplicate_text() -> None:
    received: list[int] = []
    backend = Scripted(
        [Rejected("overloaded", "full", 1.0)],
        [Rejected("unavailable", "a role is away")],
        [Overloaded("full")],
        [Delta(content="Ben", tokens=[1]), Unavailable("the coordinator was lost")],
        [Delta(content="Ben", tokens=[1]), Finished("error", USAGE, error="a model was lost")],
        [Delta(content="Ben", tokens=[1])],
        [Delta(content="Ben", tokens=[1]), Delta(content=".", tokens=[2]), END],
    )
    answer = await client(backend, on_tokens=received.append).answer_item(item())
    assert (answer.text, answer.tokens, answer.end) == ("Ben.", (1, 2), END)
    assert backend.requests == backend.closed == 7


async def test_the_mark_between_thinking_and_answer_is_part_of_the_text() -> None:
    backend = Scripted([Delta(reasoning="He is Ben."), Delta(content="The answer is Ben."), END])
    assert (await client(backend).answer_item(item())).text == "He is Ben.</think>The answer is Ben."


async def test_an_unavailable_service_ends_the_run_after_patience_s() -> None:
    backend = Scripted([Rejected("unavailable", "the guider is away")])
    with pytest.raises(Unanswered, match="the guider is away"):
        await client(backend, patience_s=0.02).answer_item(item())
    assert backend.requests > 1


async def test_an_answer_that_is_always_lost_ends_the_run() -> None:
    backend = Scripted([Delta(content="B", tokens=[1]), Finished("error", USAGE, error="not finished within 5 s")])
    with pytest.raises(Unanswered, match="not finished within 5 s"):
        await client(backend).answer_item(item())
    assert backend.requests == LOSSES


async def test_a_refusal_of_the_request_itself_is_not_repeated() -> None:
    backend = Scripted([Rejected("invalid", "the prompt is empty")])
    with pytest.raises(ConfigError, match="the prompt is empty"):
        await client(backend).answer_item(item())
    assert backend.requests == 1


async def test_cancelling_closes_the_generation() -> None:
    class Endless(Scripted):
        async def generate(self, request: Generate) -> AsyncIterator[Event]:
            self.requests += 1
            try:
                while True:
                    yield Delta(content="B", tokens=[1])
                    await asyncio.sleep(0.001)
            finally:
                self.closed += 1

    backend = Endless()
    answering = asyncio.create_task(client(backend).answer_item(item()))
    await until(lambda: backend.requests > 0)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert backend.closed == 1
