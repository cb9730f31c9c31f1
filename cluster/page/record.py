"""Records the answers of a service: asks each question in the three modes of the playground, at the same time."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from actors.config import ConfigError
from cluster.launch import LaunchError, running_service
from cluster.page.questions import Questions, read_questions
from cluster.page.recording import FORMAT, KINDS, Kind, RecordingError, write_recording
from cluster.serve_file import read_service_config

Json = dict[str, Any]
SILENT_S = 300.0  # limit between two messages of an answer
DIGITS = 5  # of probabilities and shifts: more than the page shows
CHANGED, DRAFTED = 1, 2


def record_file(file: Path, url: str | None = None) -> int:
    """Ask the questions of a file and write the answers beside it, as .json. Returns the exit status.

    url: of a running service; None: start the file's, and stop it at the end.
    """
    console, out = Console(highlight=False, soft_wrap=True), file.with_suffix(".json")
    command = f"python -m cluster.page --record {shlex.quote(str(file))}" + (f" --url {url}" if url else "")
    try:
        if out == file:
            raise RecordingError(f"{file} would be overwritten by its answers: name it .yaml, which JSON is too")
        asked = read_questions(file)
        if url is None:
            console.print(f"Starting the service of {asked.service} ...")
        with nullcontext(url) if url else running_service(read_service_config(asked.service)) as base:
            recording = asyncio.run(record(asked, base, command, console))
    except (ConfigError, LaunchError, RecordingError) as error:
        console.print("[bold red]error[/]", end=" ")
        console.print(str(error), markup=False)
        return 1
    write_recording(recording | {"cores": None if url else os.cpu_count()}, out)
    console.print(
        f"{out}: {len(asked.questions)} questions, {out.stat().st_size / 1e3:.0f} kB; `make page` builds the page"
    )
    return 0


async def record(asked: Questions, url: str, command: str, console: Console) -> Json:
    """The recording of a service at `url`, without the machine's `cores`. Raises RecordingError."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    vocabulary: dict[tuple[int, str], int] = {}
    questions: list[Json] = []
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=SILENT_S) as client:
        served, longest = await _served(client)
        await _answer(
            client, asked, "guided", served, asked.questions[0].question, {}
        )  # not timed: a first answer is slower
        for number, each in enumerate(asked.questions, 1):
            console.print(f"{number}/{len(asked.questions)} {each.question}", markup=False)
            answers = await asyncio.gather(
                *(_answer(client, asked, kind, served, each.question, vocabulary) for kind in KINDS)
            )
            questions.append(each.model_dump() | {"answers": dict(zip(KINDS, answers, strict=True))})
    return {
        "format": FORMAT,
        "title": asked.title,
        "about": asked.about,
        "models": asked.models.model_dump(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "served": served,
        "longest": longest,
        "settings": asked.settings.model_dump(),
        "questions": questions,
        "vocabulary": [list(entry) for entry in vocabulary],
    }


async def _served(client: httpx.AsyncClient) -> tuple[dict[str, str], int]:
    """The names of the three modes, and the most tokens of a session, as the playground reads them."""
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise RecordingError(f"no service answers at {client.base_url}: {error}") from None
    if response.status_code != httpx.codes.OK:
        raise RecordingError(f"the service does not list its models: {_reason(response)}")
    cards = {card["id"]: card for card in response.json()["data"]}
    for name, card in cards.items():
        if f"{name}/target" in cards and f"{name}/guider" in cards:
            return {"target": f"{name}/target", "guider": f"{name}/guider", "guided": name}, card["max_model_len"]
    raise RecordingError(f"{client.base_url} serves no guided model beside its target and its guider")


async def _answer(
    client: httpx.AsyncClient,
    asked: Questions,
    kind: Kind,
    served: dict[str, str],
    question: str,
    vocabulary: dict[tuple[int, str], int],
) -> Json:
    """One mode's answer; new texts are added to `vocabulary`."""
    path = "/v1/chat/completions" if asked.prompt is None else "/v1/completions"
    began, chunks, reason, usage = time.monotonic(), [], None, None
    async for chunk in _chunks(client, path, asked.body(kind, served[kind], question)):
        ms = round(1000 * (time.monotonic() - began))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            delta = choice.get("delta", choice)  # completions have the fields of a delta in the choice
            reasoning, content = delta.get("reasoning") or "", delta.get("content") or delta.get("text") or ""
            tokens = [_token(token, kind, vocabulary) for token in choice["guidance"]["tokens"]]
            if reasoning or content or tokens:
                chunks.append([ms, reasoning, content, tokens])
    if reason is None or usage is None or not chunks:
        raise RecordingError(f"the answer of {served[kind]} to {question!r} has no tokens or no end: is it too long?")
    counts = {
        "completion_tokens": usage["completion_tokens"],
        "changed_tokens": usage["guidance"]["changed_tokens"],
        "drafted_tokens": usage["speculation"]["drafted_tokens"],
        "acceptance": _short(usage["speculation"]["acceptance"]),
    }
    return {"chunks": chunks, "finish_reason": reason, "usage": counts}


async def _chunks(client: httpx.AsyncClient, path: str, body: Json) -> AsyncIterator[Json]:
    """The events of a streamed answer. Raises RecordingError."""
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise RecordingError(f"the service refuses {body['model']}: {_reason(response)}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    chunk: Json = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise RecordingError(f"an answer of {body['model']} broke off: {chunk['error']['message']}")
                    yield chunk
    except httpx.HTTPError as error:
        raise RecordingError(f"the connection to {client.base_url} failed: {error!r}") from None
    raise RecordingError(f"the connection to {client.base_url} ended before the answer of {body['model']} did")


def _reason(response: httpx.Response) -> str:
    """The service's own words for a refusal."""
    try:
        return f"{response.json()['error']['message']} ({response.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"


def _token(token: Json, kind: Kind, vocabulary: dict[tuple[int, str], int]) -> list[Any]:
    """An explained token as a recording stores it."""

    def entry(of: Json) -> int:
        return vocabulary.setdefault((of["id"], of["text"]), len(vocabulary))

    flags = (CHANGED if token["changed"] else 0) | (DRAFTED if token["drafted"] else 0)
    packed = [entry(token), token["alpha"], flags]
    if kind != "guided":
        return packed
    lists = ([part for each in token[model] for part in (entry(each), _short(each["probability"]))] for model in KINDS)
    return [*packed, _short(token["shift"]), _short(token["probability"]), *lists]


def _short(number: float | None) -> float | None:
    """A number with DIGITS significant digits."""
    return None if number is None else float(f"{number:.{DIGITS}g}")
