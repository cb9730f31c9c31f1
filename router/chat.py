"""From what a client wrote to a prompt for each role, each in its own vocabulary.

In a chat every role renders the messages with its own template, so that special tokens match by role and never by id;
in a completion the same raw text goes to all. A small role without a template takes the text that the target's template
gave, which its own tokenizer then reads: marks that it does not know are plain text to it.
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
        "self",  # jinja's own
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
    """The prompt of each of `roles`, with `start` (the mark that opens thinking) at its end.

    Raises BadRequest when a template refuses the messages.
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
    """The same raw text for each of `roles`; special: with what its tokenizer puts before raw text."""
    try:
        return {role: tokenizers[role].encode(text + start, special=special) for role in roles}
    except TokenizerError as error:
        raise BadRequest(str(error), param="prompt") from error


def token_prompts(
    ids: list[int], primary: Role, roles: Sequence[Role], tokenizers: Tokenizers, start: str = ""
) -> Prompts:
    """A prompt given as ids of `primary`: the other roles read its text, after their own BOS where it has one."""
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
    """`text` with `start` at its end, once: some templates open the thinking themselves, others do not."""
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
    """The message as templates know it: text content, and "developer", OpenAI's newer word, as "system"."""
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
    """The call as templates know it, its arguments decoded: many of them look into these."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise BadRequest("the arguments of a tool call must be JSON", param="messages") from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
