"""Measures the effect of guidance: accuracy of the embedded trio on held-out questions, alone and together.

    python -m benchmarks.effect [--family other] [--n 100] [--alpha 1.0] [--hops 2 3 4 5] [--save]

Greedy, `n` questions of each hop count, all of them in flight together, through replicas, sockets and a coordinator in
this process. guided_dpo: with the adapter of the guider that preference training made. With `--family other` the target
has another tokenizer; one_to_one: guided the published way, by ids mapped one to one. The last line is a JSON object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from actors.api.generation import ROLES, Finished, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.text.tokenizer import RoleTokenizer
from benchmarks.one_to_one import OneToOne
from benchmarks.results_file import arguments, console, progress, publish
from cluster.demo.markup import Markup
from cluster.demo.other_tokenizer import MARKUP as OTHER_MARKUP
from cluster.demo.task import Question, grade, questions
from cluster.demo.tokenizer import MARKUP
from tests.support.local_service import WEIGHTS, Answer, LocalService, decode, load_engines, local_service, trio_config

Mode = Literal["target", "guider", "guider_base", "guided", "guided_dpo", "one_to_one"]
MODES: tuple[Mode, ...] = (*ROLES, "guided")
WITH_ADAPTER: tuple[Mode, ...] = ("guided_dpo",)
ADAPTER = WEIGHTS / "guider_dpo"
OTHER_TARGET = WEIGHTS / "target_other"
Family = Literal["same", "other"]
MARKUPS: dict[Family, Markup] = {"same": MARKUP, "other": OTHER_MARKUP}


class Unfinished(RuntimeError):
    """A question got no answer; the message is the coordinator's."""


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
    markup: Markup = MARKUP,
) -> Effect:
    """Ask every question in every mode at once. Raises Unfinished. `done` is called after each answer.

    markup: the target's, whose tokens are counted.
    """
    asked = [question for count in hops for question in questions("held_out", count, per_hop)]

    async def right(mode: Mode, number: int, question: Question) -> bool:
        answer = await decode(
            service.coordinators[0], request(service, mode, question, alpha, f"{mode}-{number}", markup)
        )
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


def request(
    service: LocalService,
    mode: Mode,
    question: Question,
    alpha: float,
    request_id: str,
    markup: Markup = MARKUP,
) -> Generate:
    """The question in each role's own chat template, decoded greedily by one role or by all three."""
    roles: tuple[Role, ...] = (mode,) if mode in ROLES else ROLES
    guided = len(roles) > 1
    writer = markup if roles[0] == "target" else MARKUP
    return Generate(
        request_id=request_id,
        primary="target" if guided else roles[0],
        prompts={role: prompt(service.tokenizers[role], question) for role in roles},
        sampling=Sampling(temperature=0.0, max_tokens=writer.budget(question.hops)),
        guidance=Guidance(alpha=alpha if guided else 0.0),
        thinking=Thinking(),
        seed=0,
    )


def prompt(tokenizer: RoleTokenizer, question: Question) -> list[int]:
    """The question in a role's own chat template."""
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": question.text}]))


def mapped(hops: Sequence[int], per_hop: int, alpha: float, done: Callable[[], None]) -> dict[int, float]:
    """Accuracy by hop count of the target of another family, guided the published way."""
    service, found = OneToOne(trio_config().with_target(str(OTHER_TARGET))), {}
    for count in hops:
        asked = questions("held_out", count, per_hop)
        prompts = {role: [prompt(tokenizer, one) for one in asked] for role, tokenizer in service.tokenizers.items()}
        replies = service.replies(prompts, alpha, OTHER_MARKUP.budget(count))
        found[count] = _mean([grade(text, question) for text, question in zip(replies, asked, strict=True)])
        for _ in asked:
            done()
    return found


def table(effect: Effect) -> Table:
    """Accuracy by hop count and mode."""
    modes = next(iter(effect.by_hops.values()))
    shown = Table("hops", *modes, title=f"right answers to held-out questions, alpha {effect.alpha:g}")
    for count, row in effect.by_hops.items():
        shown.add_row(str(count), *(f"{row[mode]:.3f}" for mode in modes))
    return shown


async def run(hops: Sequence[int], per_hop: int, alpha: float, family: Family = "same") -> Effect:
    """Load the trio, serve it in this process, and measure; then again with the adapter, or the published way."""
    others: tuple[Mode, ...] = WITH_ADAPTER if family == "same" else ("one_to_one",)
    everything = (len(MODES) + len(others)) * len(hops) * per_hop
    plain = trio_config(batch_invariant=False, coordinator={"max_sessions": 64, "max_waiting": everything})
    runs = [(plain, MODES), (plain.with_adapter(str(ADAPTER)), WITH_ADAPTER)]
    if family == "other":
        runs = [(plain.with_target(str(OTHER_TARGET)), MODES)]
    by_hops: dict[int, dict[Mode, float]] = {count: {} for count in hops}
    with progress(console()) as bar:
        task = bar.add_task("answers", total=everything)
        for config, modes in runs:
            async with local_service(config, load_engines(config)) as service:
                effect = await measure(service, hops, per_hop, alpha, lambda: bar.advance(task), modes, MARKUPS[family])
            for count, row in effect.by_hops.items():
                by_hops[count] |= row
        if family == "other":
            for count, right in mapped(hops, per_hop, alpha, lambda: bar.advance(task)).items():
                by_hops[count]["one_to_one"] = right
    return Effect(alpha, per_hop, by_hops)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--family", choices=tuple(MARKUPS), default="same", help="of the target (same)")
    parser.add_argument("--n", type=int, default=100, help="questions of each hop count (100)")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the guidance (1.0)")
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 3, 4, 5], help="hop counts (2 3 4 5)")
    options = parser.parse_args()
    effect = asyncio.run(run(options.hops, options.n, options.alpha, options.family))
    console().print(table(effect))
    name = "effect" if options.family == "same" else "effect_other"
    publish(name, effect.result(), options.save)


def _text(answer: Answer) -> str:
    if not isinstance(answer.end, Finished) or answer.end.reason not in ("stop", "length"):
        raise Unfinished(f"a question was not answered: {answer.end}")
    return answer.reasoning + answer.content


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


if __name__ == "__main__":
    main()
