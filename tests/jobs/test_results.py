"""A run's folder holds complete samples, each once, even if its writer is killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.jsonl import UnreadableLine
from cluster.jobs.results import InUse, OtherRun, ProblemRow, Results, RunError
from cluster.jobs.sample import Key
from tests.support.run_writer import CONFIG, KEYS, PROBLEMS, sample, timing

ROOT = Path(__file__).parents[2]
FIRST, SECOND, *_ = sorted(KEYS)
FILES = ("samples.jsonl", "timings.jsonl", "problems.jsonl", "config.yaml")


def writer(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.support.run_writer", str(folder), str(seconds)], cwd=ROOT)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def written(folder: Path, config: Mapping[str, Any] = CONFIG, keys: tuple[Key, ...] = (FIRST,)) -> Results:
    """A folder with samples of `keys`, open for writing."""
    results = Results(folder).writing(config, PROBLEMS)
    for key in keys:
        results.append(sample(key), timing(key))
    return results


def test_a_run_killed_five_times_ends_with_undisturbed_bytes(tmp_path: Path) -> None:
    random_ = random.Random(3)
    kills = 0
    file = tmp_path / "killed" / "samples.jsonl"
    while kills < 5:
        child = writer(tmp_path / "killed", 0.01)
        before = file.stat().st_size if file.exists() else 0
        deadline = time.monotonic() + 60
        while (not file.exists() or file.stat().st_size == before) and time.monotonic() < deadline:
            time.sleep(0.002)  # wait until it writes
        time.sleep(random_.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "the writer finished before the kill"
        kills += 1
        with file.open("ab") as torn:  # half a line, as a kill in the middle of a write leaves it
            torn.write(b'{"task": "su')
    assert 0 < len(Results(tmp_path / "killed").done()) < len(KEYS)
    assert writer(tmp_path / "killed", 0).wait(60) == 0
    assert writer(tmp_path / "undisturbed", 0).wait(60) == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "undisturbed")
    assert [row.key for row in Results(tmp_path / "killed").samples()] == sorted(KEYS)


def test_samples_timings_and_problems_round_trip(tmp_path: Path) -> None:
    with written(tmp_path, keys=(SECOND, FIRST)) as results:
        assert list(results.samples()) == [sample(SECOND), sample(FIRST)]
        assert list(results.timings()) == [timing(SECOND), timing(FIRST)]
        assert results.done() == {FIRST, SECOND}
    assert list(Results(tmp_path).problems()) == list(PROBLEMS)
    assert Results(tmp_path).config() == CONFIG


def test_a_timing_without_a_sample_does_not_count(tmp_path: Path) -> None:
    with written(tmp_path) as results:
        results._timings.append({**SECOND._asdict(), "seconds": 9.0, "drafted_tokens": 0, "accepted_tokens": 0})
    with Results(tmp_path).writing(CONFIG, PROBLEMS) as results:
        assert results.done() == {FIRST}
        results.finish()
        assert list(results.timings()) == [timing(FIRST)]
        results.append(sample(SECOND), timing(SECOND))
        assert list(results.timings()) == [timing(FIRST), timing(SECOND)]


def test_no_sample_is_counted_twice(tmp_path: Path) -> None:
    with written(tmp_path) as results, pytest.raises(ValueError, match="already"):
        results.append(sample(FIRST), timing(FIRST))
    with Results(tmp_path).writing(CONFIG, PROBLEMS) as results, pytest.raises(ValueError, match="already"):
        results.append(sample(FIRST), timing(FIRST))
    with written(tmp_path, keys=()) as results, pytest.raises(ValueError, match="the timing has the key"):
        results.append(sample(SECOND), timing(FIRST))


def test_a_reader_sees_no_incomplete_line(tmp_path: Path) -> None:
    with written(tmp_path), (tmp_path / "samples.jsonl").open("ab") as torn:
        torn.write(b'{"task": "sums", "pro')
        torn.flush()
        assert Results(tmp_path).done() == {FIRST}


def test_a_full_disk_leaves_no_incomplete_line(tmp_path: Path) -> None:
    with written(tmp_path) as results:
        before = bytes_of(tmp_path)["samples.jsonl"]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
        try:
            with pytest.raises(OSError, match="large"):
                results._samples.append({"text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert bytes_of(tmp_path)["samples.jsonl"] == before
        results.append(sample(SECOND), timing(SECOND))
        assert results.done() == {FIRST, SECOND}


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with written(tmp_path), pytest.raises(InUse, match="this process"):
        Results(tmp_path).writing(CONFIG, PROBLEMS)
    child = writer(tmp_path, 1)
    try:
        deadline = time.monotonic() + 60
        while len(Results(tmp_path).done()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InUse, match="another process"):
            Results(tmp_path).writing(CONFIG, PROBLEMS)
    finally:
        child.kill()
        child.wait()
    Results(tmp_path).writing(CONFIG, PROBLEMS).close()


def test_a_forked_child_that_outlives_the_writer_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from tests.support.run_writer import *\n"
        "results = Results(Path(sys.argv[1])).writing(CONFIG, PROBLEMS)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True); os._exit(0)\n"
        "os.close(1); os.close(2); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    try:
        Results(tmp_path).writing(CONFIG, PROBLEMS).close()
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_another_configuration_is_refused_with_its_differences(tmp_path: Path) -> None:
    written(tmp_path).close()
    other = {**CONFIG, "seeds": [1], "concurrency": 9, "alpha": [2.0]}
    with pytest.raises(OtherRun) as refused:
        Results(tmp_path).writing(other, PROBLEMS)
    assert "seeds: stored [1, 2], given [1]" in str(refused.value)
    assert "concurrency: stored 8, given 9" in str(refused.value)
    assert "alpha: stored null, given [2.0]" in str(refused.value)
    assert "tasks" not in str(refused.value)


def test_a_run_stored_with_the_old_names_of_keys_is_resumed(tmp_path: Path) -> None:
    old = {"exact": True, "exchange": {"widen_above": 0.25}, "deadlines": {"missing_s": 1.0, "silent_s": 2.0}}
    new = {
        "batch_invariant": True,
        "exchange": {"max_unseen_mass": 0.25},
        "deadlines": {"reconnect_timeout_s": 1.0, "peer_timeout_s": 2.0},
    }
    Results(tmp_path).writing({**CONFIG, "service": old}, PROBLEMS).close()
    Results(tmp_path).writing({**CONFIG, "service": new}, PROBLEMS).close()
    with pytest.raises(OtherRun, match=r"service\.batch_invariant: stored true, given false"):
        Results(tmp_path).writing({**CONFIG, "service": {**new, "batch_invariant": False}}, PROBLEMS)


def test_keys_that_change_no_sample_may_differ(tmp_path: Path) -> None:
    written(tmp_path).close()
    with Results(tmp_path).writing({**CONFIG, "concurrency": 9}, PROBLEMS, may_differ=("concurrency",)) as results:
        assert results.done() == {FIRST}


def test_changed_problems_are_refused_and_the_first_is_named(tmp_path: Path) -> None:
    written(tmp_path).close()
    changed = (*PROBLEMS[:4], ProblemRow("sums", "04", "What is 4 + 1?", "6"), *PROBLEMS[5:])
    with pytest.raises(OtherRun, match="1 differ, the first is sums 04"):
        Results(tmp_path).writing(CONFIG, changed)


def test_starting_over_deletes_the_previous_run(tmp_path: Path) -> None:
    written(tmp_path).close()
    with Results(tmp_path).writing({**CONFIG, "seeds": [1]}, PROBLEMS, resume=False) as results:
        assert results.done() == set()
        assert list(results.timings()) == []


def test_an_unreadable_complete_line_is_named(tmp_path: Path) -> None:
    written(tmp_path).close()
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b"[]\n")
    with pytest.raises(UnreadableLine, match="line 2"):
        Results(tmp_path).writing(CONFIG, PROBLEMS)
    Results(tmp_path / "other").writing(CONFIG, PROBLEMS).close()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config\.yaml"):
        Results(tmp_path).config()
