"""A model on one engine, in a process of its own, whose steps `benchmarks.engines` asks for.

    python -m benchmarks.engine_worker native|vllm|generate MODEL SESSIONS

Prints "ready", then answers each line [sessions, tokens, repeat] with the seconds of so many steps, as JSON; null where
the kind has no such step. It runs in the service's environment (native) or in vLLM's, so it imports little.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

from actors.decoding.hashing import extend_hashes
from actors.engine.interface import Extend

CONTEXT = 256  # tokens that each session holds
MOST_TOKENS = 8  # new ones of a session
DTYPE = "float32"


def prompt(session: int, count: int, vocabulary: int) -> list[int]:
    draw = random.Random(session)
    return [draw.randrange(10, vocabulary) for _ in range(count)]


class Extending:
    """An engine of ours: the time of `extend`, which ends when the logits are computed."""

    def __init__(self, engine: Any, sessions: int) -> None:
        self._engine = engine
        self._prompts = [prompt(s, CONTEXT + MOST_TOKENS, engine.runner.vocabulary) for s in range(sessions)]
        self._hashes = [extend_hashes(engine.hash_seed, tokens[:CONTEXT])[-1] for tokens in self._prompts]
        for s, tokens in enumerate(self._prompts):
            engine.extend([Extend(s, 0, engine.hash_seed, tokens[:CONTEXT], 0, s)])

    def run(self, sessions: int, tokens: int, repeat: int) -> list[float]:
        """Seconds of each step of so many sessions, which go back to the same position every time."""
        batch = [
            Extend(s, CONTEXT, self._hashes[s], self._prompts[s][CONTEXT : CONTEXT + tokens], tokens, s)
            for s in range(sessions)
        ]
        return [self._timed(batch) for _ in range(repeat)]

    def _timed(self, batch: list[Extend]) -> float:
        begin = time.perf_counter()
        self._engine.extend(batch)
        return time.perf_counter() - begin


class Generating:
    """vLLM's own loop: its scheduler, input preparation, forward, greedy sampler and output processing."""

    def __init__(self, model: str, sessions: int) -> None:
        from vllm import LLM

        options: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "async_scheduling": False}
        options |= {"distributed_executor_backend": "uni", "block_size": 32, "skip_tokenizer_init": True}
        options |= {"max_model_len": 1_024, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30}
        self._engine = LLM(model, dtype=DTYPE, **options).llm_engine
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._asked = 0
        assert sessions <= 64

    def run(self, sessions: int, tokens: int, repeat: int) -> list[float] | None:
        """Seconds of each decode step of so many requests; None for checks of drafts, which it does not have."""
        if tokens > 1:
            return None
        from vllm import SamplingParams

        names = [str(self._asked + s) for s in range(sessions)]
        self._asked += sessions
        for s, name in enumerate(names):
            sampling = SamplingParams(temperature=0, max_tokens=repeat + 20, ignore_eos=True, detokenize=False)
            self._engine.add_request(name, {"prompt_token_ids": prompt(s, CONTEXT, self._vocabulary)}, sampling)
        took: list[float] = []
        while len(took) < repeat:
            begin = time.perf_counter()
            outputs = self._engine.step()
            seconds = time.perf_counter() - begin
            if len(outputs) == sessions and all(len(one.outputs[0].token_ids) > 1 for one in outputs):
                took.append(seconds)
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return took


def made(kind: str, model: str, sessions: int) -> Extending | Generating:
    """The engine of a kind, with its sessions' prompts computed."""
    if kind == "generate":
        return Generating(model, sessions)
    from actors.engine.loader import ModelSource, load_engine

    source, tokens = ModelSource(model, dtype=DTYPE, device="cpu"), sessions * 2 * CONTEXT
    if kind == "native":
        return Extending(load_engine(source, tokens), sessions)
    from actors.engine.vllm_runner import vllm_engine

    return Extending(vllm_engine(source, tokens), sessions)


def main() -> None:
    kind, model, sessions = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    engine = made(kind, model, int(sessions))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.run(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
