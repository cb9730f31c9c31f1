"""The counts of the fault and soak benchmarks, from streams and processes of known behaviour."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.cpu_time import descendants
from benchmarks.faults import Disturbed, shares, summary
from benchmarks.kill_harness import Killed, service_config
from benchmarks.soak import WARM_S, Memory, resident_mb
from benchmarks.steady_streams import Case, StreamLost, StreamRecord, cases, requests
from tests.support.deadlines import HANG_S

COUNTS = {"completion": 3, "guided": 2, "changed": 1}
CASE = Case({"guidance": {"explain": True}}, [5, 6, 7], "a b c", COUNTS)


def chunk(ids: list[int], text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"delta": {"content": text}, "finish_reason": finish, "guidance": {"tokens": [{"id": one} for one in ids]}}
    return {"choices": [choice]}


def usage(**counts: int) -> dict[str, Any]:
    guidance = {"guided_tokens": counts["guided"], "changed_tokens": counts["changed"]}
    return {"choices": [], "usage": {"completion_tokens": counts["completion"], "guidance": guidance}}


def read(*chunks: dict[str, Any], marks: tuple[float, ...] = (0.0, 1.0)) -> StreamRecord:
    record = StreamRecord(CASE, list(marks))
    for one in chunks:
        record.add(one)
    record.outcome = "ended"
    return record


WHOLE = (chunk([5, 6], "a b"), chunk([7], " c", "length"), usage(**COUNTS))


def test_a_stream_equal_to_the_undisturbed_one_does_not_differ() -> None:
    assert read(*WHOLE).differs() is None


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ((chunk([5, 9], "a b"), *WHOLE[1:]), "the first other token: 1"),
        ((chunk([5, 6], "a x"), *WHOLE[1:]), "other tokens or text"),
        ((chunk([5, 6], "a b"), chunk([6, 7], " c"), usage(**COUNTS)), "the first other token: 2"),
        ((chunk([5, 6], "a b"), usage(**COUNTS)), "2 of 3 tokens"),
        ((*WHOLE[:2], usage(completion=3, guided=2, changed=0)), "counts"),
    ],
)
def test_other_tokens_text_length_or_counts_make_a_difference(chunks: tuple[dict[str, Any], ...], why: str) -> None:
    assert why in str(read(*chunks).differs())


def test_a_cancelled_stream_may_be_a_prefix_only() -> None:
    part, other = read(chunk([5], "a")), read(chunk([5], "b"))
    part.outcome = other.outcome = "cancelled"
    assert part.differs() is None
    assert other.differs()


def test_an_error_event_makes_a_stream_lost() -> None:
    with pytest.raises(StreamLost, match="gone"):
        read({"error": {"message": "gone"}})


def test_a_silence_within_the_window_counts_from_kill_or_beginning() -> None:
    record = StreamRecord(CASE, [0.0, 10.0, 10.1, 10.2, 13.2, 13.3, 30.0])
    assert record.silence(10.15, 1.0) == pytest.approx(3.0)  # it began after the kill
    assert record.silence(11.0, 1.0) == pytest.approx(2.2)  # it had begun before
    assert record.silence(13.25, 0.01) == pytest.approx(0.05)  # the next one begins after the window
    assert record.silence(31.0, 1.0) is None


def test_recovery_is_the_longest_silence_of_any_stream() -> None:
    quick, slow = read(*WHOLE, marks=(0, 1, 1.1, 2)), read(*WHOLE, marks=(0, 1, 4, 5))
    both = Disturbed([Killed("target", 1.05), Killed("node", 100.0)], [quick, slow])
    assert both.recoveries("target") == [pytest.approx(2.95)]
    assert both.recoveries("node") == [0.0]


def test_the_result_counts_kills_losses_and_differences() -> None:
    lost = read(chunk([5], "a"))
    lost.outcome, lost.why = "lost", "ConnectionError"
    good = Disturbed([Killed("target", 0.5)], [read(*WHOLE)], refused=2)
    bad = Disturbed([Killed("target", 0.5), Killed("node", 0.5)], [lost, read(chunk([9], "a"))])
    whole = summary({2: good, 1: bad}, streams=16)
    assert (whole["streams"], whole["answers"], whole["refused"]) == (16, 2, 2)
    assert whole["kills"] == {"target": 2, "node": 1}
    assert (whole["lost"], whole["identical"]) == (1, False)
    assert (whole["replicas_2"]["lost"], whole["replicas_2"]["identical"]) == (0, True)
    assert whole["replicas_1"]["recovery_s_p50"] == 0.5
    assert "ConnectionError" in bad.failures()[0]


def test_most_rounds_run_with_two_replicas() -> None:
    assert shares(20, None) == {2: 15, 1: 5}
    assert shares(1, None) == {2: 1}
    assert shares(20, 1) == {1: 20}


async def test_an_undisturbed_service_gives_each_request_its_reference() -> None:
    config = service_config(1)
    bodies = requests(config.name, 3, (4, 8), seed=1)
    assert bodies == requests(config.name, 3, (4, 8), seed=1)
    references = await cases(config, bodies)
    assert [len(one.ids) for one in references] == [body["max_tokens"] for body in bodies]
    assert await cases(config, bodies) == references


def test_a_memory_slope_ignores_levels_and_first_minutes() -> None:
    memory = Memory()
    for pid, level in ((1, 100.0), (2, 300.0)):
        began = 1_000.0 * (pid - 1)
        times = [began + 5 * i for i in range(200)]
        memory.samples["target", pid] = [(t, level + 2 * t / 60 + 500 * (t < began + WARM_S)) for t in times]
    memory.samples["guider", 3] = [(0.0, 1.0), (5.0, 9.0)]
    assert memory.slopes(0.0) == {"target": pytest.approx(2.0)}


def test_memory_skips_processes_that_have_ended() -> None:
    memory = Memory()
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    memory.take({"own": [os.getpid()], "gone": [done.pid]}, 0.0)
    assert memory.samples.keys() == {("own", os.getpid())}
    assert memory.samples["own", os.getpid()][0][1] == pytest.approx(resident_mb(os.getpid()), rel=0.2)


async def test_descendants_are_all_processes_below_one() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=asyncio.subprocess.PIPE)
    async with asyncio.timeout(HANG_S):
        while len(descendants(child.pid)) != 1:  # noqa: ASYNC110 - the grandchild announces nothing
            await asyncio.sleep(0.02)
    assert child.pid in descendants(os.getpid())
    await child.communicate(b"\n")
    assert descendants(child.pid) == []
