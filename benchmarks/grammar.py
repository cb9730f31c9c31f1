"""The cost of a grammar: the same answers decoded with and without one, by simulated models.

    python -m benchmarks.grammar [--shape h200-32b] [--sessions 1 32] [--agreement 0.8] [--rounds 5] [--save]

Models and coordinator are those of `benchmarks.timed`, but with the vocabulary of Qwen (pip install --no-deps
dashscope==2.0.2), and their rows peak at the tokens of JSON documents, one for each session. So every session writes
its document whether it must or not, and what differs is the work for the grammar: a JSON schema with nested objects,
arrays, enumerations, numbers and free strings. A round decodes all documents four times, in an order that rotates: with
drafts and without (plain), each with the grammar and free.

Figures are medians over the rounds. step_ms: from one token of a session to its next, prompts included.
grammar_over_free: the median of the rounds' ratios of steps. coordinator_us_per_token: CPU time of the coordinator's
process, its threads and the readers of the answers included. acceptance: share of the drafts that became tokens. The
last line is a JSON list with an object for each number of sessions.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import uvloop
from llguidance import LLMatcher
from rich.table import Table

from actors.api.generation import ROLES, Finished, Generate
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig, load_config
from actors.text.tokenizer import RoleTokenizer
from benchmarks.decode import median_ratio
from benchmarks.exchange import Unfinished
from benchmarks.processes import launcher
from benchmarks.real_tokenizers import qwen
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.timed import TEMPERATURE
from benchmarks.timed_engine import SIMULATION, TIMED_SHAPES, Script, ScriptedShape, TimedShape
from benchmarks.workers import Service, service
from tests.support.local_service import decode

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["person", "robot", "animal"]},
        "score": {"type": "number"},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "kind", "score", "address", "tags"],
    "additionalProperties": False,
}
WORDS = ["river", "orange", "quiet", "seven", "hammer", "Friday", "lantern", "copper", "Oslo", "violin", "winter"]
SAMPLING = Sampling(temperature=TEMPERATURE, max_tokens=400)

Way: TypeAlias = tuple[bool, bool]  # drafted, in a grammar
WAYS: tuple[Way, ...] = ((True, True), (True, False), (False, True), (False, False))


def document(number: int) -> str:
    """A JSON document that obeys SCHEMA, about 110 tokens long."""
    drawn = random.Random(number)

    def words(count: int) -> str:
        return " ".join(drawn.choice(WORDS) for _ in range(count))

    value = {
        "name": words(3),
        "age": drawn.randrange(100),
        "kind": drawn.choice(["person", "robot", "animal"]),
        "score": round(drawn.random(), 3),
        "address": {"street": words(6), "city": words(1)},
        "tags": [words(4) for _ in range(5)],
    }
    return json.dumps(value)


@dataclass(frozen=True, slots=True)
class Workload:
    """One document for each session, and the shape whose models write it."""

    shape: ScriptedShape
    scripts: Sequence[Script]
    grammar: str

    @classmethod
    def of(cls, shape: TimedShape, tokenizer: RoleTokenizer, sessions: int) -> Workload:
        """The documents in a tokenizer's ids."""
        scripts = [
            Script(
                tuple(tokenizer.encode(f"Document {number}:")),
                (*tokenizer.encode_continuation(document(number)), tokenizer.eos_ids[0]),
            )
            for number in range(sessions)
        ]
        wide = {"vocab_size": tokenizer.width}
        return cls(
            ScriptedShape(shape.name, wide, wide, times=shape.times, scripts=tuple(scripts)),
            scripts,
            LLMatcher.grammar_from_json_schema(SCHEMA),
        )

    def requests(self, sessions: int, way: Way) -> list[Generate]:
        """The requests of the first sessions."""
        drafted, constrained = way
        return [
            Generate(
                request_id=f"{number}",
                primary="target",
                prompts={role: list(script.prompt) for role in ROLES},
                sampling=SAMPLING,
                guidance=Guidance(alpha=1.0),
                thinking=Thinking(),
                seed=number,
                drafts=None if drafted else 0,
                grammar=self.grammar if constrained else "",
            )
            for number, script in enumerate(self.scripts[:sessions])
        ]


@dataclass(slots=True)
class Figures:
    """Of one number of sessions: by way and round the seconds of a step, and CPU seconds of a token; all drafts."""

    sessions: int
    steps: dict[Way, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    cpu: dict[Way, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    drafts: dict[Way, list[int]] = field(default_factory=lambda: {way: [0, 0] for way in WAYS})

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        return {
            "sessions": self.sessions,
            **{f"{name(way)}_step_ms": round(1e3 * median(self.steps[way]), 3) for way in WAYS},
            "grammar_over_free": median_ratio(self.steps[True, True], self.steps[True, False]),
            "plain_grammar_over_free": median_ratio(self.steps[False, True], self.steps[False, False]),
            **{f"{name(way)}_coordinator_us_per_token": round(1e6 * median(self.cpu[way]), 1) for way in WAYS},
            **{f"{name(way)}_acceptance": self._acceptance(way) for way in WAYS[:2]},
        }

    def _acceptance(self, way: Way) -> float | None:
        drafted, accepted = self.drafts[way]
        return round(accepted / drafted, 4) if drafted else None


def name(way: Way) -> str:
    """The name of a way in the results."""
    drafted, constrained = way
    return ("" if drafted else "plain_") + ("grammar" if constrained else "free")


async def decode_all(served: Service, workload: Workload, figures: Figures, way: Way, *, keep: bool = True) -> None:
    """Decode every document at once. Raises Unfinished if an answer is not its document."""
    requests = workload.requests(figures.sessions, way)
    began, cpu_s = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(decode(served.coordinator, each) for each in requests))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    for answer, script in zip(answers, workload.scripts, strict=False):
        if not isinstance(answer.end, Finished) or tuple(answer.tokens) != script.answer:
            raise Unfinished(f"an answer is not its document: {answer.end}")
        figures.drafts[way][0] += answer.end.usage.drafted_tokens * keep
        figures.drafts[way][1] += answer.end.usage.accepted_tokens * keep
    if keep:
        tokens = sum(len(answer.tokens) for answer in answers)
        figures.steps[way].append(seconds * figures.sessions / tokens)
        figures.cpu[way].append(cpu_s / tokens)


async def measure(
    shape: TimedShape,
    tokenizer: RoleTokenizer,
    sessions: Sequence[int],
    agreement: float,
    rounds: int,
    done: Callable[[], None],
) -> list[Figures]:
    """Measure every number of sessions in turn; `done` is called after each round."""
    workload = Workload.of(shape, tokenizer, max(sessions))
    results = [Figures(count) for count in sessions]
    with tempfile.TemporaryDirectory() as folder:
        config = service_config(Path(folder), tokenizer, max(sessions))
        async with launcher("processes", 1) as launch, service(workload.shape, config, agreement, 1, launch) as served:
            for figures in results:
                for way in WAYS:  # what is slow once is not measured
                    await decode_all(served, workload, figures, way, keep=False)
            for number in range(rounds):
                for figures in results:
                    for turn in range(len(WAYS)):
                        await decode_all(served, workload, figures, WAYS[(number + turn) % len(WAYS)])
                    done()
    return results


def service_config(folder: Path, tokenizer: RoleTokenizer, sessions: int) -> ServiceConfig:
    """A service whose roles all have this vocabulary, which is written into `folder`."""
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "vocab_size": tokenizer.width,
        "max_position_embeddings": 1 << 15,
        "eos_token_id": list(tokenizer.eos_ids),
    }
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    each = {"path": str(folder), "cache_tokens": 1 << 20}
    return load_config(
        {
            "version": 1,
            "models": dict.fromkeys(ROLES, each),
            "coordinator": {"max_sessions": sessions, "max_waiting": sessions},
            "exchange": {"audit_every": 0},
            "speculation": {"drafts": 7},
        }
    )


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Every figure, by number of sessions."""
    shown = Table("", *(f"{row['sessions']} sessions" for row in results), title=SIMULATION)
    for figure in results[0]:
        shown.add_row(figure, *(str(row[figure]) for row in results))
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=TIMED_SHAPES, default="h200-32b")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 32], help="decoded together (1 32)")
    parser.add_argument("--agreement", type=float, default=0.8, help="of the guider's drafts and the choice (0.8)")
    parser.add_argument("--rounds", type=int, default=5, help="of every number of sessions (5)")
    options = parser.parse_args()
    tokenizer = qwen()
    if tokenizer is None:
        parser.error("the vocabulary of Qwen is missing: pip install --no-deps dashscope==2.0.2")
    with progress(console()) as bar:
        task = bar.add_task("rounds", total=options.rounds * len(options.sessions))
        shape = TIMED_SHAPES[options.shape]
        what = shape, tokenizer, options.sessions, options.agreement, options.rounds
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            figures = loop.run(measure(*what, lambda: bar.advance(task)))
    results = [each.result() for each in figures]
    console().print(table(results))
    settings = {key: value for key, value in vars(options).items() if key != "save"}
    publish(f"grammar-{options.shape}", results, options.save, [settings])


if __name__ == "__main__":
    main()
