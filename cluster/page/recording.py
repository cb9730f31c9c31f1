"""The file of a recording: answers of one service to questions, in all modes of the playground.

A JSON object with the keys of `KEYS`. Texts that repeat are stored once: `vocabulary` lists pairs of a token id and its
text, and tokens refer to its entries by number. Of each question there are `question`, `gold` (the right answer) and
`answers`, with one object a mode:

    chunks          [ms since the request, reasoning, content, tokens] for each event of the stream
    finish_reason   of the choice
    usage           completion_tokens, changed_tokens, drafted_tokens, acceptance

A token is [entry, alpha, flags]; flags: 1 if guidance changed it, 2 if it was drafted. A token of the guided answer
goes on with [shift in nats, probability, target, guider, guided], of which the last three list each model's candidates:
entry, probability, entry, probability, ... . The page shows candidates of the guided answer only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

FORMAT = 1  # of the file and of cluster/page/browser/service.js, which reads it: a change of one is a new number
FOLDER = Path(__file__).parent / "recordings"
Kind = Literal["target", "guider", "guided"]  # modes of the playground
KINDS: tuple[Kind, ...] = get_args(Kind)
KEYS = (
    "format",
    *("title", "about", "models"),  # for the reader; models: the name of each role's model
    *("date", "command", "cores"),  # of recording; cores: of the machine, null if the service ran elsewhere
    *("served", "longest"),  # names of the three modes in the API, and the most tokens of a session
    *("settings", "questions", "vocabulary"),
)


class RecordingError(RuntimeError):
    """A recording cannot be made or read. The message names the file and what to do."""


def read_recordings(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The recordings of a folder in the order of their file names, each with its `name`. Raises RecordingError."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise RecordingError(f"{folder} holds no recording: make one with python -m cluster.page --record FILE")
    return [{"name": file.stem} | read_recording(file) for file in files]


def read_recording(file: Path) -> dict[str, Any]:
    """A recording of the current format. Raises RecordingError."""
    again = f"record it anew: python -m cluster.page --record {file.with_suffix('.yaml')}"
    try:
        recording = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordingError(f"{file} cannot be read: {error}; {again}") from None
    if not isinstance(recording, dict) or recording.get("format") != FORMAT:
        found = recording.get("format") if isinstance(recording, dict) else None
        raise RecordingError(f"{file} has format {found}, and this version reads format {FORMAT}; {again}")
    if recording.keys() != {*KEYS}:
        different = ", ".join(sorted(recording.keys() ^ {*KEYS}))
        raise RecordingError(f"{file} lacks keys of format {FORMAT} or has others ({different}); {again}")
    return recording


def write_recording(recording: dict[str, Any], file: Path) -> None:
    """Write a recording, with a line for each key and each question, so that changes of it can be compared."""
    assert recording.keys() == {*KEYS}
    lines = [f"{_json(key)}: {_json(recording[key])}" for key in KEYS if key != "questions"]
    questions = ",\n".join(_json(question) for question in recording["questions"])
    lines.append(f'"questions": [\n{questions}\n]')
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
