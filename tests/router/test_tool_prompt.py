"""Models whose chat template knows no tools read a description."""

from __future__ import annotations

from typing import Any

import pytest

from actors.text.tokenizer import RoleTokenizer
from router.chat import chat_prompt
from router.request_planning import plan_chat
from router.schema import ChatRequest, parse
from router.tools import tool_use
from tests.support.scripted_service import config
from tests.support.tokenizers import TEMPLATE, byte_level, role_tokenizer

TURNS = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
PARAMETERS = {"type": "object", "properties": {"who": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": PARAMETERS}}
USER = {"role": "user", "content": "Who?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"who": "Ada"}'}}
CALLING = {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]}
RESULTS = [{"role": "tool", "tool_call_id": "call_1", "content": word} for word in ("Eve", "Bob")]


def rendered(template: str, messages: list[Any], form: str = "hermes", **fields: Any) -> str:
    """The prompt of a model with this template, where the model that answers writes calls in `form`."""
    tokenizer = role_tokenizer(template=template)
    request = parse(ChatRequest, {"messages": messages, "tools": [TOOL], **fields})
    tools = tool_use(request, config(models={"target": {"tool_parser": form}}).models.target, tokenizer)
    prompt = chat_prompt(request, ("target",), {"target": tokenizer}, config().thinking, tools=tools)
    return tokenizer.decode(prompt.ids["target"], skip_special=False)


def test_a_template_that_knows_tools_shows_them_itself() -> None:
    text = rendered(TEMPLATE, [USER])
    assert text.startswith('<|turn|>system\n{"name": "find"')
    assert "# Tools" not in text


def test_the_description_becomes_the_system_message() -> None:
    text = rendered(TURNS, [USER])
    assert text.startswith("<system># Tools")
    assert '"description": "Finds."' in text
    assert '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>\n<user>Who?' in text


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_the_description_follows_a_system_message(content: Any) -> None:
    text = rendered(TURNS, [{"role": "system", "content": content}, USER])
    assert text.startswith("<system>Be brief.\n")
    assert text.count("<system>") == 1
    assert "# Tools" in text


def test_a_template_without_system_messages_has_it_before_the_question() -> None:
    text = rendered(NO_SYSTEM, [USER])
    assert text.startswith("<user># Tools")
    assert text.endswith("\n\nWho?\n")


def test_calls_and_results_are_text_where_the_template_shows_none() -> None:
    text = rendered(TURNS, [USER, CALLING, *RESULTS, USER])
    call = '<tool_call>\n{"name": "find", "arguments": {"who": "Ada"}}\n</tool_call>'
    assert f"<assistant>Wait.\n\n{call}\n{call}\n" in text
    results = "<tool_response>\nEve\n</tool_response>\n<tool_response>\nBob\n</tool_response>"
    assert text.endswith(f"<user>{results}\n\nWho?\n")
    assert rendered(TURNS, [USER, CALLING, *RESULTS]).endswith(f"<user>{results}\n")


def test_the_description_is_in_the_form_of_the_model_that_answers() -> None:
    assert '[TOOL_CALLS] [{"name": "NAME"' in rendered(TURNS, [USER], "mistral")
    assert '{"name": "NAME", "parameters": ARGUMENTS}' in rendered(TURNS, [USER], "llama3_json")


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert "find" not in rendered(TEMPLATE, [USER], tool_choice="none")
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [other]}}
    text = rendered(TEMPLATE, [USER], tools=[TOOL, other], tool_choice=allowed)
    assert "other" in text
    assert "find" not in text


def test_every_role_reads_of_the_tools_in_its_own_way() -> None:
    models = {role: {"max_position": 4_096} for role in ("target", "guider", "guider_base")}
    made: dict[Any, RoleTokenizer] = {
        "target": role_tokenizer(max_position=4_096),
        "guider": role_tokenizer(byte_level(), TURNS, 4_096),
        "guider_base": role_tokenizer(byte_level(), None, 4_096),
    }
    request = parse(ChatRequest, {"messages": [USER], "tools": [TOOL]})
    plan = plan_chat(request, config(models=models), made, "r")
    prompts = {role: made[role].decode(ids, False) for role, ids in plan.sequences[0].prompts.items()}
    assert all("find" in prompt for prompt in prompts.values())
    assert ["# Tools" in prompts[role] for role in ("target", "guider", "guider_base")] == [False, True, False]
    assert plan.tools is not None
    assert plan.tools.form.name == "hermes"  # as the target's template writes calls
