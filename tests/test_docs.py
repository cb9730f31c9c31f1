"""Documentation that must not rot: links, anchors, commands, paths and names in the pages, and the version."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import yaml

from actors.config import ServiceConfig
from actors.coordinator.states import ROW_TRANSITIONS, SESSION_TRANSITIONS, RowStage, SessionState
from benchmarks.plots import draw_accuracy
from router.openapi import VERSION
from router.schema import GuidanceFields, SpeculationFields, ThinkingFields

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/*.md"))
)
PACKAGES = ("actors", "router", "cluster", "benchmarks", "tests")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]+)?\)")
CODE = re.compile(r"`([^`\n]+)`")
DEFINED_IN = re.compile(r"`(\w+)` in `([\w/.]+\.py)`")
COMMAND = re.compile(rf"python -m ((?:{'|'.join(PACKAGES)})[\w.]*)")
TARGET = re.compile(r"(?:^ {4}|`)make ((?:[a-z][\w-]*(?= |`|$| ) ?)+)", re.MULTILINE)
# Request fields that are no keys of the configuration.
REQUEST_ONLY = {"guidance": GuidanceFields, "thinking": ThinkingFields, "speculation": SpeculationFields}


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower() for heading in headings)
    return frozenset("#" + re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain)


def codes(page: str) -> Iterator[str]:
    """Texts in backticks outside of code blocks."""
    yield from CODE.findall(FENCE.sub("", text_of(page)))


def keys(section: object) -> set[str]:
    """The keys of a section, of any member if it is a union."""
    own = set(getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {}))
    return own.union(*map(keys, get_args(section)))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_of_a_page_resolves(page: str) -> None:
    missing = []
    for path, anchor in LINK.findall(text_of(page)):
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            missing.append(path)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.resolve().relative_to(ROOT).as_posix()):
            missing.append(path + anchor)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_runs_can_be_run(page: str) -> None:
    for module in COMMAND.findall(text_of(page)):
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert file.is_file(), module
        assert file.name == "__main__.py" or '"__main__"' in file.read_text(encoding="utf-8"), module


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_of_a_page_exists(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    named = {target for line in TARGET.findall(text_of(page)) for target in line.split()}
    assert named - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_a_page_exists(page: str) -> None:
    missing = []
    for code in codes(page):
        first, _, rest = code.partition("/")
        if re.fullmatch(r"[\w.-]+/[\w./-]*", code) and first in (*PACKAGES, "docs", ".github") and rest != "...":
            missing += [] if (ROOT / code).exists() else [code]
        elif re.fullmatch(r"\w+\.py", code):
            missing += [] if any(any((ROOT / package).rglob(code)) for package in PACKAGES) else [code]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_defined_in_the_file_that_a_page_names(page: str) -> None:
    for name, file in DEFINED_IN.findall(text_of(page)):
        tree = ast.parse(text_of(file))
        nodes = [
            node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        assert name in {node.name for node in nodes} | {node.id for node in assigned}, (name, file)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # it names old keys too
def test_every_configuration_key_of_a_page_exists(page: str) -> None:
    wrong = []
    for code in codes(page):
        section, _, key = code.partition(".")
        is_module = (ROOT / section / f"{key}.py").is_file()
        if section not in ServiceConfig.model_fields or is_module or not re.fullmatch(r"(?!py$)[a-z_]+", key):
            continue
        known = keys(ServiceConfig.model_fields[section].annotation) | keys(REQUEST_ONLY.get(section))
        if key not in known:
            wrong.append(code)
    assert wrong == []


@pytest.mark.parametrize(
    ("states", "table", "not_drawn"),
    [
        (SessionState, SESSION_TRANSITIONS, SessionState.FINISHED),
        (RowStage, ROW_TRANSITIONS, RowStage.EXTENDING),
    ],
)
def test_the_drawn_states_are_those_of_the_table(states: type[IntEnum], table: bytes, not_drawn: IntEnum) -> None:
    """Transitions of a state to itself, and those into `not_drawn`, need not be drawn."""
    arrows = re.findall(r"^ +([A-Z_]+) --> ([A-Z_]+)", text_of("docs/architecture.md"), re.MULTILINE)
    boxes = {"REQUESTED": ("SCORING_PROMPT", "DECODING")}
    single = {(a, b) for start, end in arrows for a in boxes.get(start, (start,)) for b in boxes.get(end, (end,))}
    drawn = {(before, after) for before, after in single if before in states.__members__}
    allowed = {(a.name, b.name) for a in states for b in states if table[a] >> b & 1}
    assert drawn <= allowed
    assert {(a, b) for a, b in allowed - drawn if a != b and b != not_drawn.name} == set()


def test_the_version_is_the_same_wherever_it_stands() -> None:
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert version == VERSION
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    assert re.search(rf"^## \[({re.escape(version)}|Unreleased)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    tagged = ("cluster/kuberay.py", "cluster/kuberay.yaml", "cluster/aws.yaml", "cluster/gcp.yaml", "docs/deploy.md")
    images = {image for file in tagged for image in re.findall(r"/thinklogit:([\w.]+)", text_of(file))}
    assert images == {version}


def test_every_module_with_slow_tests_is_in_the_list_of_the_second_tier() -> None:
    listed = set(re.findall(r"^\| `(tests/[\w/]+\.py)", text_of("CONTRIBUTING.md"), re.MULTILINE))
    marked = {
        file.relative_to(ROOT).as_posix()
        for file in ROOT.glob("tests/**/test_*.py")
        if re.search(r"pytest\.mark\.slow\b|\bslow\(", file.read_text(encoding="utf-8")) and file != Path(__file__)
    }
    assert listed == marked


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"^ +- ([\w-]+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    generated = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert sorted(listed) == sorted({page.name for page in ROOT.glob("docs/*.md")} | generated)


def test_the_workflows_run_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    for file in ROOT.glob(".github/workflows/*.yml"):
        runs = [
            step["run"]
            for job in yaml.safe_load(file.read_text())["jobs"].values()
            for step in job["steps"]
            if "run" in step
        ]
        called = [
            line.removeprefix("make ").split() for run in runs for line in run.splitlines() if line.startswith("make ")
        ]
        assert {target for line in called for target in line} <= targets, file.name


def test_the_accuracy_plot_is_drawn_from_a_saved_result(tmp_path: Path) -> None:
    saved = ROOT / "benchmarks" / "results" / "effect-cpu-2.json"
    draw_accuracy(saved, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_the_figures_of_the_readme_are_those_of_the_saved_result() -> None:
    kept = json.loads(text_of("benchmarks/results/effect-cpu-2.json"))
    row = next(line for line in text_of("README.md").splitlines() if "right answers: target" in line)
    shown = [float(share) for share in re.findall(r"\.\d{3}", row)]
    assert shown == pytest.approx([kept["result"][mode] for mode in ("target", "guider", "guided")], abs=0.0006)
    assert kept["date"][:10] in row
