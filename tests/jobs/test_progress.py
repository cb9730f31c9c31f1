"""Progress of an evaluation, in a terminal and without one."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.jobs.config import checked
from cluster.jobs.progress import PLAIN_EVERY_S, Progress
from cluster.jobs.sample import Key, Sample

ARMS = checked({"run": "x", "tasks": ["multihop"], "modes": ["target", "guided"]}).arms()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def sample(number: int, right: bool) -> Sample:
    return Sample(Key("t", "p", "target", "-", 0, number), "", None, right, "stop", 1, 1, 0, 0, 0)


def test_rate_and_remaining_time_count_only_this_start() -> None:
    clock = Clock()
    progress = Progress(Console(quiet=True), dict.fromkeys(ARMS, 10), clock=clock)
    for number in range(8):
        progress.resumed(ARMS[0], sample(number, True))
    with progress:
        assert progress.summary == "8 of 20 samples, 0 tokens/s, ? left"
        clock.now += 6
        progress.add_tokens(300)
        for number in range(3):
            progress.finished(ARMS[1], sample(number, False))
        assert progress.summary == "11 of 20 samples, 50 tokens/s, 0:00:18 left"


def test_without_a_terminal_plain_lines_come_periodically_and_at_the_end() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(Console(file=out), dict.fromkeys(ARMS, 2), clock=clock) as progress:
        progress.add_tokens(1)
        assert out.getvalue() == ""
        progress.finished(ARMS[0], sample(0, True))
        clock.now += PLAIN_EVERY_S
        progress.add_tokens(1)
        progress.add_tokens(1)
        assert out.getvalue().count("\n") == 1
        assert "target 1/1 right" in out.getvalue()
    assert out.getvalue().count("\n") == 2


def test_a_terminal_shows_a_line_for_each_setting() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120), dict.fromkeys(ARMS, 2)) as progress:
        progress.finished(ARMS[0], sample(0, True))
    shown = out.getvalue()
    assert "100.0% right" in shown
    assert all(name in shown for name in ("target", "guided a1", "all"))
