"""Renders messages to the text of a prompt by a checkpoint's chat template.

The jinja environment equals that of `transformers.utils.chat_template_utils`, whose import needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

_CUT = "<|the final message ends here|> "  # its trailing space is lost if the template trims messages


class ChatTemplateError(ValueError):
    """The template cannot render the messages. The error's text is meant for clients."""


class ChatTemplate:
    """One compiled template with the special tokens that it can name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **arguments: Any,
    ) -> str:
        """The prompt's text.

        add_generation_prompt: open the assistant's turn. continue_final_message: leave the last message open, so that
        the model continues it. arguments: further variables of the template.
        Raises ChatTemplateError if the template refuses the messages.
        """
        if continue_final_message:
            messages = _mark_end(messages)
        variables = {"tools": None, "documents": None, **self._special_tokens, **arguments}
        try:
            text = self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text


def _mark_end(messages: Sequence[Message]) -> list[Message]:
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise ChatTemplateError("continue_final_message needs a last message with text")
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _CUT}]


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
