"""The grammar of an answer that calls tools, in the form in which its model writes calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from actors.text.tokenizer import RoleTokenizer
from router.backend import BadRequest
from router.grammars import checked_schema, grammar_text
from router.schema import ChatRequest, FunctionBody
from router.tools import ToolUse

# Spaces as chat templates write JSON: models were trained on this.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_PARAMETERS: dict[str, Any] = {"properties": {}, "additionalProperties": False}


def answer_grammar(request: ChatRequest, tools: ToolUse, tokenizer: RoleTokenizer) -> tuple[str, str]:
    """The grammar of an answer with tools, "" for none, and the field that asks for it. Raises BadRequest.

    Required calls: calls alone. A form of the answer: that form, or calls. Strict functions: any text, then calls, if
    the mark of a call is one token of the model; otherwise none. tokenizer: of the model that answers.
    """
    content, param = grammar_text(request)
    if tools.required and request.structured_outputs is not None:
        raise BadRequest(
            "structured_outputs gives the whole answer its form, and tool_choice asks for a call: send one of the two",
            param="structured_outputs",
        )
    if tools.required:
        return _grammars("start: lead? calls", tools, tokenizer), "tools"
    if content:
        parts = json.loads(content)["grammars"] if content.startswith("{") else [{"lark_grammar": content}]
        parts[0]["name"] = "content"
        # Calls that are JSON alone could not be told from content that is JSON, so they have their mark then.
        mark = _lark(tools.form.begins[0], tools.form.marks, tokenizer) if tools.form.bare and tools.form.begins else ""
        return _grammars(f"start: lead? {mark} calls | @content", tools, tokenizer, parts), param
    marked = any(mark in tokenizer.added_tokens for mark in tools.form.begins[:1])
    if marked and any(function.strict for function in tools.callable):
        return _grammars("start: TEXT | TEXT calls", tools, tokenizer), "tools"
    return "", ""


def _grammars(start: str, tools: ToolUse, tokenizer: RoleTokenizer, more: list[Any] | None = None) -> str:
    lines = [start, *_rules(tools, tokenizer)]
    if "TEXT" in start:
        lines.append(r"TEXT: /(.|\n)*/")
    else:
        lines.append(r'lead: "\n\n"')  # many models write it behind their thinking
    if not more:
        return LLMatcher.grammar_from_lark("\n".join(lines))
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *more]})


def _rules(tools: ToolUse, tokenizer: RoleTokenizer) -> Iterator[str]:
    form = tools.form

    def lark(text: str) -> str:
        return _lark(text, form.marks, tokenizer)

    further = f" ({lark(form.separator)} call)*" if tools.parallel and not tools.named else ""
    opening = "(" + " | ".join(lark(text) or '""' for text in form.openings) + ")"
    yield f"calls: {opening if any(form.openings) else ''} call{further} {lark(form.closing)}"
    yield "call: " + " | ".join(f"call{number}" for number in range(len(tools.callable)))
    before, after = form.call.split("ARGUMENTS")
    for number, function in enumerate(tools.callable):
        yield f"call{number}: {lark(before.replace('NAME', function.name))} arguments{number} {lark(after)}"
        yield f"arguments{number}: %json {json.dumps(_schema(function))}"


def _schema(function: FunctionBody) -> dict[str, Any]:
    """The schema of a function's arguments, with the options of llguidance.

    Arguments are an object, whatever else the schema allows. Keywords that llguidance does not know are left out
    (`lenient`) unless the function is strict.
    """
    schema = _NO_PARAMETERS if function.parameters is None else checked_schema(function.parameters, "tools")
    schema = {"type": "object"} | schema
    if schema["type"] != "object":
        raise BadRequest(f"the parameters of {function.name} must be an object's schema", param="tools")
    return schema | {"x-guidance": _SPACING | {"lenient": not function.strict}}


def _lark(text: str, marks: tuple[str, ...], tokenizer: RoleTokenizer) -> str:
    """A text in Lark: its marks that are tokens of the model by their ids, all else as strings."""
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    ids = tokenizer.added_tokens
    return " ".join(f"<[{ids[part]}]>" if part in marks and part in ids else json.dumps(part) for part in parts if part)
