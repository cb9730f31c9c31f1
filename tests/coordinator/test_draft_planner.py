"""How many drafts a session's next check gets."""

from __future__ import annotations

from typing import Any, cast

import pytest

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import Speculation
from actors.coordinator.draft_planner import Plan, Planner
from actors.coordinator.replica_pool import Pace
from actors.coordinator.session import Live, Row, Window
from actors.decoding.session import Session
from actors.preflight import load_tokenizers
from actors.text.vocabularies import Languages
from tests.support.local_service import trio_config

FAR = 1_000
TOKENS = [20, 21, 22, 23]


class Replica:
    """The part of a replica that the planner reads."""

    def __init__(self, seconds: float, per_token: float = 0.0) -> None:
        self.pace = Pace()
        for tokens in range(1, 129):
            self.pace.observe(tokens, seconds + per_token * tokens)


@pytest.fixture(scope="module")
def languages() -> Languages:
    return Languages(load_tokenizers(trio_config()))


def session_of(
    planner: Planner,
    languages: Languages,
    *,
    target: Replica | None = None,
    guider: Replica | None = None,
    sampling: Sampling | None = None,
    **request: Any,
) -> Live:
    """A session in the middle of its answer: everything but its newest token is in every cache."""
    prompts: dict[Role, list[int]] = {role: list(TOKENS) for role in ROLES}
    one = Generate("r", "target", prompts, sampling or Sampling(), Guidance(), Thinking(), 1, **request)
    session = Session(one, languages.language("target", ROLES, one.thinking), dict.fromkeys(ROLES, 0))
    live = Live(session, 1, 1, planner.acceptance())
    for stream in session.streams.values():
        stream.held = len(stream) - 1
    replicas = {"target": target or Replica(0.03), "guider": guider or Replica(0.002), "guider_base": Replica(0.002)}
    live.replicas = cast(Any, replicas)
    return live


def checked(planner: Planner, live: Live, drafts: int, kept: int) -> None:
    """A check of drafts is over, of which the first `kept` were kept."""
    window = Window(live, True, {}, "guider", drafts)
    window.rows = [Row(window, index, 8) for index in range(drafts + 1)]
    window.next = kept + 1
    planner.learn(window)


def test_cheap_drafts_that_are_kept_grow_long_and_those_that_are_not_cease(languages: Languages) -> None:
    planner = Planner(Speculation())
    good, bad = session_of(planner, languages), session_of(planner, languages)
    for _ in range(40):
        checked(planner, good, 7, 7)
        checked(planner, bad, 2, 0)
    assert planner.plan(good, True, FAR, 1).drafts == 7
    plans = [planner.plan(bad, True, FAR, 1).drafts for _ in range(7)]
    assert plans.count(0) >= 6


def test_a_guider_as_slow_as_its_target_drafts_less_than_a_fast_one(languages: Languages) -> None:
    planner = Planner(Speculation())
    fast = session_of(planner, languages, guider=Replica(0.002))
    slow = session_of(planner, languages, guider=Replica(0.03))
    assert planner.plan(fast, True, FAR, 1).drafts > planner.plan(slow, True, FAR, 1).drafts == 0


def test_where_each_token_of_a_check_costs_a_crowd_drafts_less_than_one(languages: Languages) -> None:
    planner = Planner(Speculation())
    live = session_of(planner, languages, target=Replica(0.03, per_token=0.003))
    alone, crowded = planner.plan(live, True, FAR, 1).drafts, planner.plan(live, True, FAR, 32).drafts
    assert alone > crowded


@pytest.mark.parametrize(("configured", "asked", "drafts"), [(7, None, 7), (7, 3, 3), (2, 8, 2), (0, 8, 0), (7, 0, 0)])
def test_request_and_configuration_bound_the_drafts(
    languages: Languages, configured: int, asked: int | None, drafts: int
) -> None:
    planner = Planner(Speculation(drafts=configured, adapt=False))
    assert planner.plan(session_of(planner, languages, drafts=asked), True, FAR, 1) == Plan(drafts=drafts)


def test_nothing_is_drafted_past_the_answers_end_or_the_last_position(languages: Languages) -> None:
    planner = Planner(Speculation(adapt=False))
    live = session_of(planner, languages, sampling=Sampling(max_tokens=4))
    assert planner.plan(live, True, FAR, 1).drafts == 3
    assert planner.plan(live, True, 2, 1).drafts == 2
    assert planner.plan(live, True, 0, 1).drafts == 0


def test_nothing_is_drafted_behind_a_prompt_or_for_words_that_lift_themselves(languages: Languages) -> None:
    planner = Planner(Speculation(adapt=False))
    live = session_of(planner, languages)
    live.session.streams["guider"].append([30] * 20)
    assert planner.plan(live, True, FAR, 1) == Plan()
    lifting = session_of(planner, languages, sampling=Sampling(presence_penalty=-1))
    assert planner.plan(lifting, True, FAR, 1) == Plan()


def test_without_guidance_the_text_guesses_unless_the_guider_is_asked_for(languages: Languages) -> None:
    planner = Planner(Speculation(adapt=False))
    live = session_of(planner, languages)
    live.session.streams["target"].append([50, 51, 52, 50, 51])
    live.session.streams["target"].held = len(live.session.primary) - 1
    assert planner.plan(live, False, FAR, 1) == Plan(guesses=(52, 50, 51))
    assert planner.plan(session_of(planner, languages), False, FAR, 1) == Plan()
    assert planner.plan(session_of(planner, languages, drafter="guider"), False, FAR, 1) == Plan(drafts=7)
    assert Planner(Speculation(lookup=False)).plan(live, False, FAR, 1) == Plan()


def test_what_becomes_of_drafts_is_counted_and_taught_to_later_sessions(languages: Languages) -> None:
    planner = Planner(Speculation())
    live = session_of(planner, languages)
    before = planner.acceptance()["guider"].rate
    for _ in range(100):
        checked(planner, live, 4, 0)
    assert (live.session.drafted, live.session.accepted) == (400, 0)
    assert (planner.drafted, planner.accepted) == (400, 0)
    assert planner.acceptance()["guider"].rate < before
