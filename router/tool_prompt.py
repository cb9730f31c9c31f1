"""Tells a model of tools whose chat template does not: a description in its messages, and calls as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.text.chat_template import ChatTemplate
from router.tools import ToolUse

Message = dict[str, Any]


def describe_tools(messages: Sequence[Message], tools: ToolUse, template: ChatTemplate) -> list[Message]:
    """The messages with a description of the tools in the system message, which is added if there is none.

    It says how a call is written in the form of the model that answers. If the template shows no system message, the
    first message of the user has the description. If it shows no tool calls, calls are content in that form, and their
    results are messages of the user. messages: in the form of the OpenAI API.
    """
    plain = list(messages) if template.shows_tool_calls else list(_as_text(messages, tools))
    text = description(tools)
    if not template.shows_system:
        at = next((at for at, message in enumerate(plain) if message["role"] == "user"), None)
        if at is None:
            return [{"role": "user", "content": text}, *plain]
        return [*plain[:at], _joined(text, plain[at], first=True), *plain[at + 1 :]]
    if plain and plain[0]["role"] in ("system", "developer"):
        return [_joined(text, plain[0], first=False), *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def description(tools: ToolUse) -> str:
    """The tools, and how they are called, in words."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.shown())
    call = tools.form.write_all([("NAME", "ARGUMENTS")])
    return (
        "# Tools\n\nYou may call these functions. Each line describes one, with a JSON schema of its parameters:\n"
        f"{functions}\n\nTo call a function, write exactly this, with the function's name in place of NAME and a JSON "
        f"object in place of ARGUMENTS:\n{call}"
    )


def _joined(text: str, message: Message, first: bool) -> Message:
    """A message with a text before or behind its content."""
    content = message["content"] or ""
    if isinstance(content, list):
        part = {"type": "text", "text": text}
        return {**message, "content": [part, *content] if first else [*content, part]}
    return {**message, "content": "\n\n".join(part for part in ((text, content) if first else (content, text)) if part)}


def _as_text(messages: Sequence[Message], tools: ToolUse) -> Iterator[Message]:
    """The messages with calls as content, and with the results of one turn as one message of the user."""
    results: list[str] = []
    for message in messages:
        if message["role"] in ("tool", "function"):
            results.append(f"<tool_response>\n{_text(message['content'])}\n</tool_response>")
            continue
        if results and message["role"] != "user":
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        elif results:
            message = _joined("\n".join(results), message, first=True)
            results = []
        yield _without_calls(message, tools) if message.get("tool_calls") else message
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _without_calls(message: Message, tools: ToolUse) -> Message:
    called: list[Mapping[str, Any]] = [call["function"] for call in message["tool_calls"]]
    calls = tools.form.write_all([(function["name"], function["arguments"]) for function in called])
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    return _joined(calls, plain, first=False)


def _text(content: Any) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
