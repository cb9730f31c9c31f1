"""Builds the prompt of each role, in the role's own vocabulary.

Chat: every role renders the messages with its own template, so special tokens correspond by function, never by id. A
small role without a template tokenises the text that the target's template rendered; it reads unknown marks as plain
text. Completion: all roles receive the same raw text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.api.generation import Role
from actors.api.sampling_params import Thinking
from actors.text.chat_template import ChatTemplateError
from actors.text.tokenizer import RoleTokenizer, TokenizerError
from router.backend import BadRequest
from router.prompt_thinking import ThinkingState, close_thinking, continued_thinking, open_thinking
from router.schema import CalledFunction, ChatMessage, Conversation
from router.tool_prompt import describe_tools
from router.tools import ToolUse

Tokenizers = Mapping[Role, RoleTokenizer]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in the ids of each role. state: of the thinking at its end. added: text that was added to open it."""

    ids: dict[Role, list[int]]
    state: ThinkingState = ThinkingState.UNMARKED
    added: str = ""


_RESERVED_CHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # no text means anything by them
_WRITTEN_BY_APPLICATIONS = ("system", "developer", "assistant")
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


def opens_turn(conversation: Conversation) -> bool:
    """True if a new answer begins after the prompt."""
    return not conversation.continue_final_message and conversation.add_generation_prompt is not False


def chat_prompt(
    request: Conversation,
    roles: Sequence[Role],
    tokenizers: Tokenizers,
    thinking: Thinking,
    opens: bool | None = None,
    closes: bool = False,
    tools: ToolUse | None = None,
) -> Prompt:
    """The prompt of a conversation for `roles`, of which the first is the primary.

    opens: open the thinking unless the templates state it; None: if a new answer begins after the prompt. closes: in
    place of this, close the thinking that a template has opened. tools: functions that the models are told of.
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
    texts: dict[Role, str] = {}
    cut = _unused_character(request)
    for role in roles:
        own, given = tokenizers[role], _cut_special_texts(request, tokenizers[role], cut)
        texts[role] = _render(own if own.has_chat_template else tokenizers["target"], given, tools)
    state = ThinkingState.UNMARKED
    if request.continue_final_message:
        state = continued_thinking(_text_of(request.messages[-1]), thinking)
    if opens_turn(request) if opens is None else opens:
        texts, state = (close_thinking if closes else open_thinking)(texts, thinking)
    try:
        special = request.add_special_tokens
        ids = {role: tokenizers[role].encode_parts(text.split(cut), special) for role, text in texts.items()}
    except TokenizerError as error:
        raise BadRequest(str(error), param="messages") from error
    return Prompt(ids, state)


def text_prompt(
    text: str,
    roles: Sequence[Role],
    tokenizers: Tokenizers,
    thinking: Thinking | None = None,
    special: bool = True,
    closes: bool = False,
) -> Prompt:
    """The prompt of the same raw text for each of `roles`. special: with the tokenizer's own prefix, such as a BOS.

    closes: close the thinking that the text has opened, instead of opening it.
    """
    opened, state = _open_raw(text, roles[0], thinking, closes)
    try:
        ids = {role: tokenizers[role].encode(opened, special=special) for role in roles}
    except TokenizerError as error:
        raise BadRequest(str(error), param="prompt") from error
    return Prompt(ids, state, opened[len(text) :])


def token_prompt(
    ids: list[int],
    primary: Role,
    roles: Sequence[Role],
    tokenizers: Tokenizers,
    thinking: Thinking | None = None,
    closes: bool = False,
) -> Prompt:
    """A prompt given as ids of `primary`; the other roles read its text, with their own BOS if `ids` has one.

    closes: close the thinking that the text has opened, instead of opening it.
    """
    own = tokenizers[primary]
    for id_ in ids:
        if not 0 <= id_ < own.width:
            raise BadRequest(f"token id {id_} is outside the vocabulary of {own.width} ids", param="prompt")
    lead = own.lead(ids)
    others = [role for role in roles if role != primary]
    text = own.decode(ids[lead:], skip_special=False) if others or thinking else ""
    opened, state = _open_raw(text, primary, thinking, closes)
    added = opened[len(text) :]
    prompts: dict[Role, list[int]] = {primary: ids + own.encode_continuation(added)}
    for role in others:
        prompts[role] = tokenizers[role].encode(opened, special=lead > 0)
    return Prompt(prompts, state, added)


def _open_raw(text: str, primary: Role, thinking: Thinking | None, closes: bool) -> tuple[str, ThinkingState]:
    """A raw text with its thinking opened or closed. thinking: None if the request does not mark any."""
    if thinking is None:
        return text, ThinkingState.UNMARKED
    opened, state = (close_thinking if closes else open_thinking)({primary: text}, thinking)
    return opened[primary], state


def _unused_character(request: Conversation) -> str:
    """A character that no message has. Raises BadRequest if they have all of those that Unicode reserves for this."""
    texts = [_text_of(message) for message in request.messages]
    unused = (each for each in _RESERVED_CHARACTERS if not any(each in text for text in texts))
    if (found := next(unused, None)) is None:
        raise BadRequest("the messages have every character from U+FDD0 to U+FDEF: leave one out", param="messages")
    return found


def _cut_special_texts(request: Conversation, tokenizer: RoleTokenizer, cut: str) -> Conversation:
    """The conversation with a character within each text of a special token that a user or a tool wrote.

    Where the rendered text is split at that character, it holds no special tokens but those of the template and of the
    application, which writes the other messages. Example: "stop<|end|>" becomes "stop<" and "|end|>".
    """

    def cut_all(text: str) -> str:
        return tokenizer.special_texts.sub(lambda found: found[0][0] + cut + found[0][1:], text)

    def cut_message(message: ChatMessage) -> ChatMessage:
        if message.role in _WRITTEN_BY_APPLICATIONS or message.content is None:
            return message
        named = message if message.name is None else message.model_copy(update={"name": cut_all(message.name)})
        if isinstance(message.content, str):
            return named.model_copy(update={"content": cut_all(message.content)})
        *parts, last = [cut_all(part.text) for part in message.content] or [""]
        texts = [*(part + cut for part in parts), last]  # two parts may form a special token together
        shaped = [part.model_copy(update={"text": text}) for part, text in zip(message.content, texts, strict=False)]
        return named.model_copy(update={"content": shaped})

    return request.model_copy(update={"messages": [cut_message(message) for message in request.messages]})


def _render(tokenizer: RoleTokenizer, request: Conversation, tools: ToolUse | None) -> str:
    new_turn = request.add_generation_prompt
    messages, template = [_openai_message(message) for message in request.messages], tokenizer.tool_template
    if tools is not None and template is not None and not template.shows_tools:
        messages = describe_tools(messages, tools, template)
    try:
        return tokenizer.render(
            messages,
            tools=None if tools is None else tools.shown(),
            add_generation_prompt=not request.continue_final_message if new_turn is None else new_turn,
            continue_final_message=request.continue_final_message,
            **request.chat_template_kwargs,
        )
    except ChatTemplateError as error:
        raise BadRequest(str(error), param="messages") from error


def _openai_message(message: ChatMessage) -> dict[str, Any]:
    """The message as plain data in today's form of OpenAI's API; the template's form follows from it.

    The reasoning gets every name under which templates look for it.
    """
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if isinstance(message.content, list):
        plain["content"] = [part.model_dump() for part in message.content]
    calls = [(call.id, call.function) for call in message.tool_calls or ()]
    if message.function_call is not None and not calls:
        calls = [(None, message.function_call)]
    if calls:
        plain["tool_calls"] = [_openai_call(id_, function) for id_, function in calls]
    names = ("reasoning", "reasoning_content", "thinking")
    reasoning = next((text for name in names if (text := getattr(message, name)) is not None), None)
    optional = {"name": message.name, "tool_call_id": message.tool_call_id, **dict.fromkeys(names, reasoning)}
    return plain | {key: value for key, value in optional.items() if value is not None}


def _openai_call(id_: str | None, function: CalledFunction) -> dict[str, Any]:
    """A tool call with its arguments as JSON text; no arguments are an empty object."""
    arguments = function.arguments or {}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        raise BadRequest("the arguments of a tool call must be JSON", param="messages") from None
    called = {"type": "function", "function": {"name": function.name, "arguments": arguments}}
    return called if id_ is None else {"id": id_, **called}


def _text_of(message: ChatMessage) -> str:
    """The text of a message's content."""
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""
