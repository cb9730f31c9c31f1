"""Simulated models on a GPU: a forward sleeps for as long as a GPU would take, and computes nothing.

A forward sleeps without a core, so that coordinator and replicas have the cores to themselves, as beside GPUs. Every
figure that is measured with these models is one of a simulation.

**Times** are a table: `TIMED_SHAPES` has the `ForwardTimes` of each role. They follow the roofline. A forward reads all
weights, however few tokens it takes (14.0 ms for 32 billion parameters of 16 bits at 4.8 TB/s, with what else is read),
and it computes each of its tokens (twice the parameters in FLOP, at 600 TFLOP/s). The slower of the two counts. So a
forward is flat up to about 130 tokens, over however many sessions, and linear from there on. A forward in which a
session has several new tokens, which is a verification or a part of a prompt, reads a little more. Models of 2 billion
parameters and fewer are bound by the launches of their kernels, and a verification takes them no longer than a step.
Reading the KV cache is left out: for 32 sessions of 200 tokens it would be .35 ms beside the 14.

**Rows** come from a small bank, as those of the null engine. Each row has a peak far above its tail, so that every
choice is clear, greedy or at a temperature of .6, and nothing is widened. The target's peak is what guidance chooses.
The guider's row peaks there too, with probability `agreement`, or else at another token. The running hash decides, and
it is the same in all roles. So each draft of the guider is accepted with this probability, independently of the others.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.decoding.hashing import derive_seed, extend_hashes, mix64
from actors.engine.interface import Extend, Held, Outcome
from benchmarks.null_engine import BANK_ROWS, NullEngine, RowBank, shared_ranks, tail_logits
from benchmarks.shapes import Shape

SIMULATION = "a simulation: models sleep and compute nothing"
# Logits of a peak. Tails begin at about 0. The target's must stay above the guider's, and the guider's above its tail,
# by more than the noise of a choice at any usual temperature.
PEAKS: Mapping[Role, float] = {"target": 30.0, "guider": 12.0}
_ABSENT = -30.0  # logit of ids that only one model has
_CHOICE = 0x5DEECE66D  # makes the hash that decides on agreement another one than that which chooses the row
_PROBES, _PROBE_S = 20, 0.001  # sleeps that measure how late the timer is


@dataclass(frozen=True, slots=True)
class ForwardTimes:
    """Milliseconds of one model's forwards.

    step_ms: least time if every session has one new token. check_ms: least time if a session has several.
    token_ms: to compute one token.
    """

    step_ms: float
    check_ms: float
    token_ms: float

    def ms(self, tokens: Sequence[int]) -> float:
        """The time of a forward. tokens: new ones of each session; without any session it takes no time."""
        if not tokens:
            return 0.0
        return max(self.step_ms if max(tokens) == 1 else self.check_ms, self.token_ms * sum(tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedShape(Shape):
    """Simulated models, of which only widths of rows and times of forwards matter.

    device_locks: held during a forward by roles that share a device; the others have a device of their own.
    """

    times: Mapping[Role, ForwardTimes]
    device_locks: Mapping[Role, AbstractContextManager[Any]] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        return True

    def bank(self, role: Role, agreement: float) -> RowBank:
        """The rows of a role."""
        return AgreeingBank(self, role, agreement)

    def sharing(self, *roles: Role) -> TimedShape:
        """The same models with one device for these roles: their forwards exclude each other, across processes, too."""
        return replace(self, device_locks=dict.fromkeys(roles, multiprocessing.get_context("spawn").Lock()))


class Script(NamedTuple):
    """A prompt and the answer that the models write behind it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedShape(TimedShape):
    """Simulated models of one vocabulary whose rows peak at the tokens of scripts, and behind no prompt of theirs."""

    scripts: tuple[Script, ...]

    def bank(self, role: Role, agreement: float) -> RowBank:
        return ScriptedBank(self, role, agreement)


def _timed(name: str, target: ForwardTimes, small: ForwardTimes) -> TimedShape:
    """Models with the vocabularies of Qwen2.5."""
    times: dict[Role, ForwardTimes] = {"target": target, "guider": small, "guider_base": small}
    return TimedShape(name, {"vocab_size": 152_064}, {"vocab_size": 151_936}, times=times)


TIMED_SHAPES = {
    shape.name: shape
    for shape in (  # on an H200, 16 bits
        _timed("h200-32b", ForwardTimes(14.0, 14.5, 0.11), ForwardTimes(2.0, 2.0, 0.005)),  # small models of 1.5B
        _timed("h200-7b", ForwardTimes(4.0, 4.3, 0.025), ForwardTimes(1.5, 1.5, 0.0016)),  # small models of .5B
    )
}


def agrees(prefix: int, agreement: float) -> bool:
    """True for a share `agreement` of all running hashes."""
    return mix64(prefix ^ _CHOICE) < agreement * 2**64


class AgreeingBank(RowBank):
    """The rows of one role, with peaks. The guider has each row twice: the second time its peak is at another token."""

    def __init__(self, shape: Shape, role: Role, agreement: float) -> None:
        if not 0 <= agreement <= 1:
            raise ValueError(f"agreement is {agreement}, a probability was expected")
        super().__init__(_peaked_rows(shape, role))
        self._agreement = agreement if role == "guider" else 1.0

    def number(self, prefix: int) -> int:
        row = prefix % BANK_ROWS
        return row if agrees(prefix, self._agreement) else row + BANK_ROWS


class ScriptedBank(RowBank):
    """The rows of one role, one for each token of the scripts, with its peak there.

    The guider's peak is at another token of the scripts where it does not agree.
    """

    def __init__(self, shape: ScriptedShape, role: Role, agreement: float) -> None:
        tokens = sorted({token for script in shape.scripts for token in script.answer})
        tails = tail_logits(shared_ranks(shape.common), role)
        rows = tails[np.arange(len(tokens)) % BANK_ROWS]
        if role in PEAKS:
            rows[np.arange(len(tokens)), tokens] = PEAKS[role]
        super().__init__(rows)
        at = {token: number for number, token in enumerate(tokens)}
        self._numbers: dict[int, int] = {}  # by the running hash of the tokens before
        for prompt, answer in shape.scripts:
            hashes = extend_hashes(derive_seed(shape.common), [*prompt, *answer])
            self._numbers |= zip(hashes[len(prompt) - 1 : -1], map(at.__getitem__, answer), strict=True)
        self._agreement = agreement if role == "guider" else 1.0

    def number(self, prefix: int) -> int:
        number = self._numbers.get(prefix, 0)
        return number if agrees(prefix, self._agreement) else (number + 1) % len(self.logits)


def _peaked_rows(shape: Shape, role: Role) -> NDArray[np.float32]:
    """The logits [BANK_ROWS or twice as many, width of the role]."""
    sizes, ranks = shape.sizes(role), shared_ranks(shape.common)
    assert sizes is not None
    peaks = ranks.argmin(1)
    if role == "guider":
        second = np.argmax(ranks == 1, axis=1)
        ranks, peaks = np.concatenate([ranks, ranks]), np.concatenate([peaks, second])
    rows = np.full((len(ranks), sizes["vocab_size"]), _ABSENT, np.float32)
    rows[:, : shape.common] = tail_logits(ranks, role)
    if role in PEAKS:
        rows[np.arange(len(rows)), peaks] = PEAKS[role]
    return rows


class Timer:
    """Sleeps until a moment. The operating system wakes a thread too late; the least delay is measured and subtracted.

    clock: the current time in seconds. sleep: for so many seconds, with the core free.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.clock, self._sleep = clock, sleep
        self.late_s = min(self._probe() for _ in range(_PROBES))

    def sleep_until(self, moment: float) -> None:
        """Return at this moment of `clock`, or at once if it has passed."""
        left = moment - self.clock() - self.late_s
        if left > 0:
            self._sleep(left)

    def _probe(self) -> float:
        began = self.clock()
        self._sleep(_PROBE_S)
        return self.clock() - began - _PROBE_S


class TimedEngine(NullEngine):
    """A simulated engine (`actors.replica.engine_thread.Engine`) of one role: see the module."""

    def __init__(
        self,
        shape: TimedShape,
        role: Role,
        agreement: float,
        cache_tokens: int = 1 << 20,
        timer: Timer | None = None,
    ) -> None:
        bank = shape.bank(role, agreement)
        super().__init__(bank.logits.shape[1], role, cache_tokens, bank)
        self.hash_seed = derive_seed(shape.common)  # of all roles, whose running hashes must be the same
        self._times, self._timer = shape.times[role], timer or Timer()
        self._device = shape.device_locks.get(role) or nullcontext()
        self.devices = ("shared" if role in shape.device_locks else role,)

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        """Take the tokens of every extend, and return when a GPU would. An extend that is refused takes no time."""
        with self._device:
            began = self._timer.clock()
            outcomes = super().extend(batch)
            taken = [each for each, outcome in zip(batch, outcomes, strict=True) if isinstance(outcome, Held)]
            self._timer.sleep_until(began + self._times.ms([len(each.tokens) for each in taken]) / 1_000)
        return outcomes
