"""Finds the form in which a chat template reads messages, and brings messages into it.

Templates differ: some join `content` as a string and some loop over a list of parts; some index the arguments of a tool
call and some print them. The form is found once per template, by rendering short conversations in each form and looking
for their words in the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Message = Mapping[str, Any]
TryRender = Callable[[list[dict[str, Any]]], str | None]  # the text of a conversation; None if the template refuses it

_FIRST, _SECOND = "alphaword", "omegaword"  # words that no template has of its own
_DUMPED = re.compile(rf"""["']text["']:\s*["'](?:{_FIRST}|{_SECOND})""")  # a part printed as data
_ARGUMENTS = {_FIRST: _SECOND}
_CALL_ID = "call00001"  # nine characters, which Mistral's templates require
_LONG_ID = "call_0123456789abcdef"


@dataclass(frozen=True, slots=True)
class ContentForm:
    """The forms of one role's content that a template shows: a string, a list of one part, a list of several parts."""

    text: bool = True
    part: bool = False
    parts: bool = False

    def shape(self, content: str | Sequence[Message]) -> str | list[dict[str, Any]]:
        """The content in a form that the template shows. Parts that it cannot show one by one are joined by newlines,
        as in vLLM."""
        if not isinstance(content, str):
            if self.parts:
                return [dict(part) for part in content]
            content = "\n".join(part["text"] for part in content)
        return _parts(content) if self.part and not self.text else content


@dataclass(frozen=True, slots=True)
class MessageForm:
    """The form of messages that one template reads.

    contents: by role; other roles are read like `user`. null_content: true if the template reads null beside tool
    calls; otherwise it gets "". arguments_as_text: true if it reads the arguments of a tool call as JSON text,
    otherwise as an object. roles: roles that it knows under another name. null_for_empty: true if it shows tool calls
    beside null and not beside "". short_ids: true if it takes ids of tool calls of nine letters or digits alone.
    """

    contents: Mapping[str, ContentForm] = field(default_factory=dict)
    null_content: bool = True
    arguments_as_text: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    null_for_empty: bool = False
    short_ids: bool = False

    def shape(self, message: Message) -> dict[str, Any]:
        """A message of the OpenAI API in the template's form. Its tool calls have their arguments as JSON text."""
        role = self.roles.get(message["role"], message["role"])
        shaped = {**message, "role": role}
        content = message.get("content")
        keeps_null = self.null_content and message.get("tool_calls")
        if keeps_null and (content is None or (content in ("", []) and self.null_for_empty)):
            shaped["content"] = None
        else:
            contents = self.contents.get(role) or self.contents.get("user") or ContentForm()
            shaped["content"] = contents.shape(content or "")
        if message.get("tool_calls"):
            shaped["tool_calls"] = [self._shape_call(call) for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            shaped["tool_call_id"] = self._shape_id(message["tool_call_id"])
        return shaped

    def _shape_call(self, call: Message) -> dict[str, Any]:
        function = dict(call["function"])
        if not self.arguments_as_text:
            function["arguments"] = json.loads(function["arguments"])
        shaped = {**call, "function": function}
        return {**shaped, "id": self._shape_id(call["id"])} if call.get("id") else shaped

    def _shape_id(self, id_: str) -> str:
        """The id of a call as the template takes it, the same for the call and its result."""
        if not self.short_ids or re.fullmatch("[a-zA-Z0-9]{9}", id_):
            return id_
        return hashlib.sha256(id_.encode()).hexdigest()[: len(_CALL_ID)]


def find_form(source: str, render: TryRender) -> MessageForm:
    """The form that a template reads. source: its text."""
    user = _content_form(render, [], {"role": "user"}, [])
    question = {"role": "user", "content": user.shape("question")}
    contents = {"user": user, "assistant": _content_form(render, [question], {"role": "assistant"}, [question])}
    for role in ("system", "developer"):
        contents[role] = _content_form(render, [], {"role": role}, [question])
    empty = contents["assistant"].shape("")
    null_content, arguments_as_text = _tool_call_form(render, question, empty)
    # Without the words, which are looked for in the results.
    call = _call(arguments_as_text, None if null_content else empty, {})
    for role in ("tool", "function"):
        result = {"role": role, "tool_call_id": _CALL_ID, "name": "find"}
        contents[role] = _content_form(render, [question, call], result, [])
    roles = {}
    if "developer" not in source:
        roles["developer"] = "system"  # OpenAI's newer name for it
    if contents["function"] == _HIDDEN:
        roles["function"] = "tool"  # OpenAI's older name for it
    beside_null, beside_empty = (_shows_call(render, question, arguments_as_text, each) for each in (None, empty))
    null_for_empty = null_content and beside_null and not beside_empty
    content = None if null_content and not null_for_empty else contents["assistant"].shape("")
    calls = [_call(arguments_as_text, content, id_=id_) for id_ in (_CALL_ID, _LONG_ID)]
    short, long = (render([question, call]) for call in calls)
    short_ids = short is not None and long is None
    return MessageForm(contents, null_content, arguments_as_text, roles, null_for_empty, short_ids)


_HIDDEN = ContentForm(text=False)


def _content_form(
    render: TryRender, before: list[dict[str, Any]], message: dict[str, Any], after: list[dict[str, Any]]
) -> ContentForm:
    """The forms of a message's content that appear in the rendered conversation."""

    def text_of(content: Any) -> str | None:
        return render([*before, {**message, "content": content}, *after])

    return ContentForm(
        text=_FIRST in (text_of(_FIRST) or ""),
        part=_shows(text_of(_parts(_FIRST)), _FIRST),
        parts=_shows(text_of(_parts(_FIRST, _SECOND)), _FIRST, _SECOND),
    )


def _shows(text: str | None, *words: str) -> bool:
    return text is not None and all(word in text for word in words) and not _DUMPED.search(text)


def _tool_call_form(render: TryRender, question: dict[str, Any], empty: Any) -> tuple[bool, bool]:
    """(null content is read, arguments are read as text), as the template shows them. empty: content without text."""
    plain = [render([question, _call(as_text, empty)]) for as_text in (False, True)]
    null = [render([question, _call(as_text, None)]) for as_text in (False, True)]
    printed = [  # null that the template writes as the word "None" is not read
        with_null is not None and with_null.count("None") > (with_text or "").count("None")
        for with_null, with_text in zip(null, plain, strict=True)
    ]
    for content_is_null, as_text in product((True, False), (False, True)):
        text = (null if content_is_null else plain)[as_text]
        if text is not None and _shows_arguments(text) and not (content_is_null and printed[as_text]):
            return content_is_null, as_text
    return null[False] is not None and not printed[False], False


def _shows_call(render: TryRender, question: dict[str, Any], as_text: bool, content: Any) -> bool:
    text = render([question, _call(as_text, content)])
    return text is not None and _shows_arguments(text)


def _shows_arguments(text: str) -> bool:
    """True if the arguments are neither Python's form of an object nor JSON text within JSON."""
    return _FIRST in text and _SECOND in text and f"'{_FIRST}'" not in text and f'\\"{_FIRST}' not in text


def _call(
    as_text: bool, content: Any, arguments: Mapping[str, str] = _ARGUMENTS, id_: str = _CALL_ID
) -> dict[str, Any]:
    function = {"name": "find", "arguments": json.dumps(arguments) if as_text else arguments}
    call = {"id": id_, "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]
