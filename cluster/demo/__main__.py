"""Demonstrates guidance: starts the service and compares its answers to held-out questions in four modes.

    python -m cluster.demo [--questions 15] [--file ray_config.yaml] [--alpha 1.5] [--adapter FOLDER]
                           [--engine vllm]

The last line of output is one JSON object with the accuracies by mode. If the file has router.keys, set OPENAI_API_KEY
to one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from actors.config import ConfigError
from cluster.demo.task import Question, grade, questions
from cluster.launch import LaunchError, running_service
from cluster.serve_file import read_service_config

HOPS = (2, 3, 4, 5)
MODES = {"guided": "", "target alone": "/target", "guider alone": "/guider", "guider base alone": "/guider-base"}
CONCURRENT = 32
MAX_TOKENS = 160
DEADLINE_S = 120.0
INTERRUPTED = 130  # the shell's exit status for Ctrl-C


@dataclass(frozen=True)
class Answer:
    """The answer of one mode to one question."""

    question: Question
    mode: str
    text: str
    right: bool
    notes: tuple[dict[str, Any], ...]  # by token: text, alpha, and whether guidance changed it


async def answer_question(
    client: AsyncOpenAI, model: str, mode: str, question: Question, alpha: float | None
) -> Answer:
    """The answer to one question over HTTP. alpha: None for the service's default."""
    guided = {"explain": True} | ({} if alpha is None else {"alpha": alpha})
    reply = await client.chat.completions.create(
        model=model + MODES[mode],
        messages=[{"role": "user", "content": question.text}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        extra_body={"guidance": guided} if mode == "guided" else {},
    )
    choice = reply.choices[0]
    text = choice.message.content or ""
    guidance = (choice.model_extra or {}).get("guidance") or {}
    return Answer(question, mode, text, grade(text, question), tuple(guidance.get("tokens", ())))


async def answer_all(
    url: str, model: str, all_questions: Sequence[Question], console: Console, alpha: float | None = None
) -> list[Answer]:
    """The answers to every question in every mode, with a progress bar for each mode."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    answers: list[Answer] = []
    key = os.environ.get("OPENAI_API_KEY", "none")
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=DEADLINE_S, max_retries=1) as client:
        with Progress(*columns, console=console) as progress:
            for mode in MODES:
                bar = progress.add_task(mode, total=len(all_questions))
                slots = asyncio.Semaphore(CONCURRENT)

                async def one(question: Question, mode: str = mode, slots: asyncio.Semaphore = slots) -> Answer:
                    async with slots:
                        return await answer_question(client, model, mode, question, alpha)

                for done in asyncio.as_completed([one(question) for question in all_questions]):
                    answers.append(await done)
                    progress.advance(bar)
    return answers


def accuracies(answers: Sequence[Answer]) -> dict[str, dict[int, float]]:
    """Share of right answers by mode and hops."""
    right, total = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for answer in answers:
        right[answer.mode, answer.question.hops] += answer.right
        total[answer.mode, answer.question.hops] += 1
    return {mode: {hops: right[mode, hops] / total[mode, hops] for hops in HOPS} for mode in MODES}


def table_of(shares: dict[str, dict[int, float]], n: int) -> Table:
    """Accuracy by mode and hops."""
    table = Table(title=f"Right answers to held-out questions, {n} a cell")
    table.add_column("")
    for hops in HOPS:
        table.add_column(f"{hops} hops", justify="right")
    for mode, by_hops in shares.items():
        cells = [f"{share:.0%}" for share in by_hops.values()]
        table.add_row(mode, *cells, style="bold green" if mode == "guided" else "")
    return table


def example_of(answers: Sequence[Answer]) -> list[Answer]:
    """The answers of all modes to the question that shows the effect best.

    It prefers questions that only the guided mode answers right, hop by hop, with many tokens changed by guidance.
    """
    right = Counter(answer.question for answer in answers if answer.right)

    def shows(answer: Answer) -> tuple[bool, bool, int, int]:
        by_hops = answer.question.thinking in answer.text
        changed = sum(note["changed"] for note in answer.notes)
        return answer.right, by_hops, -right[answer.question], changed

    best = max((answer for answer in answers if answer.mode == "guided"), key=shows)
    return [answer for mode in MODES for answer in answers if (answer.mode, answer.question) == (mode, best.question)]


def panel_of(answer: Answer) -> Panel:
    """One answer, with brackets around the tokens that guidance changed, which are visible without colours too."""
    marked = Text()
    for note in answer.notes:
        marked.append(
            f"[{note['text']}]" if note["changed"] else note["text"], "bold yellow" if note["changed"] else ""
        )
    if not answer.notes:
        marked.append(answer.text)
    verdict = "[green]right[/]" if answer.right else "[red]wrong[/]"
    return Panel(marked, title=f"{answer.mode}: {verdict}", width=46)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=15, help="questions for each number of hops")
    parser.add_argument("--file", type=Path, default=Path("ray_config.yaml"), help="the service to start")
    parser.add_argument("--alpha", type=float, help="strength of guidance; default: the service's")
    parser.add_argument("--adapter", help="of the guider: cluster/demo/weights/guider_dpo is preference-trained")
    parser.add_argument("--engine", choices=("native", "vllm"), help="of the target; default: as the file says")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        config = read_service_config(options.file)
        if options.engine is not None:
            config = config.with_engine(options.engine)
        if options.adapter is not None:
            config = config.with_adapter(options.adapter)
        console.print("Starting Ray Serve: router, coordinator, directory and three models ...")
        with running_service(config) as url:
            console.print(f"{url}/v1 answers as {', '.join(config.served_names)}", highlight=False)
            asked = [question for hops in HOPS for question in questions("held_out", hops, options.questions)]
            answers = asyncio.run(answer_all(url, config.name, asked, console, options.alpha))
    except (ConfigError, LaunchError) as error:
        console.print("[bold red]error[/]", Text(str(error)))
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return INTERRUPTED
    shares = accuracies(answers)
    example = example_of(answers)
    console.print(f"\n[bold]{example[0].question.text}[/]  (in brackets: what guidance changed)\n")
    console.print(Columns([panel_of(answer) for answer in example]))
    console.print(table_of(shares, options.questions))
    means = {mode: round(sum(by_hops.values()) / len(by_hops), 3) for mode, by_hops in shares.items()}
    print(json.dumps({"questions": len(asked), "accuracy": means}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
