"""Three roles on one GPU: a large model's steps beside two busy small ones, and a service on Ray that answers."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.first_gpu.device import CUDA, DEVICE, Say, milliseconds, used_mib
from benchmarks.first_gpu.engines import DTYPE_NAME, LARGE, NEW, SMALL, TINY, Kind, Sessions, Size, loaded

READY_S = 240.0
CONTEXT = 256  # tokens of the sessions whose steps are timed
ANSWER = 64  # tokens
SHARES = {"target": 0.86, "guider": 0.07, "guider_base": 0.07}  # of the GPU


def stay_busy(kind: Kind, size: Size, ready: Event) -> None:
    """Decode one session for ever."""
    with loaded(kind, size, lambda finding, **facts: None) as engine:
        sessions = Sessions(engine)
        sessions.fill([1], CONTEXT)
        sessions.step([1], 1)
        ready.set()
        while True:
            sessions.step([1], 1)
            engine.reduce([1], 1)


def roles(kind: Kind, tiny: bool, say: Say) -> None:
    """Steps of the target alone, and beside two small models that always compute."""
    target, beside = (TINY, TINY) if tiny else (LARGE, SMALL)
    context = multiprocessing.get_context("spawn")
    with loaded(kind, target, say) as engine, ExitStack() as stack:
        sessions = Sessions(engine)
        sessions.fill([1], CONTEXT)
        alone = {f"{tokens}_alone_ms": milliseconds(partial(sessions.step, [1], tokens)) for tokens in NEW}
        before, events = used_mib(), [context.Event() for _ in range(2)]
        for ready in events:
            process = context.Process(target=stay_busy, args=(kind, beside, ready), daemon=True)
            process.start()
            stack.callback(process.kill)
        for ready in events:
            if not ready.wait(READY_S):
                raise TimeoutError(f"a small model did not compute within {READY_S:g} s")
        both = {f"{tokens}_beside_ms": milliseconds(partial(sessions.step, [1], tokens)) for tokens in NEW}
        say("a step of the target beside two busy small models", **alone, **both, small_mib=used_mib() - before)


def service(kind: Kind, tiny: bool, say: Say) -> None:
    """A service on Ray with fractions of the GPU answers over HTTP, guided and by its target alone."""
    import httpx  # the service's packages, which the other sections do without

    from actors.config import load_config
    from benchmarks.sse_client import await_answer
    from cluster.launch import running_service

    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for role, share in SHARES.items():
            size = TINY if tiny else (LARGE if role == "target" else SMALL)
            path = with_words(size.save(Path(folder) / role), (TINY if tiny else SMALL).config["vocab_size"])
            models[role] = {"path": str(path), "load_format": "dummy", "dtype": DTYPE_NAME, "device": DEVICE.type}
            models[role] |= {"engine": kind, "num_gpus": share if CUDA else 0, "cache_tokens": size.cache_tokens // 4}
        began = time.monotonic()
        with running_service(load_config({"version": 1, "models": models})) as url:
            await_answer(f"{url}/ready", READY_S)
            say("the service is ready", engine=kind, seconds=round(time.monotonic() - began, 1), mib=used_mib())
            asked: dict[str, Any] = {
                "prompt": list(range(5, 25)),
                "max_tokens": ANSWER,
                "temperature": 0,
                "ignore_eos": True,
            }
            for model in ("thinklogit", "thinklogit", "thinklogit/target", "thinklogit/target"):  # the first one warms
                began = time.monotonic()
                reply = httpx.post(f"{url}/v1/completions", json=asked | {"model": model}, timeout=READY_S)
                seconds = time.monotonic() - began
                usage = reply.raise_for_status().json()["usage"]
                say("an answer over HTTP", model=model, tokens_per_s=round(usage["completion_tokens"] / seconds, 1))


def with_words(folder: Path, count: int) -> Path:
    """The folder, with a tokenizer of so many words: made-up ones, and the one of the router's first grammar."""
    from tokenizers import Tokenizer, models

    words = {"a" if token == 1 else f"<{token:x}>": token for token in range(count)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))  # noqa: S106
    return folder
