"""Builds the prompt of each role, in the role's own vocabulary.

Chat: every role renders the messages with its own template, so special tokens correspond by function, never by id. A
small role without a template tokenises the text that the target's template rendered; it reads unknown marks as plain
text. Completion: all roles receive the same raw text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from actors.api.generation import Role
from actors.text.chat_template import ChatTemplateError
from actors.text.tokenizer import RoleTokenizer, TokenizerError
from router.backend import BadRequest
from router.schema import ChatMessage, Conversation, ToolCall

Prompts = dict[Role, list[int]]
Tokenizers = Mapping[Role, RoleTokenizer]

_RESERVED = frozenset(
    {
        "self",  # a name of jinja itself
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
    }
)


def chat_prompts(request: Conversation, roles: Sequence[Role], tokenizers: Tokenizers, start: str) -> Prompts:
    """Prompt ids of each of `roles`. start: text that opens the thinking, at the prompt's end.

    Raises BadRequest if a template rejects the messages.
    """
    if request.continue_final_message and request.add_generation_prompt:
        raise BadRequest(
            "add_generation_prompt opens a new turn, continue_final_message goes on with the last: ask for one",
            param="continue_final_message",
        )
    for name in request.chat_template_kwargs:
        if name in _RESERVED:
            raise BadRequest(f"chat_template_kwargs must not set {name}", param="chat_template_kwargs")
    prompts: Prompts = {}
    for role in roles:
        own = tokenizers[role]
        template = own if own.has_chat_template else tokenizers["target"]
        text = open_thinking(_render(template, request), start)
        try:
            prompts[role] = own.encode(text, special=request.add_special_tokens)
        except TokenizerError as error:
            raise BadRequest(str(error), param="messages") from error
    return prompts


def text_prompts(
    text: str, roles: Sequence[Role], tokenizers: Tokenizers, start: str = "", special: bool = True
) -> Prompts:
    """Prompt ids of the same raw text for each of `roles`. special: with the tokenizer's own prefix, such as a BOS."""
    try:
        return {role: tokenizers[role].encode(text + start, special=special) for role in roles}
    except TokenizerError as error:
        raise BadRequest(str(error), param="prompt") from error


def token_prompts(
    ids: list[int], primary: Role, roles: Sequence[Role], tokenizers: Tokenizers, start: str = ""
) -> Prompts:
    """A prompt given as ids of `primary`; the other roles read its text, with their own BOS if `ids` has one."""
    own = tokenizers[primary]
    for id_ in ids:
        if not 0 <= id_ < own.width:
            raise BadRequest(f"token id {id_} is outside the vocabulary of {own.width} ids", param="prompt")
    lead = own.lead(ids)
    prompts: Prompts = {primary: ids + own.encode(start)}
    others = [role for role in roles if role != primary]
    text = own.decode(ids[lead:], skip_special=False) + start if others else ""
    for role in others:
        prompts[role] = tokenizers[role].encode(text, special=lead > 0)
    return prompts


def open_thinking(text: str, start: str) -> str:
    """`text` with `start` at its end exactly once: some templates open the thinking themselves."""
    mark = start.strip()
    if mark and text.rstrip().endswith(mark):
        return text.rstrip()[: -len(mark)] + start
    return text + start


def _render(tokenizer: RoleTokenizer, request: Conversation) -> str:
    new_turn = request.add_generation_prompt
    try:
        return tokenizer.render(
            [_template_message(message) for message in request.messages],
            add_generation_prompt=not request.continue_final_message if new_turn is None else new_turn,
            continue_final_message=request.continue_final_message,
            **request.chat_template_kwargs,
        )
    except ChatTemplateError as error:
        raise BadRequest(str(error), param="messages") from error


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """The message in the form that templates expect: text content; OpenAI's newer role "developer" becomes "system"."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content or ""}
    if message.role == "developer":
        plain["role"] = "system"
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    optional = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": reasoning}
    return plain | {key: value for key, value in optional.items() if value is not None}


def _template_call(call: ToolCall) -> dict[str, Any]:
    """The tool call in the form that templates expect, with decoded arguments: many templates read them."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise BadRequest("the arguments of a tool call must be JSON", param="messages") from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
