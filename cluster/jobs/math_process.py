"""Compares two mathematical answers in child processes that may be killed.

math-verify passes the text of a model to a computer algebra system, which may never return, fill the memory or overflow
the stack. Its own time limit is a signal, which only a main thread can set and which arithmetic in C ignores. Therefore
each comparison runs in a child process that the kernel ends when its processor time is used up. The limit is processor
time rather than seconds, so that a verdict does not depend on the load of the machine.

The child is `python -m cluster.jobs.math_process`: it reads a line of JSON and replies with one byte.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

CPU_S = 10.0  # processor time of one comparison; nearly all take milliseconds
WALL_S = 300.0  # a child without a reply for this long is not computing: the machine is at fault
MEMORY = 2 << 30  # bytes of a child's address space
_ROOT = Path(__file__).resolve().parents[2]
_READY, _EQUAL, _DIFFERENT = b"?", b"1", b"0"
# Signals by which a comparison ends its own child: out of time, out of stack, out of memory within the limit.
_UNDECIDED = (-signal.SIGPROF, -signal.SIGSEGV, -signal.SIGABRT)


class GradingError(RuntimeError):
    """Answers cannot be compared on this machine. The message says why. It is no verdict on an answer."""


class MathProcesses:
    """Up to `count` children, started on demand. Thread-safe: each call uses a child of its own."""

    def __init__(self, count: int | None = None, cpu_s: float = CPU_S) -> None:
        self._cpu_s = cpu_s
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # last in, first out: few children stay in use
        for _ in range(count or min(4, os.cpu_count() or 1)):
            self._idle.put(None)
        atexit.register(self.close)

    def equal(self, gold: str, given: str) -> bool:
        """True if `given` equals the right answer `gold`, both LaTeX; False also if that is not decided in time.

        Raises GradingError if children cannot be started or are killed from outside.
        """
        child = self._idle.get()
        try:
            child = _alive(child) or _Child(self._cpu_s)
            return child.equal(gold, given)
        finally:
            self._idle.put(_alive(child))

    def close(self) -> None:
        """End the idle children. A later call of `equal` starts new ones."""
        for _ in range(self._idle.qsize()):
            try:
                child = self._idle.get_nowait()
            except queue.Empty:
                return
            if child:
                child.stop()
            self._idle.put(None)


class _Child:
    """One comparing process. Used by one thread at a time."""

    def __init__(self, cpu_s: float) -> None:
        # A process session of its own, so that Ctrl-C reaches only the job, which still has answers to grade.
        self._process = subprocess.Popen(  # noqa: S603 - this module, run by this interpreter
            [sys.executable, "-m", "cluster.jobs.math_process", str(cpu_s)],
            cwd=_ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        if self._reply() != _READY:
            self.stop()
            raise GradingError("the process that compares answers did not start; its output says why")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def equal(self, gold: str, given: str) -> bool:
        assert self._process.stdin is not None
        line = json.dumps({"gold": gold, "given": given}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            raise GradingError("the process that compares answers was ended from outside") from None
        reply = self._reply()
        if reply:
            return reply == _EQUAL
        status = self._process.wait(WALL_S)
        if status not in _UNDECIDED:
            raise GradingError(f"the process that compares answers ended with status {status}")
        return False

    def stop(self) -> None:
        """End the process and close its pipes."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait()

    def _reply(self) -> bytes:
        """One byte from the child; empty if it has ended."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()  # unlike select(), it accepts descriptors above 1,023
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(WALL_S * 1000):
            self._process.kill()
            raise GradingError(f"the process that compares answers did not reply for {WALL_S:g} s")
        return os.read(descriptor, 1)


def _alive(child: _Child | None) -> _Child | None:
    """`child`, or None if it has ended; its pipes are then closed."""
    if child and child.ended:
        child.stop()
        return None
    return child


def equal(gold: str, given: str) -> bool:
    """math-verify's verdict, with numbers compared by `math_numbers`. Call it in a process that may be killed."""
    from math_verify import grader, verify
    from sympy.core.random import seed

    from cluster.jobs.math_numbers import equal_numbers

    # Its own comparison cuts what is below 1e-15, and rounds to six decimals inside sets, intervals and equations too.
    grader.sympy_numeric_eq = equal_numbers
    seed(0)  # sympy tests some identities at random points
    return bool(verify(parsed(gold), parsed(given), timeout_seconds=None))


def parsed(answer: str) -> list[object]:
    """math-verify's parse of LaTeX: an expression if it finds one, and the text itself as a fallback.

    Units must be removed before: math-verify's own rule takes variables such as the t of 5t for units.
    """
    from math_verify import LatexExtractionConfig, parse

    rules = LatexExtractionConfig(boxed_match_priority=0)
    rules = replace(rules, normalization_config=replace(rules.normalization_config, units=False))
    parsed: list[object] = parse(f"\\boxed{{{answer}}}", extraction_config=[rules], parsing_timeout=None)
    return parsed


def _serve(requests: BinaryIO, replies: BinaryIO, cpu_s: float) -> None:
    replies.write(_READY)
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        request = json.loads(line)
        try:
            verdict = equal(request["gold"], request["given"])
        except (MemoryError, RecursionError):
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(_EQUAL if verdict else _DIFFERENT)


def main() -> None:
    import resource

    import math_verify  # noqa: F401 - so that a comparison's time does not include the import

    logging.disable(logging.WARNING)  # math-verify's warning in each process that its own limit is off
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.dup(1)
    os.dup2(2, 1)  # a parser's own output must not look like a reply
    with os.fdopen(replies, "wb", buffering=0) as out:
        _serve(sys.stdin.buffer, out, float(sys.argv[1]))


if __name__ == "__main__":
    main()
