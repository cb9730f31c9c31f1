"""Compares decisions from top-k slices with those from whole rows, and counts the bytes of both.

    python -m benchmarks.fidelity [--rows 40] [--questions 5] [--real] [--save]

Rows are decided by the service's own exchange and decisions and compared with plain arithmetic on whole rows: the
embedded trio's (k = 8, 16 and 128) while it answers questions, and rows of 152,064 tokens with tails of several
weights, some with a base far below the guider outside the head. Each is measured as slices of k leave it ("narrow")
and as the widening rule leaves it. Bytes per token are those of real sockets at k = 128, unwidened, with half of the
two top-k sets overlapping. The last line is one JSON object: the worst over the trio and tails of exponent 2.2 and
more unwidened, and over every case that is flatter, or has a far base, with widening on.

With --real the rows are those of published models (`benchmarks.real_rows`): the last line then names the guider, and
has the worst greedy agreement and total variation of a target of the same family and of another.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig
from actors.coordinator.session import ActiveSession
from actors.decoding.candidates import Floats
from actors.decoding.decision import Decisions
from actors.preflight import load_tokenizers
from actors.replica.engine_thread import Engine
from actors.text.tokenizer import RoleTokenizer
from benchmarks import real_rows
from benchmarks.lockstep import Lockstep
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.synthetic_models import guided_request, wide_config
from benchmarks.synthetic_rows import Tail, TailEngine, TailStream
from cluster.demo.task import Question, questions
from cluster.demo.tokenizer import MARKUP
from tests.support.local_service import decode, load_engines, local_service, trio_config

K = 128
TRIO_KS = (8, 16, K)
TEMPERATURES = (0.0, 0.6, 1.0)
EXPONENTS = (1.0, 1.2, 1.5, 2.0, 2.2, 2.5)
FAR = (0.0, 3.0)  # nats by which the base falls below the guider outside the head
STEEP = 2.2  # tails from here on need no widening
SESSIONS = (1, 64)  # of the bytes


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Rows of one case at one temperature, decided from slices, compared with whole rows.

    first_flip: rows before the first whose likeliest token differs (all rows if none does). tv: total variation
    between the distributions that tokens are drawn from; of greedy rows none. widened: share of the rows.
    """

    case: str
    k: int
    temperature: float
    widening: bool
    rows: int
    greedy_agreement: float
    first_flip: int
    tv_mean: float
    tv_p99: float
    widened: float
    bytes_per_token: float


@dataclass(slots=True)
class Tally:
    """Rows of one case and temperature so far."""

    agree: list[bool]
    distance: list[float]
    widened: list[bool]
    bytes: list[int]

    @classmethod
    def empty(cls) -> Tally:
        return cls([], [], [], [])

    def add(self, decided: Decisions, whole: Floats, temperature: float, widened: bool, size: int) -> None:
        count = int(decided.counts[0])
        ids, logits = decided.ids[0, :count], decided.filtered[0, :count] * (temperature or 1.0)
        self.agree.append(bool(ids[np.argmax(logits)] == np.argmax(whole)))
        self.distance.append(distance(ids, logits, whole, temperature) if temperature else 0.0)
        self.widened.append(widened)
        self.bytes.append(size)

    def fidelity(self, case: str, k: int, temperature: float, widening: bool) -> Fidelity:
        flips = [index for index, agrees in enumerate(self.agree) if not agrees]
        return Fidelity(
            case,
            k,
            temperature,
            widening,
            len(self.agree),
            float(np.mean(self.agree)),
            flips[0] if flips else len(self.agree),
            float(np.mean(self.distance)),
            float(np.quantile(self.distance, 0.99)),
            float(np.mean(self.widened)),
            float(np.mean(self.bytes)),
        )


def distance(ids: np.ndarray[Any, Any], logits: Floats, whole: Floats, temperature: float) -> float:
    """Total variation between softmax(logits / temperature) over `ids` [W] and over a whole row [width]."""
    weights = np.exp((whole - whole.max()) / temperature)
    rest = weights / weights.sum()
    inside = np.exp((logits - logits.max()) / temperature)
    inside = inside / inside.sum()
    return max(0.0, float(0.5 * (np.abs(inside - rest[ids]).sum() + 1.0 - rest[ids].sum())))


def decode_case(
    case: str, k: int, lockstep: Lockstep, requests: Sequence[Generate], done: Callable[[], None]
) -> Iterator[Fidelity]:
    """Decode every request to its end; returns the fidelity of all its rows, unwidened and with widening."""
    temperature = requests[0].sampling.temperature
    narrow, final = Tally.empty(), Tally.empty()
    for request in requests:
        live = lockstep.open(request)
        while live.session.finish_reason is None:
            _decode_row(lockstep, live, temperature, narrow, final)
        lockstep.close(live)
        done()
    yield narrow.fidelity(case, k, temperature, widening=False)
    yield final.fidelity(case, k, temperature, widening=True)


def _decode_row(lockstep: Lockstep, live: ActiveSession, temperature: float, narrow: Tally, final: Tally) -> None:
    step = lockstep.step(live)
    whole = lockstep.whole(live)
    narrow.add(step.narrow, whole, temperature, False, step.narrow_bytes)
    final.add(step.final, whole, temperature, step.widened, step.final_bytes)
    lockstep.commit(live, step)


# -- the trio


def trio(ks: Sequence[int], asked: Sequence[Question], done: Callable[[], None]) -> Iterator[Fidelity]:
    """The embedded trio, answering questions."""
    config = trio_config()
    tokenizers, engines = load_tokenizers(config), load_engines(config)
    for k in ks:
        narrow = trio_config(exchange={"k": k, "audit_every": 0})
        for temperature in TEMPERATURES:
            requests = trio_requests(tokenizers, asked, temperature)
            yield from decode_case("trio", k, Lockstep(narrow, tokenizers, engines), requests, done)


def trio_requests(
    tokenizers: Mapping[Role, RoleTokenizer], asked: Sequence[Question], temperature: float
) -> list[Generate]:
    """Guided generations that answer questions."""
    return [_question(tokenizers, question, temperature) for question in asked]


def _question(tokenizers: Mapping[Role, RoleTokenizer], question: Question, temperature: float) -> Generate:
    messages = [{"role": "user", "content": question.text}]
    return Generate(
        request_id=question.text,
        primary="target",
        prompts={role: tokenizers[role].encode(tokenizers[role].render(messages)) for role in ROLES},
        sampling=Sampling(temperature=temperature, max_tokens=MARKUP.budget(question.hops)),
        guidance=Guidance(alpha=1.0),
        thinking=Thinking(),
        seed=1,
    )


# -- tails of published width


def synthetic_tails() -> list[Tail]:
    """Every tail that is measured."""
    return [Tail(exponent, far=far) for far in FAR for exponent in EXPONENTS]


def tail_case(
    tail: Tail, config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer], rows: int, done: Callable[[], None]
) -> Iterator[Fidelity]:
    """One tail: the same rows at every temperature."""
    for temperature in TEMPERATURES:
        lockstep = Lockstep(config, tokenizers, _engines(tail, tokenizers))
        requests = [guided_request(str(tail), [1], rows, temperature)]
        yield from decode_case(str(tail), config.exchange.k, lockstep, requests, done)


def _engines(tail: Tail, tokenizers: Mapping[Role, RoleTokenizer]) -> dict[Role, Engine]:
    stream = TailStream(tail, tokenizers["target"].width)
    return {role: TailEngine(stream, role) for role in ROLES}


# -- bytes


async def bytes_per_token(folder: Path, mode: str, sessions: int, tokens: int, width: int | None = None) -> float:
    """Both directions of all sockets, framing included, for each token of `sessions` sessions side by side."""
    exchange = {"mode": mode, "k": K, "max_unseen_mass": 1, "audit_every": 0}
    config = wide_config(folder, *([width] if width else []), exchange=exchange, speculation={"drafts": 0})
    engines = _engines(Tail(STEEP), load_tokenizers(config))
    async with local_service(config, engines) as service:
        opened = _bytes(service.replicas.values())
        requests = [guided_request(str(number), [1], tokens, 1.0) for number in range(sessions)]
        await asyncio.gather(*(decode(service.coordinators[0], request) for request in requests))
        return (_bytes(service.replicas.values()) - opened) / (sessions * tokens)


def _bytes(replicas: Iterable[Any]) -> int:
    stats = [replica.stats() for replica in replicas]
    return sum(each.bytes_received + each.bytes_sent for each in stats)


# -- the report


def counted(cases: Sequence[Fidelity]) -> list[Fidelity]:
    """The cases that the bar holds for: what is steep and near unwidened, everything else with widening; k = 128."""
    steep = {"trio", *(str(tail) for tail in synthetic_tails() if tail.exponent >= STEEP and not tail.far)}
    return [case for case in cases if case.k == K and case.widening != (case.case in steep)]


def worst(cases: Sequence[Fidelity], sizes: Mapping[str, float]) -> dict[str, Any]:
    """The benchmark's JSON object."""
    return {
        "k": K,
        "greedy_agreement": min(case.greedy_agreement for case in cases),
        "tokens_to_first_flip": min(case.first_flip for case in cases),
        "tv_mean": round(max(case.tv_mean for case in cases), 6),
        "tv_p99": round(max(case.tv_p99 for case in cases), 6),
        **{name: round(size) for name, size in sizes.items()},
    }


def table(cases: Sequence[Fidelity]) -> Table:
    """Every case, unwidened and widened."""
    columns = ("rows", "T", "k", "widening", "n", "agreement", "first flip", "TV mean", "TV p99", "widened", "bytes")
    shown = Table(*columns, title="slices against whole rows")
    for case in cases:
        shown.add_row(
            case.case,
            f"{case.temperature:g}",
            str(case.k),
            "on" if case.widening else "off",
            str(case.rows),
            f"{case.greedy_agreement:.4f}",
            str(case.first_flip),
            f"{case.tv_mean:.5f}" if case.temperature else "",
            f"{case.tv_p99:.5f}" if case.temperature else "",
            f"{case.widened:.1%}" if case.widening else "",
            f"{case.bytes_per_token:,.0f}",
        )
    return shown


def measure(rows: int, asked: Sequence[Question]) -> tuple[list[Fidelity], dict[str, float]]:
    """All cases, and the bytes per token by the name that they have in the result."""
    cases: list[Fidelity] = []
    with tempfile.TemporaryDirectory() as name, progress(console()) as bar:
        folder = Path(name)
        task = bar.add_task("trio", total=len(TEMPERATURES) * (len(TRIO_KS) * len(asked) + len(synthetic_tails())))
        cases += trio(TRIO_KS, asked, lambda: bar.advance(task))
        config = wide_config(folder, exchange={"k": K, "audit_every": 0})
        tokenizers = load_tokenizers(config)
        for tail in synthetic_tails():
            bar.update(task, description=str(tail))
            cases += tail_case(tail, config, tokenizers, rows, lambda: bar.advance(task))
        sizes = {"bytes_per_token": asyncio.run(bytes_per_token(folder, "topk", SESSIONS[0], 200))}
        sizes["bytes_per_token_full"] = asyncio.run(bytes_per_token(folder, "full", SESSIONS[0], 10))
        sizes["bytes_per_token_64"] = asyncio.run(bytes_per_token(folder, "topk", SESSIONS[1], 30))
    return cases, sizes


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=40, help="rows of each tail and temperature (40)")
    parser.add_argument("--questions", type=int, default=5, help="questions of each hop count to the trio (5)")
    parser.add_argument("--real", action="store_true", help="rows of models that `python -m cluster.real` fetched")
    options = parser.parse_args()
    if options.real:
        guider, found = real_rows.measure(options.rows)
        console().print(real_rows.table(guider, found))
        details = [asdict(case) for case in found]
        publish("fidelity_real", real_rows.worst(guider, found), options.save, details)
        return
    asked = [question for hops in (2, 3, 4, 5) for question in questions("held_out", hops, options.questions)]
    cases, sizes = measure(options.rows, asked)
    console().print(table(cases))
    publish("fidelity", worst(counted(cases), sizes), options.save, [asdict(case) for case in cases])


if __name__ == "__main__":
    main()
