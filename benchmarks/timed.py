"""A simulation of GPUs: guided decoding against the target alone, with models that take time and compute nothing.

    python -m benchmarks.timed [--shape h200-32b] [--sessions 1 32] [--agreement 0.8] [--roles apart] [--tokens 128]
        [--rounds 5] [--save]

Three model processes whose forwards sleep for as long as an H200 would take (`benchmarks.timed_engine` has the table),
a coordinator in this process, and real sockets between them: what is measured is the cost of coordinator and replicas
where models leave the cores alone. It says nothing about a GPU that is not in the table. `--agreement` is the
probability with which a draft of the guider is the token that guidance chooses. `--roles apart`: a device for each
role. `--roles shared`: one for guider and guider base, whose forwards exclude each other.

A round decodes the same tasks in three ways through the same coordinator, in an order that rotates: guided (with
drafts, as many as the coordinator plans), guided_plain (without drafts) and target (alone, without drafts). Rates are
medians over the rounds, in tokens a second from request to last token, prompts included; a ratio is the median of the
rounds' ratios. hidden_drafts_share: of the drafted tokens, those drafted while an earlier window was verified.
target_forward_ms: a forward of the target alone, as its replica measures it; what it is above the table's, prompts
aside, is the timer's and the replica's. coordinator_busy: the share of the time of turns, while guided. The last line
is a JSON list with an object for each number of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, TypeAlias

from rich.table import Table

from benchmarks.decode import Plan, Rounds, median_ratio, run
from benchmarks.results_file import arguments, console, publish
from benchmarks.timed_engine import SIMULATION, TIMED_SHAPES, TimedShape
from benchmarks.workers import Mode

Placement: TypeAlias = Literal["apart", "shared"]
MODES: tuple[Mode, ...] = ("guided", "guided_plain", "target")
TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class TimedPlan(Plan):
    """A measurement of simulated models, without the baselines, which compute."""

    baselines: bool = False
    temperature: float = TEMPERATURE

    @property
    def modes(self) -> tuple[Mode, ...]:
        return MODES


def placed(shape: TimedShape, roles: Placement) -> TimedShape:
    """The shape with a device for each role, or with one for both small models."""
    return shape.sharing("guider", "guider_base") if roles == "shared" else shape


def result(plan: Plan, roles: Placement, rounds: Rounds) -> dict[str, Any]:
    """The JSON object of one number of sessions."""
    rates, phases = rounds.rates, rounds.phases
    return {
        "shape": plan.shape.name,
        "sessions": rounds.sessions,
        "guided_over_target": median_ratio(rates["guided"], rates["target"]),
        "guided_plain_over_target": median_ratio(rates["guided_plain"], rates["target"]),
        "hidden_drafts_share": round(rounds.hidden / rounds.drafted, 4) if rounds.drafted else 0.0,
        "simulation": plan.shape.simulated,
        "roles": roles,
        "agreement": rounds.agreement,
        "acceptance": round(rounds.accepted / rounds.drafted, 4) if rounds.drafted else None,
        **{f"{mode}_tps": round(median(rates[mode]), 2) for mode in MODES},
        "target_forward_ms": round(median(each.step_ms * each.target for each in phases["target"]), 3),
        "coordinator_busy": round(median(each.combine for each in phases["guided"]), 3),
    }


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Every figure, by number of sessions."""
    shown = Table("", *(f"{row['sessions']} sessions" for row in results), title=SIMULATION)
    for name in results[0]:
        shown.add_row(name, *(str(row[name]) for row in results))
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=TIMED_SHAPES, default="h200-32b")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 32], help="decoded together (1 32)")
    parser.add_argument("--agreement", type=float, default=0.8, help="of the guider's drafts and the choice (0.8)")
    parser.add_argument("--roles", choices=["apart", "shared"], default="apart", help="devices of small models (apart)")
    parser.add_argument("--tokens", type=int, default=128, help="mean tokens of an answer (128)")
    parser.add_argument("--rounds", type=int, default=5, help="of every number of sessions (5)")
    options = parser.parse_args()
    plan = TimedPlan(
        placed(TIMED_SHAPES[options.shape], options.roles),
        tuple(options.sessions),
        agreement=options.agreement,
        tokens=options.tokens,
        rounds=options.rounds,
    )
    measured = run([plan])
    results = [result(plan, options.roles, rounds) for rounds in measured]
    console().print(table(results))
    settings = {key: value for key, value in vars(options).items() if key != "save"}
    name = f"timed-{options.shape}" + ("-shared" if options.roles == "shared" else "")
    publish(name, results, options.save, [settings, *(rounds.details() for rounds in measured)])


if __name__ == "__main__":
    main()
