"""The number of drafts in a session's next window."""

from __future__ import annotations

from typing import Any, cast

import pytest

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import Speculation
from actors.coordinator.draft_planner import DraftPlan, DraftPlanner, OwnTime
from actors.coordinator.replica_pool import ForwardTimeModel
from actors.coordinator.session import ActiveSession, LogitsRow, VerificationWindow
from actors.coordinator.stats import CoordinatorMeter
from actors.decoding.session import Session
from actors.preflight import load_tokenizers
from actors.text.vocabularies import VocabularyRegistry
from tests.support.local_service import trio_config

FAR = 1_000
TOKENS = [20, 21, 22, 23]


class Replica:
    """The part of a replica that the planner reads."""

    def __init__(self, seconds: float, per_token: float = 0.0, device: str = "cpu") -> None:
        self.forward_time, self.devices = ForwardTimeModel(), frozenset({device})
        for tokens in range(1, 129):
            self.forward_time.observe(tokens, seconds + per_token * tokens)


@pytest.fixture(scope="module")
def vocabularies() -> VocabularyRegistry:
    return VocabularyRegistry(load_tokenizers(trio_config()))


def session_of(
    planner: DraftPlanner,
    vocabularies: VocabularyRegistry,
    *,
    target: Replica | None = None,
    guider: Replica | None = None,
    base: Replica | None = None,
    sampling: Sampling | None = None,
    **request: Any,
) -> ActiveSession:
    """A session in the middle of its answer, with all but its newest token in every cache."""
    prompts: dict[Role, list[int]] = {role: list(TOKENS) for role in ROLES}
    one = Generate("r", "target", prompts, sampling or Sampling(), Guidance(), Thinking(), 1, **request)
    session = Session(one, vocabularies.vocabulary("target", ROLES, one.thinking), dict.fromkeys(ROLES, 0))
    active = ActiveSession(session, 1, 1, planner.acceptance())
    for stream in session.streams.values():
        stream.hold(len(stream) - 1)
    small, large = Replica(0.002), Replica(0.03)
    replicas = {"target": target or large, "guider": guider or small, "guider_base": base or small}
    active.replicas = cast(Any, replicas)
    return active


def checked(planner: DraftPlanner, active: ActiveSession, drafts: int, kept: int) -> None:
    """Let the planner learn from a window whose first `kept` drafts were accepted."""
    window = VerificationWindow(active, True, {}, "guider", drafts)
    window.rows = [LogitsRow(window, index, 8) for index in range(drafts + 1)]
    window.next = kept + 1
    planner.learn(window)


def test_accepted_drafts_get_longer_and_rejected_ones_stop(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation())
    good, bad = session_of(planner, vocabularies), session_of(planner, vocabularies)
    for _ in range(40):
        checked(planner, good, 7, 7)
        checked(planner, bad, 2, 0)
    assert planner.plan(good, True, FAR, 1).guider_drafts == 7
    plans = [planner.plan(bad, True, FAR, 1).guider_drafts for _ in range(7)]
    assert plans.count(0) >= 6


def test_a_guider_as_slow_as_its_target_drafts_less_than_a_fast_one(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation())
    fast = session_of(planner, vocabularies, guider=Replica(0.002))
    slow = session_of(planner, vocabularies, guider=Replica(0.03))
    assert planner.plan(fast, True, FAR, 1).guider_drafts > planner.plan(slow, True, FAR, 1).guider_drafts == 0


def test_many_sessions_draft_less_than_one_where_tokens_cost_time(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation())
    active = session_of(planner, vocabularies, target=Replica(0.03, per_token=0.003))
    alone, together = (
        planner.plan(active, True, FAR, 1).guider_drafts,
        planner.plan(active, True, FAR, 32).guider_drafts,
    )
    assert alone > together


def test_own_time_of_turns_and_of_rows_is_told_apart() -> None:
    own = OwnTime()
    assert own.seconds(4) == 0
    for turns, rows in ((1, 16), (4, 20), (2, 60), (9, 18)) * 20:
        own.observe(turns, 8, rows, 0.001 * turns + 0.0002 * rows)
    assert own.seconds(1) == pytest.approx(0.001 * 4 / 8 + 0.0002, rel=0.1)
    assert own.seconds(8) == pytest.approx(0.001 * 4 / 8 + 0.0016, rel=0.1)


@pytest.mark.parametrize(("turns", "windows", "least", "most"), [(96, 16, 1.0, 1.2), (1, 64, 3.8, 4.0)])
def test_rows_cost_little_where_a_window_takes_several_turns_and_all_where_many_share_one(
    turns: int, windows: int, least: float, most: float
) -> None:
    own = OwnTime()
    for _ in range(20):
        own.observe(turns, windows, windows, 0.001 * windows)
    assert own.seconds(1) == pytest.approx(0.001, rel=0.01)
    assert least < own.seconds(4) / own.seconds(1) <= most


def test_a_coordinator_that_is_the_bottleneck_drafts_less(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation())
    active = session_of(planner, vocabularies)
    before = planner.plan(active, True, FAR, 32).guider_drafts
    for _ in range(20):
        for drafts in (1, 3):
            checked(planner, active, drafts, 0)
            planner.took(0.004 * (drafts + 1))
    rested = session_of(planner, vocabularies)
    assert before > planner.plan(rested, True, FAR, 32).guider_drafts
    assert planner.plan(rested, True, FAR, 1).guider_drafts > 0


@pytest.mark.parametrize(("configured", "asked", "drafts"), [(7, None, 7), (7, 3, 3), (2, 8, 2), (0, 8, 0), (7, 0, 0)])
def test_request_and_configuration_bound_the_drafts(
    vocabularies: VocabularyRegistry, configured: int, asked: int | None, drafts: int
) -> None:
    planner = DraftPlanner(Speculation(drafts=configured, adapt=False))
    assert planner.plan(session_of(planner, vocabularies, drafts=asked), True, FAR, 1) == DraftPlan(
        guider_drafts=drafts
    )


@pytest.mark.parametrize(
    ("devices", "hidden"),
    [(("a", "b", "c"), True), (("a", "b", "a"), True), (("a", "a", "b"), False), (("a", "b", "b"), False)],
)
def test_the_guider_drafts_on_while_others_verify_where_it_has_its_device_for_itself(
    vocabularies: VocabularyRegistry, devices: tuple[str, str, str], hidden: bool
) -> None:
    planner = DraftPlanner(Speculation())
    target, guider, base = (Replica(s, device=name) for s, name in zip((0.03, 0.002, 0.002), devices, strict=True))
    active = session_of(planner, vocabularies, target=target, guider=guider, base=base)
    plan = planner.plan(active, True, FAR, 1)
    assert plan.guider_drafts > 0
    assert (plan.to_hide > 0) == hidden
    assert planner.plan(active, True, plan.guider_drafts + 1, 1).to_hide == 0  # no room for another window
    assert planner.plan(active, False, FAR, 1).to_hide == 0


def test_nothing_is_drafted_past_the_answers_end_or_the_last_position(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation(adapt=False))
    active = session_of(planner, vocabularies, sampling=Sampling(max_tokens=4))
    assert planner.plan(active, True, FAR, 1).guider_drafts == 3
    assert planner.plan(active, True, 2, 1).guider_drafts == 2
    assert planner.plan(active, True, 0, 1).guider_drafts == 0


def test_a_prefill_and_self_amplifying_penalties_are_not_drafted(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation(adapt=False))
    active = session_of(planner, vocabularies)
    active.session.streams["guider"].append([30] * 20)
    assert planner.plan(active, True, FAR, 1) == DraftPlan()
    lifting = session_of(planner, vocabularies, sampling=Sampling(presence_penalty=-1))
    assert planner.plan(lifting, True, FAR, 1) == DraftPlan()


def test_unguided_drafts_come_from_the_text_unless_the_guider_is_chosen(vocabularies: VocabularyRegistry) -> None:
    planner = DraftPlanner(Speculation(adapt=False))
    active = session_of(planner, vocabularies)
    active.session.streams["target"].append([50, 51, 52, 50, 51])
    active.session.streams["target"].hold(len(active.session.primary) - 1)
    assert planner.plan(active, False, FAR, 1) == DraftPlan(text_drafts=(52, 50, 51))
    assert planner.plan(session_of(planner, vocabularies), False, FAR, 1) == DraftPlan()
    assert planner.plan(session_of(planner, vocabularies, drafter="guider"), False, FAR, 1) == DraftPlan(
        guider_drafts=7
    )
    assert DraftPlanner(Speculation(lookup=False)).plan(active, False, FAR, 1) == DraftPlan()


def test_accepted_drafts_are_counted_and_inform_later_sessions(vocabularies: VocabularyRegistry) -> None:
    meter = CoordinatorMeter()
    planner = DraftPlanner(Speculation(), meter)
    active = session_of(planner, vocabularies)
    before = planner.acceptance()["guider"].rate
    for _ in range(100):
        checked(planner, active, 4, 0)
    assert (active.session.drafted, active.session.accepted) == (400, 0)
    assert (meter.drafted_tokens.value, meter.accepted_tokens.value) == (400, 0)
    assert planner.acceptance()["guider"].rate < before
