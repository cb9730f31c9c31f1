"""What goes into one forward of a model, what comes out, and the engine's own thread. No wire, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actors.decoding.hashing import extend_hashes
from actors.engine.verbs import CacheStats, Extend, Full, Held, KVMiss, Outcome
from actors.wire.columns import Answer, ExtendItem, Recipient
from actors.wire.messages import WHOLE

DECODE_TOKENS = 8  # an extend of so many tokens or fewer is a decode step or a check of drafts, never held back


class Slices(Protocol):
    """R rows reduced to their k largest logits, ids ascending."""

    @property
    def ids(self) -> NDArray[np.int32]: ...  # [R, k]
    @property
    def logits(self) -> NDArray[np.float32]: ...  # [R, k]
    @property
    def logsumexp(self) -> NDArray[np.float32]: ...  # [R]


class SessionRows(Protocol):
    """The rows of a session's last extend: a snapshot that any thread may read."""

    def index(self, position: int, prefix: int) -> int | None:
        """Which row is at `position`, built from tokens with this running hash, its own token included."""

    def slices(self, k: int, rows: Sequence[int] | None = None) -> Slices: ...
    def whole(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]: ...
    def at(self, row: int, ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]: ...


class Engine(Protocol):
    """A model that extends sessions: `actors.engine.step_engine.StepEngine`, or one that computes nothing.

    `rows` and `check_extend` may be called from any thread, everything else from one.
    """

    width: int  # logits in a row
    hash_seed: int
    exact: bool

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]: ...
    def check_extend(self, extend: Extend) -> None:
        """Raise for an extend that can never succeed."""

    def rows(self, session: int) -> SessionRows | None: ...
    def reduce(self, sessions: Sequence[int], k: int) -> Slices: ...
    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]: ...
    def close(self, session: int) -> None: ...
    def cache_stats(self) -> CacheStats: ...


@dataclass(slots=True, eq=False)
class Pending:
    """An extend on its way, and how far it has got: a long one takes several forwards."""

    peer: Recipient
    item: ExtendItem
    prefix: int
    done: int = 0  # tokens that earlier forwards took

    @property
    def left(self) -> int:
        return len(self.item.tokens) - self.done

    @property
    def is_decode(self) -> bool:
        return len(self.item.tokens) <= DECODE_TOKENS

    def makes(self, position: int) -> bool:
        """Whether the row of the token at `position` will be held when this is done."""
        end = self.item.position + len(self.item.tokens)
        return end - self.item.rows <= position < end

    def chunk(self, budget: int) -> int:
        """How many tokens to take into a forward with room for `budget`; all that give rows go together, at the end."""
        ahead = self.left - self.item.rows
        return self.left if self.left <= budget or ahead <= 0 else min(ahead, budget)

    def advance(self, tokens: int) -> None:
        """A forward took `tokens` more."""
        self.prefix = extend_hashes(self.prefix, self.item.tokens[self.done : self.done + tokens])[-1]
        self.done += tokens


class Part(NamedTuple):
    """What one forward takes of an extend."""

    pending: Pending
    tokens: int

    @property
    def is_last(self) -> bool:
        return self.tokens == self.pending.left

    def extend(self) -> Extend:
        item, done = self.pending.item, self.pending.done
        tokens = item.tokens[done : done + self.tokens]
        rows = item.rows if self.is_last else 0
        return Extend(item.session, item.position + done, self.pending.prefix, tokens, rows, item.age)


@dataclass(frozen=True, slots=True)
class Failed:
    """The forward raised: the session's cache is dropped."""


Result: TypeAlias = Answer | Held | KVMiss | Full | Failed  # Held: a chunk is done and more is to come


def choose(waiting: Iterable[Pending], prefill_chunk: int) -> list[Part]:
    """What the next forward takes: every decode step, then prompts, oldest first, up to `prefill_chunk` tokens.

    Rows that belong together may exceed the budget, if nothing else uses it.
    """
    parts: list[Part] = []
    prompts: list[Pending] = []
    for pending in waiting:
        if pending.is_decode:
            parts.append(Part(pending, pending.left))
        else:
            prompts.append(pending)
    budget = prefill_chunk
    for pending in sorted(prompts, key=lambda pending: pending.item.age):
        tokens = pending.chunk(budget)
        if tokens > budget and budget < prefill_chunk:
            continue
        parts.append(Part(pending, tokens))
        budget -= tokens
        if budget <= 0:
            break
    return parts


class ForwardThread:
    """Runs forwards one after another on a thread of its own. `start`, then `run`, then `stop`.

    Forwards take their turn through a plain queue, and each result comes back in one call on the event loop: an
    executor's futures cost three times as many wake-ups of threads.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(
        self,
        engine: Engine,
        parts: Sequence[Part],
        closing: Sequence[int],
        done: Callable[[list[Result] | Exception], None],
    ) -> None:
        """Run a forward (see `run_forward`); then `done` on the caller's event loop with what it gave or raised."""
        self._jobs.put(_Job(asyncio.get_running_loop(), engine, parts, closing, done))

    def stop(self) -> None:
        """End the thread after its last forward; waits for nothing."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.do()
            del job  # what it holds is not kept until the next one comes


@dataclass(frozen=True, slots=True)
class _Job:
    loop: asyncio.AbstractEventLoop
    engine: Engine
    parts: Sequence[Part]
    closing: Sequence[int]
    done: Callable[[list[Result] | Exception], None]

    def do(self) -> None:
        outcome: list[Result] | Exception
        try:
            outcome = run_forward(self.engine, self.parts, self.closing)
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.done, outcome)


def run_forward(engine: Engine, parts: Sequence[Part], closing: Sequence[int]) -> list[Result]:
    """Close sessions, run one forward and reduce its rows; results in the order of `parts`.

    If the engine raises, the sessions of all parts are dropped.
    """
    for session in closing:
        engine.close(session)
    if not parts:
        return []
    try:
        outcomes = engine.extend([part.extend() for part in parts])
        done = [
            part for part, outcome in zip(parts, outcomes, strict=True) if part.is_last and isinstance(outcome, Held)
        ]
        answers = reduce_items(engine, [part.pending.item for part in done])
    except Exception:
        for part in parts:
            engine.close(part.pending.item.session)
        raise
    return [answers.get(part.pending.item.session, outcome) for part, outcome in zip(parts, outcomes, strict=True)]


def reduce_items(engine: Engine, items: Sequence[ExtendItem]) -> dict[int, Answer]:
    """By session, the answers to items whose rows are held; items of one k are reduced together."""
    groups: dict[int, list[ExtendItem]] = {}
    answers: dict[int, Answer] = {}
    for item in items:
        if item.rows:
            groups.setdefault(width_of(item.k, engine.width), []).append(item)
        else:
            answers[item.session] = nothing(item.k)
    for k, group in groups.items():
        sessions = [item.session for item in group]
        slices = engine.reduce(sessions, max(k, 0))
        logits = engine.whole(sessions) if k == WHOLE else slices.logits
        first = 0
        for item in group:
            mine = slice(first, first + item.rows)
            known = known_logits(engine, item)
            answers[item.session] = Answer(k, slices.logsumexp[mine], slices.ids[mine], logits[mine], known)
            first += item.rows
    return answers


def width_of(k: int, width: int) -> int:
    """The k of an answer: as asked, WHOLE or at most the row's width."""
    return k if k == WHOLE else min(k, width)


def within(ids: NDArray[np.int32], width: int) -> bool:
    """Whether all of `ids` are ids of a row."""
    return not len(ids) or bool(ids.view(np.uint32).max() < width)  # a negative id is a large unsigned one


def nothing(k: int) -> Answer:
    """The answer to an extend that asked for no rows."""
    none = np.zeros((0, 0), np.float32)
    return Answer(k, np.zeros(0, np.float32), none.astype(np.int32), none, none)


def known_logits(engine: Engine, item: ExtendItem) -> NDArray[np.float32]:
    """The logits [R, ids] of each of an item's rows at the ids that it must know."""
    if not len(item.know):
        return np.zeros((item.rows, 0), np.float32)
    held = engine.rows(item.session)
    assert held is not None, "rows are held until the session's next extend"
    return np.stack([held.at(row, item.know) for row in range(item.rows)])
