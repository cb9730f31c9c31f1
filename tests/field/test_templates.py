"""Chat templates with the traits of published ones, and messages as public clients send them.

A line of `templates.jsonl` is a template, messages, and the text of the prompt. With `thinking` the text includes how
the thinking is opened, and `state` is its state at the prompt's end. A line of `messages.jsonl` is one message with the
text that a template makes of it, or with the field that is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.api.sampling_params import Thinking
from router.backend import BadRequest
from router.chat import chat_prompt
from router.schema import ChatRequest, parse
from tests.support.tokenizers import role_tokenizer

HERE = Path(__file__).parent
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %};"
    "{% endfor %}"
)
FIELDS = ("chat_template_kwargs", "continue_final_message")


def lines(name: str) -> list[Any]:
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    return [pytest.param(row, id=row["name"]) for row in rows]


def rendered(template: str, messages: list[Any], thinking: Thinking, **more: Any) -> tuple[str, str]:
    """The prompt's text and the state of the thinking at its end."""
    tokenizer = role_tokenizer(template=template)
    request = parse(ChatRequest, {"model": "duo", "messages": messages} | more)
    prompt = chat_prompt(request, ("target",), {"target": tokenizer}, thinking)
    return tokenizer.decode(prompt.ids["target"], skip_special=False), prompt.state.value


@pytest.mark.parametrize("row", lines("templates.jsonl"))
def test_a_template_reads_messages_in_its_own_form(row: dict[str, Any]) -> None:
    more = {name: row[name] for name in FIELDS if name in row}
    text, state = rendered(row["template"], row["messages"], Thinking(**row.get("thinking", {})), **more)
    assert (text, state) == (row["text"], row.get("state", "unmarked"))


@pytest.mark.parametrize("row", lines("messages.jsonl"))
def test_a_message_of_a_public_client_is_read_or_refused_by_name(row: dict[str, Any]) -> None:
    if "param" not in row:
        assert rendered(TEMPLATE, [row["message"]], Thinking())[0] == row["text"]
        return
    with pytest.raises(BadRequest) as refused:
        rendered(TEMPLATE, [row["message"]], Thinking())
    assert refused.value.param == row["param"]
