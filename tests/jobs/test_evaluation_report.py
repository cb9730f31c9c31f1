"""The report of a synthetic run with known figures: tables, page and plots, also in a browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.api.generation import ROLES
from cluster.jobs.contrasts import contrasts
from cluster.jobs.evaluation_report import write_report
from cluster.jobs.report_page import shorten
from cluster.jobs.results import ProblemRow, Results, RunError
from cluster.jobs.sample import ALONE, Key, Mode, Sample, Timing
from cluster.jobs.summary import AVERAGE, TARGET, Variant, summarise
from tests.support.deadlines import HANG_S

ROOT = Path(__file__).parents[2]
SCREENSHOT_OF = "REPORT_SCREENSHOT_OF"  # environment variable: the run whose report docs/report.png shows
ARMS: tuple[tuple[Mode, str], ...] = (
    ("target", ALONE),
    ("guider", ALONE),
    ("guider_base", ALONE),
    ("guided", "a0.5"),
    ("guided", "a1"),
    ("guided", "a1-w100"),
    ("guided", "fading"),
)
TASKS = ("algebra", "geometry")
PROBLEMS = tuple(
    ProblemRow(task, f"{number:02}", f"Is {number} < {number + 1} & | <b>so</b>?", str(number))
    for task in TASKS
    for number in range(20)
)
SEEDS, SAMPLES = (0, 1), 2
# Problems of 20 that each answers right in all samples: (algebra, geometry).
RIGHT = {
    "target": (8, 4),
    "guider": (4, 2),
    "guider_base": (2, 0),
    "a0.5": (10, 8),
    "a1": (16, 14),
    "hurt": (0, 0),
    "vain": (9, 4),
}
TEXT = 'Wait, <script>alert("no")</script> let me check. '


def config(gpus: float) -> dict[str, Any]:
    models = {role: {"path": "x", "num_gpus": gpus if role == "target" else gpus / 2} for role in ROLES}
    return {
        "evaluation": {"seeds": list(SEEDS), "concurrency": 64},
        "tasks": {task: {"samples": SAMPLES} for task in TASKS},
        "service": {"models": models},
    }


def sample(row: ProblemRow, mode: Mode, setting: str, seed: int, number: int) -> Sample:
    limit = RIGHT.get(setting, RIGHT.get(mode, (12, 10)))[TASKS.index(row.task)]
    right, guided = int(row.problem) < limit, mode == "guided"
    tokens = 4_000 if guided else 1_000
    return Sample(
        Key(row.task, row.problem, mode, setting, seed, number),
        text=TEXT + ("x" * 9_000 if guided else ""),
        extracted=row.answer if right else None if number else "7 | 8",
        right=right,
        finish="length" if not right and number else "stop",
        prompt_tokens=20,
        tokens=tokens,
        reasoning_tokens=tokens // 2,
        guided_tokens=tokens if guided else 0,
        changed_tokens=tokens // 10 if guided else 0,
    )


def synthetic_run(folder: Path, gpus: float = 1.0, arms: tuple[tuple[Mode, str], ...] = ARMS) -> Path:
    """A finished synthetic run, the same in every call."""
    with Results(folder).writing(config(gpus), PROBLEMS) as results:
        for row in PROBLEMS:
            for mode, setting in arms:
                for seed in SEEDS:
                    for number in range(SAMPLES):
                        one = sample(row, mode, setting, seed, number)
                        results.append(one, Timing(one.key, one.tokens / 100, 0, 0))
        results.finish()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic_run(tmp_path_factory.mktemp("runs") / "made-up")
    write_report(folder)
    return folder


def test_figures_equal_those_of_the_synthetic_run(run: Path) -> None:
    summary = summarise(Results(run))
    target, best = summary.score(TARGET), summary.best
    assert target is not None
    assert best is not None
    assert list(summary.scores) == ["algebra", "geometry", AVERAGE]
    assert summary.samples == summary.expected == 40 * len(ARMS) * 4
    assert target.pass_at_1.value == pytest.approx(0.3)
    assert best.variant == Variant("guided", "a1")
    assert best.pass_at_1.value == pytest.approx(0.75)
    assert best.gain is not None
    assert best.gain.value == pytest.approx(1.5)
    assert best.p is not None
    assert best.p < 0.01
    assert best.pass_at == pytest.approx({1: 0.75, 2: 0.75, 4: 0.75})
    assert best.majority_at[4] == pytest.approx(0.75)
    algebra = summary.score(Variant("guided", "a1"), "algebra")
    assert algebra is not None
    assert algebra.gain is not None
    assert algebra.gain.value == pytest.approx(1.0)


def test_costs_are_per_answer_and_per_right_answer(run: Path) -> None:
    summary = summarise(Results(run))
    target, best = summary.score(TARGET), summary.score(Variant("guided", "a1"))
    assert target is not None
    assert best is not None
    assert (target.cost.tokens, target.cost.seconds, target.cost.gpu_seconds) == (1_000, 10, 10)
    assert (best.cost.tokens, best.cost.seconds, best.cost.gpu_seconds) == (4_000, 40, 80)
    assert best.per_right(best.cost.gpu_seconds) == pytest.approx(80 / 0.75)
    assert (best.cost.guided, best.cost.changed, target.cost.guided) == (1.0, 0.1, 0.0)
    assert target.cost.truncated == pytest.approx(0.7 / 2)
    assert (target.behaviours.backtracking, target.behaviours.verification) == (160, 160)


def test_both_files_have_every_part_of_a_report(run: Path) -> None:
    for text in ((run / "report.md").read_text(), (run / "report.html").read_text()):
        for text_part in (
            "Guidance helps.",
            "pass@1",
            "pass@4",
            "maj@4",
            "gain over target",
            "+150.0 % [",
            "average of 2",
            "truncated",
            "tokens / right",
            "s / right",
            "GPU-s / right",
            "branching",
            "backtracking",
            "self-verification",
            "Where guidance changed the verdict",
            "best of 4 settings",
        ):
            assert text_part in text, text_part
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<details>") == 6, "the gained ones; a1 lost none"
    assert len(page) < 1_000_000


def test_the_page_has_no_outside_reference_and_escapes_all_text(run: Path) -> None:
    page = (run / "report.html").read_text()
    references = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert all((first or second).startswith("#") for first, second in references)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>so" not in page
    assert "default-src 'none'" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_row_of_a_markdown_table_has_the_cells_of_its_header(run: Path) -> None:
    widths: list[int] = []
    for line in (run / "report.md").read_text().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        widths = [*widths, cells] if cells else []
        assert len(set(widths)) <= 1, line
        assert not re.search("<(?!=)[a-z]", line), line


def test_the_same_run_gives_the_same_report(run: Path, tmp_path: Path) -> None:
    again = synthetic_run(tmp_path / "made-up")
    write_report(again)
    for name in ("report.html", "report.md"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_on_cpu_there_are_no_gpu_seconds(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, gpus=0)
    write_report(run)
    text = (run / "report.md").read_text()
    assert "ran on CPU" in text
    assert "GPU-s" not in text.replace("GPU-seconds", "")


def test_the_verdict_follows_from_the_significance(tmp_path: Path) -> None:
    verdicts = {}
    for setting in ("a1", "vain", "hurt"):
        arms: tuple[tuple[Mode, str], ...] = (("target", ALONE), ("guided", setting))
        verdicts[setting] = write_report(synthetic_run(tmp_path / setting, arms=arms))["verdict"]
    assert verdicts["a1"].startswith("Guidance helps.")
    assert verdicts["vain"].startswith("Guidance is not shown to help.")
    assert verdicts["hurt"].startswith("Guidance hurts.")


def test_an_unfinished_run_is_reported_as_such_and_compared_fairly(tmp_path: Path) -> None:
    """The target has answered only the harder problems, so the guided rates on the others must not count."""
    with Results(tmp_path).writing(config(0), PROBLEMS) as results:
        for row in PROBLEMS:
            for mode, setting in ARMS[:1] * (int(row.problem) >= 6) + ARMS[4:5]:
                one = sample(row, mode, setting, 0, 0)
                results.append(one, Timing(one.key, 1.0, 0, 0))
        found = write_report(tmp_path)
    assert "Not finished" in (tmp_path / "report.md").read_text()
    assert (found["samples"], found["expected"]) == (68, 320)
    guided = found["overall"]["guided a1"]
    assert guided["pass_at_1"][0] == pytest.approx(0.75)
    assert guided["difference"][0] == pytest.approx((8 + 8) / 28)


def test_contrasts_take_tasks_in_turn_and_have_every_modes_text(run: Path) -> None:
    found = contrasts(Results(run), Variant("guided", "a1"), each_way=4)
    assert [(one.problem.task, one.problem.problem) for one in found] == [
        ("algebra", "08"),
        ("geometry", "04"),
        ("algebra", "09"),
        ("geometry", "05"),
    ]
    assert [variant.mode for variant in found[0].answers] == ["target", "guided", "guider", "guider_base"]
    assert all(one.gained for one in found)
    lost = contrasts(Results(run), Variant("guider_base"), each_way=1)
    assert [one.gained for one in lost] == [False]


def test_a_long_text_is_shortened_to_its_ends() -> None:
    assert shorten("abc", 4) == "abc"
    assert shorten("abcdefgh", 4) == "ab\n\n[… 4 characters left out …]\n\ngh"


def test_a_run_without_samples_is_refused(tmp_path: Path) -> None:
    Results(tmp_path).writing(config(0), PROBLEMS).close()
    with pytest.raises(RunError, match="no samples yet"):
        write_report(tmp_path)


def test_the_command_prints_one_json_object_last(run: Path) -> None:
    command = [sys.executable, "-m", "cluster.jobs.evaluation_report"]
    done = subprocess.run([*command, str(run)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=HANG_S)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["best"] == "guided a1"
    assert found["html"] == str(run / "report.html")
    refused = subprocess.run([*command, str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert refused.returncode == 1
    assert "not the folder of a run" in refused.stderr


def test_a_browser_shows_the_page_without_further_requests(run: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requested: list[str] = []
    messages: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto((run / "report.html").as_uri())
    assert page.locator("h1").inner_text() == "made-up"
    assert page.locator("svg").count() == 2
    assert page.locator("svg").first.bounding_box()["width"] > 500
    assert page.locator("pre").first.is_visible() is False
    page.locator("details").first.click()
    assert TEXT.strip() in page.locator("section pre").first.inner_text()
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        seen[scheme] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('svg text')).fill]"
        )
    assert seen["light"] == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert seen["dark"] == ["rgb(13, 17, 23)", "rgb(230, 237, 243)"]
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone scrolls tables, not the page"
    assert requested == [(run / "report.html").as_uri()]
    assert messages == []


@pytest.mark.skipif(SCREENSHOT_OF not in os.environ, reason=f"{SCREENSHOT_OF} names no run to show")
def test_the_screenshot_of_a_run_is_taken(browser: Any) -> None:
    found = write_report(Path(os.environ[SCREENSHOT_OF]))
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    page.goto(Path(found["html"]).resolve().as_uri())
    picture = ROOT / "docs" / "report.png"
    picture.parent.mkdir(exist_ok=True)
    page.screenshot(path=picture)
    assert picture.stat().st_size > 20_000
