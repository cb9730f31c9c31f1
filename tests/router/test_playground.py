"""The playground: its files over HTTP, and the page in a real browser with the embedded trio or a scripted service."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.api.generation import ROLES, Role
from actors.replica.engine_thread import Engine
from cluster.demo.task import questions
from router.playground import FOLDER
from tests.support.browsing import SCRIPT, HoldingBackend, ScriptedService, explained, part, serving, states, trio
from tests.support.deadlines import HANG_S
from tests.support.local_service import trio_config
from tests.support.scripted_service import ScriptedBackend, client, config

SCREENSHOTS = "PLAYGROUND_SCREENSHOTS"  # environment variable: if set, the pictures of docs/ are taken
DOCS = Path(__file__).parent.parent.parent / "docs"
QUESTION = questions("held_out", 3, 1)[0]
EXAMPLES = ("Who is the mentor of the rival of Ada?", "Who is the doctor of the mentor of the doctor of Rosa?")
SHOWN = "Who is the neighbour of the doctor of the neighbour of the mentor of Uma?"  # question in the pictures
CONFIG = trio_config(name="thinklogit", router={"examples": EXAMPLES})
MODES = {"target": "thinklogit/target", "guider": "thinklogit/guider", "guided": "thinklogit"}


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """True if the condition becomes true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


async def test_the_page_uses_only_its_own_files() -> None:
    async with client(ScriptedBackend()) as http:
        page = await http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
        assert {"playground/app.js", "playground/style.css", "playground/icon.svg"} <= {*named}
        for name in {*named, *(f"playground/{path.name}" for path in FOLDER.iterdir())}:
            file = await http.get(f"/{name}")
            assert file.status_code == 200, name
            policy = file.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
            assert "unsafe" not in policy
            assert file.headers["x-content-type-options"] == "nosniff"
            assert {*re.findall(r"https?://[^\"' ]+", file.text)} <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script(?![^>]* src=)|<style|\bstyle=|\bon[a-z]+=", page.text), "nothing inline"


async def test_an_unchanged_file_is_not_sent_again() -> None:
    async with client(ScriptedBackend()) as http:
        first = await http.get("/playground/app.js")
        assert first.headers["cache-control"] == "no-cache"
        again = await http.get("/playground/app.js", headers={"If-None-Match": f"W/{first.headers['etag']}"})
        assert (again.status_code, again.content) == (304, b"")
        other = await http.get("/playground/style.css", headers={"If-None-Match": first.headers["etag"]})
        assert other.status_code == 200


async def test_only_the_pages_files_are_served() -> None:
    async with client(ScriptedBackend()) as http:
        for name in ("playground.py", "..%2Fapi.py", "../api.py", "%2e%2e/api.py"):
            refused = await http.get(f"/playground/{name}")
            assert refused.status_code == 404, name
            assert refused.json()["error"]["type"] == "invalid_request_error"


async def test_the_playground_can_be_disabled() -> None:
    async with client(ScriptedBackend(), config(router={"playground": False})) as http:
        for path in ("/", "/playground/app.js", "/playground/defaults.json"):
            assert (await http.get(path)).status_code == 404


async def test_the_settings_start_with_the_services_defaults() -> None:
    service = config(
        guidance={"alpha": 0.7, "warmup_tokens": 100}, sampling={"temperature": 0.6}, router={"examples": ["Why?"]}
    )
    async with client(ScriptedBackend(), service) as http:
        defaults = (await http.get("/playground/defaults.json")).json()
    assert defaults == {
        "alpha": 0.7,
        "warmup_tokens": 100,
        "temperature": 0.6,
        "max_tokens": None,
        "examples": ["Why?"],
    }


@pytest.fixture(scope="module")
def made() -> list[HoldingBackend]:
    """Receives the backend of `url` when it runs."""
    return []


@pytest.fixture(scope="module")
def url(browser: Any, trio_engines: Mapping[Role, Engine], made: list[HoldingBackend]) -> Iterator[str]:
    """The embedded trio behind the whole HTTP side."""
    with serving(trio(CONFIG, trio_engines, made)) as url:
        yield url


@pytest.fixture
def script() -> ScriptedService:
    return ScriptedService(CONFIG, SCRIPT)


@pytest.fixture
def scripted(browser: Any, script: ScriptedService) -> Iterator[str]:
    with serving(script.create) as url:
        yield url


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, each in a context of its own. Fails on script errors and on requests to other hosts."""
    contexts: list[Any] = []
    messages: list[str] = []
    origins: set[str] = set()

    def opened(url: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("console", lambda message: messages.append(message.text))
        page.on("request", lambda request: origins.add(re.sub(r"(//[^/]*).*", r"\1", request.url)))
        page.goto(url)
        page.locator(".examples button").first.wait_for()
        assert origins == {url}
        return page

    yield opened
    for context in contexts:
        context.close()
    refusals = "Failed to load resource"  # the browser's own message for a 401 or 429
    assert [text for text in messages if refusals not in text] == []


def ask(page: Any, text: str = QUESTION.text) -> None:
    """Type a question, at temperature 0, and send it."""
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Your question").fill(text)
    page.get_by_role("button", name="Ask").click()


def answered(url: str, model: str) -> dict[str, Any]:
    """The API's answer to the question."""
    message = {"role": "user", "content": QUESTION.text}
    body = {"model": model, "messages": [message], "temperature": 0, "guidance": {"explain": True}}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=HANG_S).raise_for_status().json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def test_a_question_is_answered_in_three_modes_side_by_side(url: str, visit: Callable[..., Any]) -> None:
    page = visit(url)
    ask(page)
    states(page, "done")
    shown = {}
    for mode, model in MODES.items():
        assert part(page, mode, ".model").inner_text() == model
        choice = answered(url, model)
        thought, _, rest = choice["message"]["content"].rpartition("</think>")
        assert part(page, mode, ".answer").text_content() == rest
        assert part(page, mode, ".thinking").is_visible() is bool(thought)
        assert part(page, mode, ".thinking .text").is_visible() is False, "the thinking is folded"
        shown[mode] = rest
    assert shown["guided"] == QUESTION.direct_answer
    assert shown["target"] != QUESTION.direct_answer
    part(page, "guided", "summary").click()
    assert QUESTION.thinking in part(page, "guided", ".thinking .text").inner_text()
    lefts = [page.locator(f"[data-kind={mode}]").bounding_box()["x"] for mode in MODES]
    assert lefts == sorted({*lefts}), "side by side"


def test_tokens_changed_by_guidance_are_marked_and_explained(url: str, visit: Callable[..., Any]) -> None:
    page = visit(url)
    ask(page)
    states(page, "done")
    tokens = answered(url, MODES["guided"])["guidance"]["tokens"]
    changed = [token["text"] for token in tokens if token["changed"]]
    part(page, "guided", "summary").click()
    marked = part(page, "guided", ".text .token.changed")
    assert changed
    assert marked.all_text_contents() == [text.lstrip() for text in changed]
    shown = part(page, "guided", ".text .token").all_text_contents()
    assert [*shown, ""] == [token["text"].lstrip() for token in tokens]
    assert part(page, "guided", ".strip rect").count() == len(tokens)
    assert part(page, "target", ".token:visible").count() == 0
    tip = page.get_by_role("tooltip")
    assert tip.count() == 0
    marked.first.hover()
    tip.wait_for()
    assert changed[0] in tip.inner_text()
    assert "The target alone prefers" in tip.inner_text()
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")
    numbers = part(page, "guided", ".numbers").inner_text()
    assert re.search(rf"tokens\n{len(tokens)}\n", numbers)
    assert re.search(r"drafts kept\n\d+ % of \d+", numbers)


def test_stop_ends_every_generation(url: str, made: list[HoldingBackend], visit: Callable[..., Any]) -> None:
    page = visit(url)
    stop = page.get_by_role("button", name="Stop")
    assert stop.is_visible() is False
    made[0].holding = True
    try:
        ask(page)
        states(page, "answering")
        stop.click()
        states(page, "stopped")
        for _ in MODES:
            assert made[0].left.acquire(timeout=HANG_S), "the service ends all three"
        replicas = made[0].service.replicas
        assert within(10, lambda: not any(replicas[role].load().sessions for role in ROLES))
    finally:
        made[0].holding = False
    assert stop.is_visible() is False
    ask(page)
    states(page, "done")
    assert part(page, "guided", ".answer").text_content() == QUESTION.direct_answer


def test_the_settings_reach_the_service(scripted: str, script: ScriptedService, visit: Callable[..., Any]) -> None:
    page = visit(scripted)
    page.get_by_label("Strength").fill("0.5")
    page.get_by_label("Warm-up").fill("40")
    page.get_by_label("Longest answer").fill("77")
    page.get_by_label("Seed").fill("7")
    ask(page, " Why?\n")
    states(page, "done")
    bodies = {body["model"]: body for body in script.requests}
    assert bodies.keys() == {*MODES.values()}
    assert [bodies[model]["guidance"] for model in MODES.values()] == [
        {"explain": True},
        {"explain": True},
        {"alpha": 0.5, "warmup_tokens": 40, "explain": True},
    ]
    for body in bodies.values():
        assert body["messages"] == [{"role": "user", "content": "Why?"}]
        assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 77, 7)
        assert body["stream_options"] == {"include_usage": True}
    page.get_by_label("Seed").fill("")
    ask(page)
    states(page, "done")
    drawn = {body["seed"] for body in script.requests[3:]}
    assert [str(seed) for seed in drawn] == [page.get_by_label("Seed").get_attribute("placeholder")], "one for all"


def test_a_token_shows_the_candidates_of_each_model(scripted: str, visit: Callable[..., Any]) -> None:
    page = visit(scripted)
    ask(page)
    states(page, "done")
    part(page, "guided", "summary").click()
    part(page, "guided", ".token.changed").first.hover()
    tip = page.get_by_role("tooltip")
    tip.wait_for()
    details = tip.inner_text()
    assert "The target alone prefers “Nora” (40 %)." in details
    assert "Guidance made it 4.0 times likelier (+1.39 nats)." in details
    assert "drafted ahead" in details
    lists = tip.locator("section").all()
    rows = {each.locator("h3").inner_text(): each.locator("li").all_inner_texts() for each in lists}
    assert [re.sub(r"\s+", " ", row) for row in rows["Target alone"]] == ["␣Nora 40 %", "␣Vera 20 % (chosen)"]
    assert [re.sub(r"\s+", " ", row) for row in rows["Guider alone"]] == ["␣Vera 93 % (chosen)", "␣Nora < 0.1 %"]
    assert [re.sub(r"\s+", " ", row) for row in rows["Guided"]] == ["␣Vera 80 % (chosen)", "␣Nora 10 %"]
    part(page, "guided", ".token.mark").hover()
    tip.get_by_text("Forced: no model chose this token.").wait_for()
    assert tip.locator("section").count() == 0
    assert "drafts kept\n75 % of 8" in part(page, "guided", ".numbers").inner_text()


def test_white_space_that_a_stop_text_cut_off_is_visible(
    scripted: str, script: ScriptedService, visit: Callable[..., Any]
) -> None:
    script.script = [({"content": "So."}, [explained("So"), explained("."), explained("\n\n")])]
    page = visit(scripted)
    ask(page)
    states(page, "done")
    assert part(page, "guided", ".token.mark").inner_text() == "↵↵"


def test_the_shade_grows_with_the_shift(scripted: str, visit: Callable[..., Any]) -> None:
    page = visit(scripted)
    ask(page)
    states(page, "done")
    part(page, "guided", "summary").click()
    tokens = part(page, "guided", ".text .token")
    alphas = tokens.evaluate_all(
        "all => all.map(token => [token.textContent,"
        " Number(getComputedStyle(token).backgroundColor.match(/([\\d.]+)\\)$/)[1])])"
    )
    shade = dict(alphas[:5])  # the first of each text; color(srgb r g b / alpha)
    assert shade["Vera"] > shade["So"] > shade["It"] > shade["</think>"] == 0


def test_text_streams_until_it_is_stopped(scripted: str, script: ScriptedService, visit: Callable[..., Any]) -> None:
    script.script, script.endless = [({"content": "on "}, [explained("on ")])], True
    page = visit(scripted)
    ask(page)
    states(page, "answering")
    answer = part(page, "guided", ".answer")
    seen = len(answer.text_content())
    assert within(5, lambda: len(answer.text_content()) > seen)
    assert within(5, lambda: re.search(r"tokens/s\n\d", part(page, "guided", ".numbers").inner_text()) is not None)
    page.keyboard.press("Escape")
    states(page, "stopped")
    for _ in MODES:
        assert script.left.acquire(timeout=HANG_S), "the service has seen all three leave"


def test_a_key_is_requested_and_kept_in_this_tab_only(
    scripted: str, script: ScriptedService, visit: Callable[..., Any]
) -> None:
    page = visit(scripted)
    script.key = "secret"
    ask(page)
    states(page, "failed")
    dialog = page.get_by_role("dialog")
    assert "The service asks for an API key." in dialog.inner_text()
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    dialog.get_by_text("The service does not accept this API key.").wait_for()
    dialog.get_by_label("Key").fill("secret")
    dialog.get_by_label("Key").press("Enter")
    dialog.wait_for(state="hidden")
    ask(page)
    states(page, "done")
    page.reload()
    page.locator(".examples button").first.wait_for()
    ask(page)
    states(page, "done")
    assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]") == [["secret"], []]


def test_errors_are_shown_in_plain_words(scripted: str, script: ScriptedService, visit: Callable[..., Any]) -> None:
    page = visit(scripted)
    script.busy = True
    ask(page)
    states(page, "failed")
    assert part(page, "guided", "> .trouble").inner_text() == "The service is busy. Try again in 7 seconds."
    page.context.set_offline(True)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("The service cannot be reached.").nth(2).wait_for()
    page.context.set_offline(False)
    script.busy = False
    page.get_by_role("button", name="Ask").click()
    states(page, "done")
    assert page.locator(".trouble:visible").count() == 0


def test_the_page_works_with_the_keyboard_alone(scripted: str, visit: Callable[..., Any]) -> None:
    page = visit(scripted)

    def tab(selector: str) -> None:
        page.keyboard.press("Tab")
        assert page.evaluate(f"document.activeElement.matches({selector!r})"), page.evaluate(
            "document.activeElement.outerHTML"
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid 2px" in outline, "the focus is seen"

    for selector in (".skip", "#key", "#theme", "#prompt"):
        tab(selector)
    page.keyboard.type("Why?")
    page.keyboard.press("Enter")
    states(page, "done")
    spoken = page.locator("#spoken")
    assert within(5, lambda: spoken.text_content().endswith("Guided: So: Vera."))
    settings = ["#alpha", "#warmup", "#temperature", "#max-tokens", "#seed"]
    for selector in (".examples button", ".examples button", "#ask", *settings, "summary", "summary", "summary"):
        tab(selector)
    page.keyboard.press("Enter")
    tab("[data-kind=guided] .thinking .text")
    tip = page.get_by_role("tooltip")
    assert "token 1 " in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "token 2 " in tip.inner_text()
    page.keyboard.press("ArrowDown")
    assert "“Nora”" in tip.inner_text(), "the next that guidance changed"
    assert spoken.text_content().startswith("Token 3, “Vera”. The target alone prefers “Nora”")
    page.keyboard.press("Escape")
    assert tip.is_visible() is False
    tab("[data-kind=guided] .answer")
    assert "token 5 " in tip.inner_text()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_one_column_and_scrolls_down_only(scripted: str, visit: Callable[..., Any], width: int) -> None:
    page = visit(scripted, viewport={"width": width, "height": 800}, has_touch=True)
    page.get_by_label("Your question").fill("x" * 200)
    page.get_by_role("button", name="Ask").tap()
    states(page, "done")
    part(page, "guided", "summary").tap()
    token = part(page, "guided", ".token.changed").first
    token.tap()
    panel = page.get_by_role("tooltip").bounding_box()
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= width
    assert panel["y"] + panel["height"] <= 800
    box = token.bounding_box()
    assert box["y"] + box["height"] <= panel["y"], "the panel does not cover its token"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert len({page.locator(f"[data-kind={mode}]").bounding_box()["x"] for mode in MODES}) == 1
    part(page, "guided", "h2").tap()
    assert page.get_by_role("tooltip").count() == 0


def test_the_theme_follows_the_system_until_one_is_chosen(scripted: str, visit: Callable[..., Any]) -> None:
    from playwright.sync_api import expect

    page = visit(scripted, color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark, light = "rgb(17, 19, 23)", "rgb(246, 245, 241)"
    assert page.evaluate(back) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(back) == light
    toggle = page.get_by_role("button", name="Dark theme")
    expect(toggle).to_have_attribute("aria-pressed", "false")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    page.reload()
    assert page.evaluate(back) == dark
    toggle.click()
    assert page.evaluate(back) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_passes_the_accessibility_rules(scripted: str, visit: Callable[..., Any], scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = visit(scripted, color_scheme=scheme)
    ask(page)
    states(page, "done")
    for summary in page.locator("summary").all():
        summary.click()
    part(page, "guided", ".token.changed").first.click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="API key").click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_text_and_tokens_match_in_any_order_of_arrival(scripted: str, visit: Callable[..., Any]) -> None:
    page = visit(scripted)
    place = """async ([texts, tokens, size]) => {
        const { Placer } = await import("/playground/tokens.js");
        const placed = [];
        const placer = new Placer((part, text, token) => placed.push([part, text, token && token.text]));
        const events = Math.max(texts.length, tokens.length);
        for (let at = 0; at < events; at += size) {
            placer.add(texts.slice(at, at + size), tokens.slice(at, at + size).map((text) => ({ text })));
        }
        placer.finish();
        return placed;
    }"""
    hidden_mark = ["So", ".", "</think>", "Eva", "."], [
        ["thinking", "So"], ["thinking", "."], ["thinking", ""], ["answer", "Eva"], ["answer", "."],
    ]  # fmt: skip
    split_character = (
        ["a", "\ufffd", "\ufffd", "b"],
        [["answer", "a"], ["answer", ""], ["answer", "é"], ["answer", "b"]],
    )
    stripped_space = [" The", " cat"], [["answer", "The"], ["answer", " cat"]]
    held_back = ["1", "<", "2", "."], [["answer", "1"], ["answer", ""], ["answer", "<2"], ["answer", "."]]
    for tokens, texts in (hidden_mark, split_character, stripped_space, held_back):
        for size in (1, 2, 5):
            placed = page.evaluate(place, [texts, tokens, size])
            assert "".join(text for _, text, _ in placed) == "".join(text for _, text in texts)
            assert [token for *_, token in placed if token is not None] == tokens
            texts_of = {token: text for _, text, token in placed if token in {"Eva", "b", " cat", "2"}}
            assert all(text == token for token, text in texts_of.items())


@pytest.mark.skipif(SCREENSHOTS not in os.environ, reason=f"{SCREENSHOTS} is not set")
def test_screenshots_are_taken(url: str, visit: Callable[..., Any]) -> None:
    wide, narrow = {"width": 1280, "height": 1040}, {"width": 390, "height": 844}
    for name, scheme, size in (
        ("playground", "light", wide),
        ("playground-dark", "dark", wide),
        ("playground-phone", "light", narrow),
    ):
        page = visit(url, viewport=size, color_scheme=scheme, device_scale_factor=1.5, has_touch=size is narrow)
        ask(page, SHOWN)
        states(page, "done")
        for mode in ("guider", "guided"):
            part(page, mode, "summary").click()
        if size is narrow:
            part(page, "guided", ".token").get_by_text("Ivan", exact=True).first.tap()
        elif scheme == "light":
            part(page, "guided", ".token.changed").first.hover()
        picture = DOCS / f"{name}.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size > 20_000
