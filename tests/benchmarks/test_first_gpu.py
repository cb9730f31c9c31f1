"""The first run on a GPU, as far as a CPU can run it: its sections with tiny models, and how they are started."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch

from benchmarks.first_gpu import __main__ as first_gpu
from benchmarks.first_gpu import operators
from benchmarks.first_gpu.section import SECTIONS, Section
from tests.support.varlen import emulated_flash

ENDS = 'print(\'{"finding": "end"}\')'


class Findings(list[dict[str, Any]]):
    """What a section says."""

    def __call__(self, finding: str, **facts: Any) -> None:
        self.append({"finding": finding, **facts})

    def of(self, finding: str) -> list[dict[str, Any]]:
        return [each for each in self if each["finding"] == finding]


@pytest.fixture
def say() -> Findings:
    return Findings()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and narrower heads, and no long prompt, so that float64 on a CPU is fast."""
    monkeypatch.delitem(operators.CASES, "mixed")
    for name, size in {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 16}.items():
        monkeypatch.setattr(operators, name, size)


@pytest.mark.usefixtures("narrow")
def test_an_operator_that_attends_rightly_is_within_rounding(say: Findings) -> None:
    operators.semantics(say, emulated_flash)
    assert 0 < say[0]["worst"] < 0.02


@pytest.mark.usefixtures("narrow")
def test_an_operator_that_ignores_windows_is_found(say: Findings) -> None:
    def without_windows(*tensors: Any, **options: Any) -> Any:
        return emulated_flash(*tensors, scale=options["scale"], seqused_k=options["seqused_k"])

    operators.semantics(say, without_windows)
    assert say[0]["worst"] > 0.1
    assert "window 7" in say[0]["at"]


def test_rows_are_reduced_as_on_a_cpu(say: Findings) -> None:
    SECTIONS["rows"].run(say, True)
    assert [(each["rows"], each["equal"]) for each in say] == [(1, True), (8, True)]


def test_the_native_engine_loads_is_checked_steps_and_is_asked_beside_forwards(say: Findings) -> None:
    SECTIONS["native-1.5B"].run(say, True)
    steps = [(each["sessions"], each["tokens"]) for each in say.of("a step")]
    assert steps == [(1, 1), (1, 8), (4, 1), (4, 8)]
    others = [each["finding"] for each in say if each["finding"] != "a step"]
    assert others == ["loaded", "the check at load passes", "a prompt", "look-ups, median and worst ms", "compaction"]
    assert say.of("the check at load passes")[0]["error"] < 1e-3
    json.dumps(say)


def test_a_step_that_does_not_fit_the_cache_is_said(say: Findings) -> None:
    from benchmarks.first_gpu.engines import TINY, Sessions, loaded, steps

    with loaded("native", TINY, say) as engine:
        steps(Sessions(engine), 2, TINY.cache_tokens // 2, say)
    assert say[-1]["finding"] == "no step: the cache is too small"


@pytest.mark.parametrize(
    ("code", "outcome", "why"),
    [
        (ENDS, "done", ""),
        ('print(\'{"finding": "skipped", "why": "no ray"}\');' + ENDS, "skipped", "no ray"),
        ("import os, sys; sys.stderr.write('out of memory'); os._exit(7)", "failed", "status is 7.*out of memory"),
        ("import time; time.sleep(600)", "failed", "did not end within 2 s"),
    ],
)
def test_a_section_ends_is_skipped_crashes_or_hangs(code: str, outcome: str, why: str, say: Findings) -> None:
    deadline_s = 2 if "sleep" in code else 60
    assert first_gpu.run_section(python(code), deadline_s, say.append) == outcome
    assert [each["finding"] for each in say] == ([] if outcome == "done" else [outcome])
    assert all(re.search(why, each["why"]) for each in say)


def section(**options: Any) -> Section:
    return Section(lambda say, tiny: None, **{"seconds": 30.0, **options})


@pytest.mark.parametrize(
    ("options", "small", "why"),
    [
        ({"gpu": True}, True, "it needs a GPU"),
        ({"vllm": True}, True, "make venv-vllm"),
        ({"large": True}, True, "repeat another section"),
        ({"seconds": 31.0}, False, "about 31 s, and 30 s of the budget are left"),
        ({}, False, None),
        ({"large": True}, False, None),
    ],
)
def test_what_cannot_run_or_does_not_fit_the_budget_is_skipped_with_the_reason(
    options: dict[str, Any], small: bool, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_gpu, "CUDA", False)
    monkeypatch.setattr(first_gpu, "vllm_python", lambda: None)
    found = first_gpu.reason_to_skip(section(**options), small, 30.0)
    assert found is None if why is None else why in str(found)


def test_after_a_section_that_fails_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter(["failed", "done"])
    monkeypatch.setattr(first_gpu, "run_section", lambda command, deadline_s, tell: next(outcomes))
    told: list[dict[str, Any]] = []
    sections = {"one": section(), "none": section(seconds=99.0), "two": section()}
    found = first_gpu.run(sections, False, 60.0, told.append)
    assert found == {"one": "failed", "none": "skipped", "two": "done"}
    assert [(fact["section"], fact["finding"]) for fact in told] == [("none", "skipped")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_names_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_gpu.main([]) == 1
    assert "--small" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_runs_every_section_that_a_cpu_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_gpu.main(["--small"]) == 0, capsys.readouterr().out
    *findings, outcomes = map(json.loads, capsys.readouterr().out.splitlines())
    assert {name for name, outcome in outcomes.items() if outcome == "skipped"} <= {
        *("attention", "vllm-32B", "native-32B"),
        *(name for name in SECTIONS if name.startswith("vllm") and first_gpu.vllm_python() is None),
    }
    assert {each["section"] for each in findings} == set(SECTIONS)
    assert sum(each["finding"] == "an answer over HTTP" for each in findings) >= 4
