"""What guidance is worth: accuracy of the embedded trio on held-out questions, alone and together.

    python -m benchmarks.effect [--n 100] [--alpha 1.0] [--hops 2 3 4 5] [--save]

Greedy, `n` questions of each hop count, all of them in flight together, through replicas, sockets and a coordinator in
this process. guided_dpo: with the adapter of the guider that preference training made. The last line is a JSON object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from actors.decoding.guidance import Guidance
from actors.decoding.parameters import Sampling, Thinking
from actors.requests import ROLES, Finished, Generate, Role
from benchmarks.local import WEIGHTS, Answer, LocalService, decode, load_engines, local_service, trio_config
from benchmarks.report import arguments, console, progress, publish
from cluster.demo.accuracy import TOKENS_A_HOP, TOKENS_AROUND
from cluster.demo.task import Question, grade, questions

Mode = Literal["target", "guider", "guider_base", "guided", "guided_dpo"]
MODES: tuple[Mode, ...] = (*ROLES, "guided")
WITH_ADAPTER: tuple[Mode, ...] = ("guided_dpo",)
ADAPTER = WEIGHTS / "guider_dpo"


class Unfinished(RuntimeError):
    """A question got no answer; the message says what the coordinator said."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Accuracies in [0, 1] by hop count and mode, over `per_hop` questions each."""

    alpha: float
    per_hop: int
    by_hops: dict[int, dict[Mode, float]]

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object: `n` questions of all `hops`, and each mode's mean accuracy."""
        modes = next(iter(self.by_hops.values()))
        means: dict[str, float] = {mode: _mean([row[mode] for row in self.by_hops.values()]) for mode in modes}
        return {
            "n": self.per_hop * len(self.by_hops),
            "hops": list(self.by_hops),
            **means,
            "alpha": self.alpha,
            "by_hops": {str(hops): row for hops, row in self.by_hops.items()},
        }


async def measure(
    service: LocalService,
    hops: Sequence[int],
    per_hop: int,
    alpha: float,
    done: Callable[[], None],
    modes: Sequence[Mode] = MODES,
) -> Effect:
    """Ask every question in every mode at once. Raises Unfinished. `done` is called after each answer."""
    asked = [question for count in hops for question in questions("held_out", count, per_hop)]

    async def right(mode: Mode, number: int, question: Question) -> bool:
        answer = await decode(service.coordinators[0], request(service, mode, question, alpha, f"{mode}-{number}"))
        done()
        return grade(_text(answer), question)

    calls = [right(mode, number, question) for mode in modes for number, question in enumerate(asked)]
    graded = await asyncio.gather(*calls)
    by_hops: dict[int, dict[Mode, float]] = {count: {} for count in hops}
    for index, mode in enumerate(modes):
        for place, count in enumerate(hops):
            first = index * len(asked) + place * per_hop
            by_hops[count][mode] = _mean(graded[first : first + per_hop])
    return Effect(alpha, per_hop, by_hops)


def request(service: LocalService, mode: Mode, question: Question, alpha: float, request_id: str) -> Generate:
    """The question in each role's own chat template, decoded greedily by one role or by all three."""
    roles: tuple[Role, ...] = (mode,) if mode in ROLES else ROLES
    guided = len(roles) > 1
    messages = [{"role": "user", "content": question.text}]
    prompts = {role: service.tokenizers[role].encode(service.tokenizers[role].render(messages)) for role in roles}
    return Generate(
        request_id=request_id,
        primary="target" if guided else roles[0],
        prompts=prompts,
        sampling=Sampling(temperature=0.0, max_tokens=TOKENS_A_HOP * question.hops + TOKENS_AROUND),
        guidance=Guidance(alpha=alpha if guided else 0.0),
        thinking=Thinking(),
        seed=0,
    )


def table(effect: Effect) -> Table:
    """Accuracy by hop count and mode."""
    modes = next(iter(effect.by_hops.values()))
    shown = Table("hops", *modes, title=f"right answers to held-out questions, alpha {effect.alpha:g}")
    for count, row in effect.by_hops.items():
        shown.add_row(str(count), *(f"{row[mode]:.3f}" for mode in modes))
    return shown


async def run(hops: Sequence[int], per_hop: int, alpha: float) -> Effect:
    """Load the trio, serve it in this process, and measure; then again with the adapter."""
    everything = (len(MODES) + len(WITH_ADAPTER)) * len(hops) * per_hop
    plain = trio_config(exact=False, coordinator={"max_sessions": 64, "max_waiting": everything})
    by_hops: dict[int, dict[Mode, float]] = {count: {} for count in hops}
    with progress(console()) as bar:
        task = bar.add_task("answers", total=everything)
        for config, modes in ((plain, MODES), (plain.with_adapter(str(ADAPTER)), WITH_ADAPTER)):
            async with local_service(config, load_engines(config)) as service:
                effect = await measure(service, hops, per_hop, alpha, lambda: bar.advance(task), modes)
            for count, row in effect.by_hops.items():
                by_hops[count] |= row
    return Effect(alpha, per_hop, by_hops)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--n", type=int, default=100, help="questions of each hop count (100)")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the guidance (1.0)")
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 3, 4, 5], help="hop counts (2 3 4 5)")
    options = parser.parse_args()
    effect = asyncio.run(run(options.hops, options.n, options.alpha))
    console().print(table(effect))
    publish("effect", effect.result(), options.save)


def _text(answer: Answer) -> str:
    if not isinstance(answer.end, Finished) or answer.end.reason not in ("stop", "length"):
        raise Unfinished(f"a question was not answered: {answer.end}")
    return answer.reasoning + answer.content


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


if __name__ == "__main__":
    main()
