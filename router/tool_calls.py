"""Writes tool calls into answers, as OpenAI's API does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.tool_parser import ParsedAnswer, Piece, ToolParser
from router.tools import ToolUse

Json = dict[str, Any]


@dataclass(frozen=True)
class ToolCallFormat:
    """The tool calls of one request's answers.

    ids: by choice a text that no other answer of the service has; the ids of its calls follow from it.
    """

    tools: ToolUse
    ids: Sequence[str]

    def parser(self) -> ToolParser:
        """A parser of one answer."""
        return self.tools.parser()

    def message(self, choice: int, content: str) -> Json:
        """The content of a whole answer, null beside calls if it is empty, and the calls if there are some."""
        parser = self.parser()
        answer = ParsedAnswer.of([*parser.push(content), *parser.finish()])
        calls = [self._call(choice, number, call.name, call.arguments) for number, call in enumerate(answer.calls)]
        return {"content": answer.content or None, "tool_calls": calls} if calls else {"content": answer.content}

    def delta(self, choice: int, pieces: Sequence[Piece]) -> Json:
        """The next content of a streamed answer, and the next parts of its calls, one entry for each call."""
        content, calls = "", dict[int, Json]()
        for piece in pieces:
            if piece.call is None:
                content += piece.text
            elif piece.name is not None:
                calls[piece.call] = {"index": piece.call} | self._call(choice, piece.call, piece.name, piece.text)
            elif not piece.broken:  # the arguments of a broken call were sent, and are not sent again as content
                part = calls.setdefault(piece.call, {"index": piece.call, "function": {"arguments": ""}})
                part["function"]["arguments"] += piece.text
        message: Json = {"content": content} if content else {}
        return message | ({"tool_calls": list(calls.values())} if calls else {})

    def finish_reason(self, reason: str) -> str:
        """The reason of the end of an answer with calls. As in OpenAI's API, a call of a named function is a stop."""
        return "tool_calls" if reason == "stop" and self.tools.named is None else reason

    def _call(self, choice: int, number: int, name: str, arguments: str) -> Json:
        digest = hashlib.sha256(f"{self.ids[choice]} {number}".encode()).hexdigest()
        return {"id": f"call_{digest[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}
