"""Renders messages to the text of a prompt by a checkpoint's chat template.

The jinja environment equals that of `transformers.utils.chat_template_utils`, whose import needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.text.message_form import Message, MessageForm, find_form
from actors.text.tool_formats import ToolFormat, find_format

_CUT = "<|the final message ends here|> "  # its trailing space is lost if the template trims messages


_PROBE, _RESULT = "probe00word", "result00word"  # words that no template has of its own
_QUESTION = {"role": "user", "content": "question"}


class ChatTemplateError(ValueError):
    """The template cannot render the messages. The error's text is meant for clients."""


def function_tool(name: str, description: str = "", parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A function as templates read it. parameters: a JSON schema; None for a function without parameters."""
    parameters = {"type": "object", "properties": {}} if parameters is None else dict(parameters)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


class ChatTemplate:
    """One compiled template with the special tokens that it can name (`bos_token`, `eos_token`, ...).

    It renders messages of the OpenAI API, which it brings into the form that the template reads.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error
        self._source, self._special_tokens = source, dict(special_tokens)

    @cached_property
    def form(self) -> MessageForm:
        """The form of messages that the template reads."""
        return find_form(self._source, self._try)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """The form of the tool calls that the template writes; None if it writes none that is known."""
        return find_format(self._source)

    @cached_property
    def shows_tools(self) -> bool:
        """True if the template writes the functions of a request into the prompt."""
        return self._shows([_QUESTION], tools=[function_tool(_PROBE)])

    @cached_property
    def shows_system(self) -> bool:
        """True if the template writes a system message."""
        return self._shows([{"role": "system", "content": _PROBE}, _QUESTION])

    @cached_property
    def shows_tool_calls(self) -> bool:
        """True if the template writes tool calls and their results."""
        call = {"id": _PROBE[:9], "type": "function", "function": {"name": _PROBE, "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": _PROBE[:9], "name": _PROBE, "content": _RESULT}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        return self._shows([_QUESTION, calling, result]) and self._shows([_QUESTION, calling, result], word=_RESULT)

    def _shows(self, messages: Sequence[Message], word: str = _PROBE, **arguments: Any) -> bool:
        try:
            return word in self.render(messages, **arguments)
        except ChatTemplateError:
            return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **arguments: Any,
    ) -> str:
        """The prompt's text.

        messages: content is a text, a list of text parts, or null; arguments of tool calls are JSON text. tools:
        functions that the model may call, as in the OpenAI API; a template may leave them out (`shows_tools`).
        add_generation_prompt: open the assistant's turn. continue_final_message: leave the last message open, so that
        the model continues it. arguments: further variables of the template.
        Raises ChatTemplateError if the template refuses the messages.
        """
        shaped: list[Message] = [self.form.shape(message) for message in messages]
        if continue_final_message:
            shaped = _mark_end(shaped)
        text = self._render(shaped, add_generation_prompt, {"tools": tools} | arguments)
        return _cut_at_mark(text) if continue_final_message else text

    def _try(self, shaped: Sequence[Message]) -> str | None:
        try:
            return self._render(shaped, False, {})
        except ChatTemplateError:
            return None

    def _render(self, shaped: Sequence[Message], add_generation_prompt: bool, arguments: Mapping[str, Any]) -> str:
        variables = {"tools": None, "documents": None, **self._special_tokens, **arguments}
        try:
            return self._template.render(messages=shaped, add_generation_prompt=add_generation_prompt, **variables)
        except (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error


def _mark_end(shaped: Sequence[Message]) -> list[Message]:
    content = shaped[-1].get("content") if shaped else None
    if isinstance(content, list) and content:
        return [
            *shaped[:-1],
            {**shaped[-1], "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CUT}]},
        ]
    if not isinstance(content, str):
        raise ChatTemplateError("continue_final_message needs a last message with text")
    return [*shaped[:-1], {**shaped[-1], "content": content + _CUT}]


def _cut_at_mark(text: str) -> str:
    end = text.rfind(_CUT.strip())
    if end < 0:
        raise ChatTemplateError("the chat template drops the last message, so it cannot be continued")
    return text[:end] if text.startswith(_CUT, end) else text[:end].rstrip()


class _Generation(Extension):
    """The tag `{% generation %}`, which marks text for training. In a prompt its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes for HTML, which no model was trained on
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
