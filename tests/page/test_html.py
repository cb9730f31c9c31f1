"""The page of recorded answers: one file of limited size, the same for the same recordings, with a strict policy."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.demo import task
from cluster.page import __main__ as command
from cluster.page import html
from cluster.page.bundle import BundleError
from cluster.page.questions import read_questions
from cluster.page.recording import FOLDER, RecordingError, read_recordings
from tests.support.deadlines import HANG_S

ROOT = Path(__file__).parents[2]
MOST_BYTES = 2_000_000
RECORDINGS = read_recordings()


def test_the_page_has_less_than_two_megabytes() -> None:
    assert len(html.build().encode()) < MOST_BYTES


def test_a_bare_python_builds_the_same_page_again(tmp_path: Path) -> None:
    """Without site-packages, and with another salt of hashes."""
    out = tmp_path / "new" / "page.html"
    arguments = [sys.executable, "-S", "-m", "cluster.page", "--out", str(out)]
    subprocess.run(arguments, cwd=ROOT, env={"PYTHONHASHSEED": "7"}, capture_output=True, timeout=HANG_S, check=True)
    assert out.read_text(encoding="utf-8") == html.build()


def test_the_policy_allows_only_what_is_inside_the_page() -> None:
    page = html.build()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    scripts = re.findall(r'<script(?: type="module")?>(.*?)</script>', page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*scripts, *styles)]
    assert len(hashes) == 3
    assert re.findall(r"sha256-([^']*)", policy.group(1)) == hashes
    assert policy.group(1).startswith("default-src 'none';")
    assert "unsafe" not in policy.group(1)
    assert "connect-src" not in policy.group(1)
    without_data = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert {*re.findall(r"https?://[^\"' ]+", without_data)} == {"http://www.w3.org/2000/svg"}


def test_a_recorded_text_cannot_end_its_element() -> None:
    attack = "</script><script>alert(1)</script><!--"
    page = html.build([{**RECORDINGS[0], "title": attack}])
    assert attack not in page
    data = re.search(r'<script type="application/json" id="recordings">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1))[0]["title"] == attack


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 0}, "has format 0, and this version reads format 1"),
        ({"more": 1}, "(more)"),
        ({"date": None}, "(date)"),
    ],
)
def test_a_recording_of_another_format_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    named: str,
) -> None:
    recording = json.loads((FOLDER / "embedded-trio.json").read_text(encoding="utf-8")) | change
    if None in change.values():
        recording = {key: value for key, value in recording.items() if value is not None}
    (tmp_path / "old.json").write_text(json.dumps(recording))
    monkeypatch.setattr(html, "read_recordings", lambda: read_recordings(tmp_path))
    assert command.main(["--out", str(tmp_path / "page.html")]) == 1
    message = capsys.readouterr().err
    assert named in message
    assert f"record it anew: python -m cluster.page --record {tmp_path / 'old.yaml'}" in message
    assert not (tmp_path / "page.html").exists()


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="holds no recording"):
        read_recordings(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("</head>", '<script src="playground/more.js"></script></head>', 'src="playground/more.js"'),
        ('<script src="playground/theme.js"></script>', "", "holds it 0 times"),
        ("</main>", '<img src="playground/icon.svg"></main>', "holds it 2 times"),
    ],
)
def test_a_change_of_the_live_page_that_the_build_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, named: str
) -> None:
    shutil.copytree(html.PLAYGROUND, tmp_path / "playground")
    index = tmp_path / "playground" / "index.html"
    index.write_text(index.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    monkeypatch.setattr(html, "PLAYGROUND", tmp_path / "playground")
    with pytest.raises(BundleError) as refused:
        html.build(RECORDINGS)
    assert named in str(refused.value)


@pytest.mark.parametrize("recording", RECORDINGS, ids=[recording["name"] for recording in RECORDINGS])
def test_every_recording_has_the_questions_of_its_file(recording: dict[str, Any]) -> None:
    asked = read_questions(FOLDER / f"{recording['name']}.yaml")
    assert recording["title"] == asked.title
    assert recording["about"] == asked.about
    assert recording["models"] == asked.models.model_dump()
    assert recording["settings"] == asked.settings.model_dump()
    recorded = [(each["question"], each["gold"]) for each in recording["questions"]]
    assert recorded == [(each.question, each.gold) for each in asked.questions]
    assert str(ROOT) not in json.dumps(recording), "no path of the machine that recorded"


def test_the_embedded_trios_questions_are_not_selected() -> None:
    first = [each.text for hops in (2, 3, 4, 5) for each in task.questions("held_out", hops, 2)]
    assert [each.question for each in read_questions(FOLDER / "embedded-trio.yaml").questions] == first
