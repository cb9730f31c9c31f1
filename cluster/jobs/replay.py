"""Repeats a logged request in all modes with the same seed, and shows where their answers diverge.

    python -m cluster.jobs.replay REQUEST.json [--service ray_config.yaml]

The file holds the JSON body of POST /v1/chat/completions or /v1/completions. The guided mode uses the body's own
guidance. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from actors.api.generation import Generate, Role
from actors.config import ConfigError, ServiceConfig
from actors.preflight import load_tokenizers
from actors.text.tokenizer import RoleTokenizer
from cluster.jobs.client import Answer, Client
from cluster.jobs.connecting import Connection, connected, ready
from cluster.jobs.evaluate import run_job, until_stopped
from cluster.jobs.sample import MODES, Mode
from router.backend import ApiError
from router.request_planning import plan_chat, plan_completion
from router.schema import ChatRequest, CompletionRequest, parse

BEFORE, AFTER = 12, 12  # tokens shown before and after the place where two answers diverge
GUIDED_ONLY = ("guidance",)  # request fields that the service refuses for a role alone


@dataclass(frozen=True, slots=True)
class Replayed:
    """The answer of one mode. pieces: the text of each token."""

    mode: Mode
    pieces: tuple[str, ...]
    answer: Answer

    @property
    def text(self) -> str:
        """The whole answer, special tokens included."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Divergence:
    """First difference of a mode's answer from the target's. after: tokens that are equal; None if all are."""

    mode: Mode
    after: int | None
    shared: str = ""  # end of the common text
    target: str = ""  # continuation of the target
    other: str = ""  # continuation of the mode


def requests(
    body: Mapping[str, Any], service: ServiceConfig, tokenizers: dict[Role, RoleTokenizer]
) -> dict[Mode, Generate]:
    """The request in every mode, with n = 1. Raises ConfigError if the service would refuse it."""
    seed = body.get("seed")
    given = dict(body) | {"seed": secrets.randbits(53) if seed is None else seed, "n": 1}
    made: dict[Mode, Generate] = {}
    for mode in MODES:
        name = next(name for name, served in service.served_names.items() if served == mode)
        own = {key: value for key, value in given.items() if mode == "guided" or key not in GUIDED_ONLY}
        own["model"] = name
        try:
            if "messages" in own:
                plan = plan_chat(parse(ChatRequest, own), service, tokenizers, f"replay-{mode}")
            else:
                plan = plan_completion(parse(CompletionRequest, own), service, tokenizers, f"replay-{mode}")
        except ApiError as error:
            raise ConfigError(f"the service refuses this request as {name}: {error.message}") from None
        made[mode] = plan.sequences[0]
    return made


async def replay(
    client: Client, asked: Mapping[Mode, Generate], tokenizers: Mapping[Role, RoleTokenizer]
) -> list[Replayed]:
    """The answers of all modes, generated concurrently. Raises what `Client.answer` raises."""
    answers = await asyncio.gather(*(client.answer(request) for request in asked.values()))
    return [
        Replayed(mode, _pieces(tokenizers[request.primary], answer.tokens), answer)
        for (mode, request), answer in zip(asked.items(), answers, strict=True)
    ]


def divergences(replayed: Sequence[Replayed]) -> list[Divergence]:
    """Every mode compared with the target. Tokens are compared as texts, because the roles' ids may differ."""
    target = next(each for each in replayed if each.mode == "target")
    return [_divergence(target.pieces, each) for each in replayed if each.mode != "target"]


def show(replayed: Sequence[Replayed], diverging: Sequence[Divergence], console: Console) -> None:
    """Print the answers, and below them where each differs from the target's."""
    for each in replayed:
        usage = each.answer.usage
        changed = f", {usage.changed_tokens} of {usage.guided_tokens} changed" if usage.guided_tokens else ""
        console.rule(f"{each.mode}: {usage.completion_tokens} tokens, {each.answer.end.reason}{changed}")
        console.print(Text(each.text))
    console.rule("where they diverge from the target")
    for divergence in diverging:
        if divergence.after is None:
            console.print(Text(f"{divergence.mode}: the same answer"))
            continue
        console.print(Text.assemble(f"{divergence.mode}, after {divergence.after} tokens: ...", divergence.shared))
        console.print(Text.assemble("    target went on:  ", (divergence.target or "(the end)", "red")))
        console.print(Text.assemble(f"    {divergence.mode} went on:  ", (divergence.other or "(the end)", "green")))


async def replay_on(connection: Connection, body: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Replay a request body on a connected service and print it. Returns the JSON object of the last line."""
    service = connection.service
    tokenizers = load_tokenizers(service)
    asked = requests(body, service, tokenizers)
    await ready(connection.backend, service.deadlines.model_load_s, console.print)
    replayed = await replay(Client(connection.backend, service, tokenizers), asked, tokenizers)
    diverging = divergences(replayed)
    show(replayed, diverging, console)
    modes = {each.mode: {"tokens": len(each.answer.tokens), "text": each.answer.text} for each in replayed}
    return {"modes": modes, "parts_from_target_after": {divergence.mode: divergence.after for divergence in diverging}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay one request. Returns the exit status, as of `cluster.jobs.evaluate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=Path, help="the request's JSON body")
    parser.add_argument("--service", type=Path, default=Path("ray_config.yaml"), help="the Serve config file")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)

    def work() -> dict[str, Any]:
        body = _body(options.request)
        with connected(options.service, console.print) as connection:
            return asyncio.run(until_stopped(replay_on(connection, body, console)))

    return run_job(work, console)


def _body(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{file} does not hold a JSON object, the body of a request")
    return body


def _pieces(tokenizer: RoleTokenizer, tokens: Sequence[int]) -> tuple[str, ...]:
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.push(token) for token in tokens]
    return (*pieces[:-1], pieces[-1] + stream.flush()) if pieces else ()


def _divergence(target: Sequence[str], other: Replayed) -> Divergence:
    same = 0
    for one, two in zip(target, other.pieces, strict=False):
        if one != two:
            break
        same += 1
    if same == len(target) == len(other.pieces):
        return Divergence(other.mode, None)
    parts = (target[max(0, same - BEFORE) : same], target[same : same + AFTER], other.pieces[same : same + AFTER])
    return Divergence(other.mode, same, *("".join(part) for part in parts))


if __name__ == "__main__":
    sys.exit(main())
