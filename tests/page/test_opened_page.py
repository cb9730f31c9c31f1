"""The page of recorded answers, opened from a file in a real browser without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.config import ServiceConfig
from cluster.page.html import build
from cluster.page.record import record_file
from cluster.page.recording import read_recordings
from tests.support.browsing import SCRIPT, ScriptedService, part, serving, states
from tests.support.local_service import trio_config

RECORDINGS = read_recordings()
EMBEDDED = next(recording for recording in RECORDINGS if recording["name"] == "embedded-trio")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
MODES = ("target", "guider", "guided")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as the repository builds it."""
    file = tmp_path_factory.mktemp("page") / "playground.html"
    file.write_text(build(), encoding="utf-8")
    return file


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens files, each in an offline context of its own. Fails on messages of the browser and on other requests."""
    contexts: list[Any] = []
    messages: list[str] = []
    requested: set[str] = set()

    def opened(file: Path, fragment: str = "", *, frozen: bool = False, **options: Any) -> Any:
        """frozen: the page's timers run only by `page.clock.run_for`."""
        contexts.append(browser.new_context(**{"viewport": DESKTOP, "offline": True} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("console", lambda message: messages.append(message.text))
        page.on("request", lambda request: requested.add(re.sub("[:#].*", "", request.url)))
        if frozen:
            page.clock.install(time=0)
        page.goto(file.as_uri() + fragment)
        page.locator(".examples button").first.wait_for()
        if frozen:
            page.clock.pause_at(10_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert messages == []
    assert requested <= {"file", "data"}


def play(page: Any, number: int = 0) -> None:
    """Play the answers to a recorded question."""
    page.locator(".examples button").nth(number).click()


def recorded_text(number: int, mode: str, recording: dict[str, Any] = EMBEDDED) -> str:
    """The whole text of a recorded answer, with its thinking."""
    chunks = recording["questions"][number]["answers"][mode]["chunks"]
    return "".join(thought + content for _, thought, content, _ in chunks)


def shown_text(page: Any, mode: str) -> str:
    """The whole text of a shown answer; the guided one with the marks of its thinking."""
    return "".join(part(page, mode, name).text_content() for name in (".thinking .text", ".answer"))


def without_marks(text: str) -> str:
    """A text without the marks of its thinking."""
    return re.sub("</?think>", "", text)


def transcript(page: Any) -> dict[str, Any]:
    """All that the page shows of a complete answer but times: texts, counts, and the panel of each token."""
    part(page, "guided", "summary").click()
    panels = []
    for token in part(page, "guided", ".text .token").all():
        token.click()
        panels.append([token.text_content(), token.get_attribute("class"), page.locator("#inspector").inner_text()])
    page.keyboard.press("Escape")
    return {
        "states": page.locator(".state").all_inner_texts(),
        "models": page.locator(".model").all_inner_texts(),
        "thinking": page.locator(".thinking .text").all_text_contents(),
        "answers": page.locator(".answer").all_text_contents(),
        "strip": page.locator(".strip rect").evaluate_all(
            "all => all.map(bar => [bar.getAttribute('class'), Number(bar.getAttribute('height')).toFixed(4)])"
        ),
        "numbers": re.findall(r"(tokens|changed|drafts kept)\n(\S.*)", part(page, "guided", ".numbers").inner_text()),
        "panels": panels,
    }


def test_the_recorded_page_shows_what_the_live_page_showed(
    browser: Any, visit: Callable[..., Any], tmp_path: Path
) -> None:
    config: ServiceConfig = trio_config(name="thinklogit", router={"examples": ["Why?"]})
    asked = {
        "title": "Scripted",
        "about": "For this test.",
        "models": {"target": "T", "guider": "G", "guider_base": "B"},
        "settings": {"max_tokens": 64},
        "questions": [{"question": "Why?", "gold": "So."}],
    }
    (tmp_path / "asked.yaml").write_text(json.dumps(asked))
    with serving(ScriptedService(config, SCRIPT).create) as url:
        live = browser.new_page(viewport=DESKTOP)
        live.goto(url)
        live.get_by_label("Your question").fill("Why?")
        live.get_by_role("button", name="Ask").click()
        states(live, "done")
        expected = transcript(live)
        live.close()
        with ThreadPoolExecutor(1) as thread:  # this one runs the browser's event loop
            assert thread.submit(record_file, tmp_path / "asked.yaml", url).result() == 0
    file = tmp_path / "page.html"
    file.write_text(build(read_recordings(tmp_path)), encoding="utf-8")
    page = visit(file)
    play(page)
    states(page, "done")
    assert len(expected["panels"]) == 8
    assert transcript(page) == expected


def test_answers_play_token_by_token(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, frozen=True)
    play(page, 4)
    for count in (10, 20):
        page.clock.run_for(40 * 10)
        assert count - 1 <= part(page, "guided", ".strip rect").count() <= count, "the newest may await its text"
    assert part(page, "guided", ".state").inner_text() == "thinking"
    page.clock.run_for(40 * 200)
    states(page, "done")


def test_the_rest_of_the_answers_is_shown_at_once(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, frozen=True)
    button = page.get_by_role("button", name="Show at once")
    assert button.is_visible() is False
    play(page, 4)
    page.clock.run_for(40)
    button.click()
    page.clock.run_for(40)
    states(page, "done")
    assert button.is_visible() is False
    assert page.evaluate("document.activeElement.id") == "prompt", "the focus stays in the form"


def test_nothing_moves_for_readers_who_prefer_reduced_motion(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, frozen=True, reduced_motion="reduce")
    play(page)
    states(page, "done")


def test_stop_ends_the_playing_answers(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, frozen=True)
    play(page, 4)
    page.clock.run_for(40)
    page.keyboard.press("Escape")
    page.clock.run_for(40)
    states(page, "stopped")
    play(page, 0)
    page.clock.run_for(40 * 200)
    states(page, "done")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_recorded_answer_opens_its_candidates(visit: Callable[..., Any], file: Path, size: dict[str, int]) -> None:
    page = visit(file, "#embedded-trio", viewport=size, has_touch=size is PHONE)
    play(page, 2)
    assert page.get_by_label("Recorded question").input_value() == EMBEDDED["questions"][2]["question"]
    states(page, "done")
    assert page.get_by_text(f"The right answer: {EMBEDDED['questions'][2]['gold']}", exact=True).is_visible()
    for mode in MODES:
        assert without_marks(shown_text(page, mode)) == without_marks(recorded_text(2, mode))
    part(page, "guided", "summary").click()
    token = part(page, "guided", ".token.changed").first
    token.tap() if size is PHONE else token.click()
    tip = page.get_by_role("tooltip")
    titles = tip.locator("h3").all_inner_texts()
    assert titles == ["Target alone", "Guider alone", "Guided"]
    assert tip.locator("li.chosen").count() >= 1
    panel = tip.bounding_box()
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= size["width"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls down only"


def test_a_note_names_models_settings_date_and_command(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, "#embedded-trio")
    note = page.get_by_role("region", name="Recording").inner_text()
    for fact in (
        *("Recorded answers: nothing is computed here.", EMBEDDED["title"], EMBEDDED["about"], EMBEDDED["date"]),
        *(EMBEDDED["command"], *EMBEDDED["models"].values(), "temperature 0", "α 1", f"{EMBEDDED['cores']} CPU cores"),
    ):
        assert fact in note


def test_only_the_recorded_questions_can_be_asked(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, "#embedded-trio")
    questions = page.get_by_role("list", name="Questions").get_by_role("button").all_inner_texts()
    assert questions == [question["question"] for question in EMBEDDED["questions"]]
    assert page.get_by_label("Recorded question").is_editable() is False
    for label in ("Strength", "Warm-up", "Temperature", "Longest answer", "Seed"):
        assert page.get_by_label(label).is_visible() is False, label
    assert page.get_by_role("button", name="API key").count() == 0


def test_another_recording_is_chosen_by_a_link(visit: Callable[..., Any], tmp_path: Path) -> None:
    other = {**EMBEDDED, "name": "other", "title": "Another trio", "questions": EMBEDDED["questions"][3:]}
    file = tmp_path / "page.html"
    file.write_text(build([EMBEDDED, other]), encoding="utf-8")
    page = visit(file)
    prompt = page.get_by_label("Recorded question")
    assert prompt.input_value() == EMBEDDED["questions"][0]["question"]
    page.get_by_role("link", name="Another trio").click()
    page.locator("a[aria-current]", has_text="Another trio").wait_for()
    assert prompt.input_value() == other["questions"][0]["question"]
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Play").click()
    states(page, "done")
    assert without_marks(shown_text(page, "guided")) == without_marks(recorded_text(0, "guided", other))


def test_the_page_works_with_the_keyboard_alone(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, "#embedded-trio", reduced_motion="reduce")
    page.get_by_label("Recorded question").focus()
    page.keyboard.press("Enter")
    states(page, "done")
    part(page, "guided", "summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    tip = page.get_by_role("tooltip").inner_text()
    assert "The target alone prefers" in tip
    page.keyboard.press("Escape")
    assert page.get_by_role("tooltip").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_passes_the_accessibility_rules(
    visit: Callable[..., Any], tmp_path: Path, scheme: str, size: dict[str, int]
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    file = tmp_path / "page.html"
    file.write_text(build([EMBEDDED, {**EMBEDDED, "name": "other", "title": "Another trio"}]), encoding="utf-8")
    page = visit(file, color_scheme=scheme, viewport=size, reduced_motion="reduce")
    play(page)
    states(page, "done")
    for summary in page.locator("summary:visible").all():
        summary.click()
    part(page, "guided", ".token.changed").first.click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
