"""One engine with a model of a published size: load, the check at load, steps, prompts, look-ups beside forwards."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from transformers import Qwen2Config

from actors.decoding.hashing import extend_hashes
from actors.engine.errors import LoadError
from actors.engine.interface import Extend, Held
from actors.engine.loader import LoadProgress, ModelSource, load_model
from actors.engine.native_runner import NativeRunner, native_engine
from actors.engine.selfcheck import relative_errors, verify_engine
from actors.engine.step_engine import StepEngine
from benchmarks.first_gpu.device import CUDA, DEVICE, DTYPE, Say, milliseconds, used_mib, wait
from benchmarks.sizes import QWEN_1_5B, QWEN_32B, sizes

Kind: TypeAlias = Literal["native", "vllm"]
POSITIONS = 1 << 17
PROMPT = 2_048  # most tokens of a prompt in one forward, as services have by default
CHECKED = 43  # tokens of a sequence whose rows are compared
NEW = (1, 8)  # tokens of a step's sessions: decoding, and a check of drafts
LOOK_UPS, PAUSE_S = 20, 0.003
K = 128  # logits of a slice
DTYPE_NAME = str(DTYPE).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Size:
    """A model and what is run with it. steps: sessions and the tokens that each holds; prompts: their tokens."""

    config: Mapping[str, int]
    cache_tokens: int
    steps: Sequence[tuple[int, int]]
    prompts: Sequence[int]

    def save(self, folder: Path) -> Path:
        """A folder with the model's config, from which both engines load random weights."""
        named = {"architectures": ["Qwen2ForCausalLM"], "dtype": DTYPE_NAME, "tie_word_embeddings": False}
        named |= {"max_position_embeddings": POSITIONS, "eos_token_id": 0}  # a service needs a token that ends answers
        Qwen2Config(**self.config, **named).save_pretrained(folder)
        return folder


_STEPS = tuple((sessions, 1_024) for sessions in (1, 8, 16, 64))
TINY = Size(sizes(2, 128, 192, 4, 2, 512), 4_096, [(1, 64), (4, 64)], [64])
SMALL = Size(QWEN_1_5B, 131_072, _STEPS, [512, 2_048])
LARGE = Size(QWEN_32B, 131_072, [*_STEPS, (1, 16_384)], [256, 512, 2_048])


class Sessions:
    """Sessions of one engine with made-up tokens, which go back to the same position after every step."""

    def __init__(self, engine: StepEngine[Any]) -> None:
        self.engine = engine
        self._held: dict[int, tuple[int, int]] = {}  # by session its tokens without those of steps, and their hash

    def tokens(self, session: int, count: int) -> list[int]:
        return [(31 * at * at + 7 * at + 17 * session) % self.engine.runner.vocabulary for at in range(count)]

    def fill(self, sessions: Sequence[int], context: int) -> None:
        """Let each session hold so many tokens."""
        for session in sessions:
            tokens, hashed = self.tokens(session, context), self.engine.hash_seed
            for at in range(0, context, PROMPT):
                part = tokens[at : at + PROMPT]
                self._extend([Extend(session, at, hashed, part, 0, session)])
                hashed = extend_hashes(hashed, part)[-1]
            self._held[session] = context, hashed

    def prompt(self, tokens: int) -> None:
        """A prompt of a session that then ends."""
        self.fill([1], tokens)
        self.close()

    def step(self, sessions: Sequence[int], tokens: int) -> None:
        """Extend sessions by so many tokens and as many rows, which the next step overwrites."""
        new = self.tokens(0, tokens)
        self._extend([Extend(session, *self._held[session], new, tokens, session) for session in sessions])

    def close(self) -> None:
        for session in self._held:
            self.engine.close(session)
        self._held.clear()

    def _extend(self, batch: list[Extend]) -> None:
        outcomes = self.engine.extend(batch)
        assert all(isinstance(outcome, Held) for outcome in outcomes), outcomes


@contextmanager
def loaded(kind: Kind, size: Size, say: Say) -> Iterator[StepEngine[Any]]:
    """An engine with random weights, not yet checked; it ends with the context. Raises LoadError."""
    stages: list[LoadProgress] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = ModelSource(str(size.save(folder)), dtype=DTYPE_NAME, device=DEVICE.type, load_format="dummy")
        before, began = used_mib(), time.monotonic()
        engine: StepEngine[Any]
        facts: dict[str, Any] = {"engine": kind, "cache_tokens": size.cache_tokens}
        if kind == "vllm":
            from actors.engine.vllm_runner import load_runner  # only some environments have vLLM

            runner = load_runner(source, size.cache_tokens, stages.append)
            stack.callback(runner.stop)
            engine = StepEngine(runner)
        else:
            native = native_engine(load_model(source, stages.append).model, size.cache_tokens)
            facts |= {"attention": native.runner.attention.name, "graphs": native.runner.graphs is not None}
            engine = native
        wait()
        facts |= {"seconds": round(time.monotonic() - began, 1), "mib": used_mib() - before}
        say("loaded", **facts, stages={stage.stage: round(stage.seconds, 1) for stage in stages})
        yield engine


def engine_section(kind: Kind, size: Size, tiny: bool, say: Say) -> None:
    """Everything that one engine shows with one model, or with a tiny one."""
    size = TINY if tiny else size
    with loaded(kind, size, say) as engine:
        sessions = Sessions(engine)
        check(engine, say)
        for count, context in size.steps:
            steps(sessions, count, context, say)
        for prompt in size.prompts:
            say("a prompt", tokens=prompt, ms=milliseconds(partial(sessions.prompt, prompt), 3))
        look_ups(sessions, say)
        if isinstance(engine.runner, NativeRunner):
            compaction(sessions, engine.runner, say)


def check(engine: StepEngine[Any], say: Say) -> None:
    """The check at load, and the distances behind it; the engine goes on if the check refuses it."""
    tokens = Sessions(engine).tokens(1, CHECKED)
    engine.extend([Extend(1, 0, engine.hash_seed, tokens, CHECKED, 1)])
    rows = torch.from_numpy(engine.whole([1]).copy())
    engine.close(1)
    plain, *others = (each.cpu() for each in engine.plain_logits(tokens))
    errors = {"error": float(relative_errors(rows, plain).median())}
    if others:
        errors["plain_forwards_apart"] = float(relative_errors(others[0], plain).median())
    began = time.monotonic()
    try:
        verify_engine(engine, "the model")
        say("the check at load passes", seconds=round(time.monotonic() - began, 1), **errors)
    except LoadError as error:
        say("the check at load refuses", why=str(error)[:400], **errors)


def steps(sessions: Sessions, count: int, context: int, say: Say) -> None:
    """Steps of some sessions; on a GPU also without graphs, and the kernels of a single session's decoding."""
    engine, all_ = sessions.engine, range(1, count + 1)
    if count * (context + 2 * max(NEW)) > engine.cache_stats().tokens_total:
        return say("no step: the cache is too small", sessions=count, context=context)
    sessions.fill(all_, context)
    for tokens in NEW:
        run, before = partial(sessions.step, all_, tokens), used_mib()
        facts: dict[str, float] = {"first_ms": milliseconds(run, 1, warm=0), "first_took_mib": used_mib() - before}
        facts |= {"ms": milliseconds(run), "reduce_ms": milliseconds(lambda: engine.reduce(all_, K))}
        if (graphs := getattr(engine.runner, "graphs", None)) is not None:
            engine.runner.graphs = None
            facts["without_graphs_ms"] = milliseconds(run, 3)
            engine.runner.graphs = graphs
        say("a step", sessions=count, context=context, tokens=tokens, **facts)
    if CUDA and count == 1:
        kernels(sessions, say)
    sessions.close()


def kernels(sessions: Sessions, say: Say) -> None:
    """What the GPU runs in one decoding step of session 1."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sessions.step([1], 1)
        wait()
    found = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)
    top = [(each.key[:60], each.count, round(each.self_device_time_total / 1e3, 3)) for each in found[:10]]
    busy = sum(each.self_device_time_total for each in found) / 1e3
    say("kernels of a step", launches=sum(each.count for each in found), gpu_ms=round(busy, 2), name_count_ms=top)


def look_ups(sessions: Sessions, say: Say) -> None:
    """Values of a finished row, read by this thread while another one runs forwards."""
    engine, ids, stop = sessions.engine, np.arange(K), threading.Event()
    sessions.fill([1, 2], 8)
    sessions.step([1], 1)
    held = engine.rows(1)
    assert held is not None

    def forwards() -> None:
        while not stop.is_set():
            sessions.step([2], 1)
            engine.reduce([2], K)

    def look_up() -> float:
        began = time.perf_counter()
        engine.values([(held, 0)], [K], ids)
        return 1e3 * (time.perf_counter() - began)

    def some() -> list[float]:
        times = []
        for _ in range(LOOK_UPS):
            times.append(look_up())
            time.sleep(PAUSE_S)
        return [round(median(times), 3), round(max(times), 3)]

    facts, beside = {"quiet": some()}, threading.Thread(target=forwards)
    beside.start()
    try:
        facts["beside_forwards"] = some()
        if CUDA:
            with torch.cuda.stream(torch.cuda.Stream(priority=-1)):  # type: ignore[no-untyped-call]
                facts["beside_forwards_on_a_stream_of_their_own"] = some()
    finally:
        stop.set()
        beside.join()
    say("look-ups, median and worst ms", **facts)
    sessions.close()


def compaction(sessions: Sessions, runner: NativeRunner, say: Say) -> None:
    """Moving all sessions to the front of the pool, after one has gone."""
    length = min(PROMPT, runner.cache.total // 8)
    sessions.fill([1, 2, 3, 4], length)
    sessions.engine.close(1)
    took = milliseconds(lambda: runner.cache._compact([3, 2, 4]), 1, warm=0)
    sessions.engine.check()
    say("compaction", tokens=3 * length, ms=took)
    sessions.close()
