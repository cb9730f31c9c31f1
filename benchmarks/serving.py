"""Measures the service over HTTP: tokens a second, time to the first token and between tokens.

    python -m benchmarks.serving [--models null|trio] [--streams 1 8 32 256] [--tokens 128] [--rounds 3]
                                 [--alpha 1.0] [--save]

The whole service on Ray Serve, and a client in a process of its own that requests `streams` answers at once. `null`:
models that compute nothing behind the trio's tokenizers, so that what remains is the service itself. The time between
tokens is a stream's time from its first message to its last, shared equally by the tokens after the first: messages
hold several tokens under load.

`over_bare` is the service's tokens a second divided by those of a bare application of Ray Serve that offers the same
messages at the service's own pace, through the same proxy and to the same client. The bare application
(`benchmarks.bare_application`) replays the answers of each round right after it; `bare_unpaced_tokens_per_s` is what it
reaches without pauses. The last line is a JSON list with one object for each number of streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from actors.api.generation import Role
from actors.config import ServiceConfig
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from actors.text.tokenizer import RoleTokenizer
from benchmarks.bare_application import PACED, UNPACED, Answers, BareApplication
from benchmarks.cpu_time import busy_seconds
from benchmarks.null_engine import NullEngine
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.sse_client import Stream, await_answer, read_all
from cluster.launch import running_service
from tests.support.local_service import trio_config

if TYPE_CHECKING:
    from actors.engine.loader import LoadProgress

STREAMS = (1, 8, 32, 256)
QUESTION = "Who is the mentor of the rival of the doctor of Ada?"
READY_S = 120.0
WARM_TOKENS = 16


def load_null(config: ServiceConfig, role: Role, report: Callable[[LoadProgress], None], start: object) -> Engine:
    """An engine that computes nothing, as wide as the role's vocabulary."""
    model = config.models.role(role)
    return NullEngine(
        RoleTokenizer.load(model.path).width, role, 1 << 20 if model.cache_tokens == "auto" else model.cache_tokens
    )


@dataclass(slots=True)
class Rounds:
    """Rounds of one application at one number of streams. busy: CPU seconds by process."""

    answers: list[Stream] = field(default_factory=list)
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, of all streams together."""
        return self.tokens / self.seconds

    @property
    def cpu_us_per_token(self) -> dict[str, int]:
        """CPU microseconds of each process for a token."""
        return {name: round(1e6 * seconds / self.tokens) for name, seconds in sorted(self.busy.items())}

    def add(self, answers: Sequence[Stream], busy: dict[str, float]) -> None:
        """Take in one round."""
        self.answers += answers
        self.seconds += max(answer.last for answer in answers) - min(answer.asked for answer in answers)
        for name, seconds in busy.items():
            self.busy[name] = self.busy.get(name, 0.0) + seconds


@dataclass(slots=True)
class Measured:
    """All rounds of one number of streams: of the service, and of the bare application at its pace and without."""

    streams: int
    service: Rounds = field(default_factory=Rounds)
    bare: Rounds = field(default_factory=Rounds)
    unpaced: Rounds = field(default_factory=Rounds)

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        answers = self.service.answers
        return {
            "streams": self.streams,
            "tokens_per_s": round(self.service.tokens_per_s),
            "bare_tokens_per_s": round(self.bare.tokens_per_s),
            "over_bare": round(self.service.tokens_per_s / self.bare.tokens_per_s, 3),
            "bare_unpaced_tokens_per_s": round(self.unpaced.tokens_per_s),
            "ttft_ms_p50": _ms([answer.first - answer.asked for answer in answers]),
            "inter_token_ms_p50": _ms([answer.inter_token_s for answer in answers]),
        }

    @property
    def messages_per_answer(self) -> float:
        """Mean number of messages with text of an answer."""
        return round(sum(answer.messages for answer in self.service.answers) / len(self.service.answers), 1)

    def details(self) -> dict[str, Any]:
        """Messages of an answer, and CPU microseconds of each process for a token."""
        return {
            "streams": self.streams,
            "messages_per_answer": self.messages_per_answer,
            "cpu_us_per_token": self.service.cpu_us_per_token,
            "bare_cpu_us_per_token": self.bare.cpu_us_per_token,
        }


def measure(
    url: str,
    load_bare: Callable[[Answers], None],
    name: str,
    streams: Sequence[int],
    tokens: int,
    rounds: int,
    alpha: float,
    done: Callable[[], None],
) -> list[Measured]:
    """`rounds` rounds of each number of streams in turn, each of the service and then of the bare application.

    load_bare: replaces the answers of the bare application. done: called after each round.
    """
    results = [Measured(count) for count in streams]
    with ProcessPoolExecutor(1, get_context("spawn")) as client:

        def play(base: str, to: Rounds, count: int, length: int) -> list[Stream]:
            bodies = [_body(name, seed, length, alpha) for seed in range(count)]
            before = busy_seconds()
            answers = client.submit(read_all, base, bodies).result()
            after = busy_seconds()
            to.add(answers, {process: after[process] - before.get(process, 0.0) for process in after})
            return answers

        def play_all(measured: Measured, length: int) -> None:
            answers = play(url, measured.service, measured.streams, length)
            load_bare({seed: answer.chunks for seed, answer in enumerate(answers)})
            for prefix, to in ((PACED, measured.bare), (UNPACED, measured.unpaced)):
                replayed = play(url + prefix, to, measured.streams, length)
                assert [each.chunks for each in replayed] == [each.chunks for each in answers]

        for count in streams:  # what is slow once is not measured
            play_all(Measured(count), WARM_TOKENS)
        for _ in range(rounds):
            for measured in results:
                play_all(measured, tokens)
                done()
    return results


def run(models: str, streams: Sequence[int], tokens: int, rounds: int, alpha: float) -> list[Measured]:
    """Measure, in a Ray cluster that ends afterwards."""
    config = serving_config(models, max(streams))
    load = load_null if models == "null" else load_role
    with running_service(config, load=load) as url, progress(console()) as bar:
        bare = BareApplication(config)
        await_answer(f"{url}/ready", READY_S)
        task = bar.add_task("rounds", total=rounds * len(streams))
        return measure(url, bare.load, config.name, streams, tokens, rounds, alpha, lambda: bar.advance(task))


def serving_config(models: str, streams: int) -> ServiceConfig:
    """Every stream is decoded at once. With models that compute nothing, nothing is widened and nothing audited."""
    exchange = {"max_unseen_mass": 1, "audit_every": 0} if models == "null" else {}
    return trio_config(batch_invariant=False, coordinator={"max_sessions": streams}, exchange=exchange)


def tables(results: Sequence[Measured]) -> list[Table]:
    """Every figure by number of streams, and the shares of the time."""
    columns = [str(measured.streams) for measured in results]
    details = [measured.details() for measured in results]
    shown = []
    for title, figures in (
        ("through HTTP", [measured.result() | {"messages": measured.messages_per_answer} for measured in results]),
        ("service: CPU µs of each process for a token", [each["cpu_us_per_token"] for each in details]),
        ("bare application: the same", [each["bare_cpu_us_per_token"] for each in details]),
    ):
        table = Table("streams", *columns, title=title)
        for name in dict.fromkeys(name for each in figures for name in each if name != "streams"):
            table.add_row(name, *(f"{each.get(name, 0):,}" for each in figures))
        shown.append(table)
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", choices=("null", "trio"), default="null", help="null: they compute nothing (null)")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), help="answers at once (1 8 32 256)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (128)")
    parser.add_argument("--rounds", type=int, default=3, help="of each number of streams (3)")
    parser.add_argument("--alpha", type=float, default=1.0, help="0: the target alone (1.0)")
    options = parser.parse_args()
    results = run(options.models, options.streams, options.tokens, options.rounds, options.alpha)
    console().print(*tables(results))
    publish("serving", [m.result() for m in results], options.save, [m.details() for m in results])


def _body(model: str, seed: int, tokens: int, alpha: float) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "seed": seed,
        "max_tokens": tokens,
        "ignore_eos": True,
        "guidance": {"alpha": alpha},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _ms(seconds: Sequence[float]) -> float:
    return round(1_000 * float(np.median(seconds)), 3)


if __name__ == "__main__":
    main()
