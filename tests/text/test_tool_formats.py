"""The form in which a chat template writes tool calls, and what it shows of tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.config import ToolParserName
from actors.text.chat_template import ChatTemplate, ChatTemplateError, function_tool
from actors.text.tokenizer import RoleTokenizer
from actors.text.tool_formats import FORMATS, find_format
from tests.support.tokenizers import byte_level, role_tokenizer, save

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
SHORT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }} {{ c.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}={% endif %}{{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", "hermes"),
        ("{{ '<tool_call>\\n<function=' }}", None),
        ("{{ '<tool_call>' + name }}<arg_key>", None),
        ("{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}", "llama3_json"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral_args"),
        ("{{ '<｜tool▁calls▁begin｜>' }}{{ '```json' }}", "deepseek_v3"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseek_v31"),
        (TURNS, None),
    ],
)
def test_the_form_follows_from_the_templates_text(template: str, form: ToolParserName | None) -> None:
    assert find_format(template) is (FORMATS[form] if form else None)


def test_a_template_shows_what_it_writes() -> None:
    plain, knowing = ChatTemplate(TURNS, {}), ChatTemplate(TOOLS + TURNS, {})
    assert (plain.shows_tools, knowing.shows_tools) == (False, True)
    assert plain.shows_system
    assert not plain.shows_tool_calls
    refusing = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS, {})
    assert not refusing.shows_system
    assert ChatTemplate(SHORT_IDS, {}).shows_tool_calls


def test_a_function_without_parameters_is_shown_with_none() -> None:
    shown = ChatTemplate("{{ tools[0].function.parameters.properties | tojson }}", {}).render(
        [], tools=[function_tool("f")]
    )
    assert shown == "{}"


def test_ids_of_calls_are_shortened_where_the_template_needs_it() -> None:
    call = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": "7"},
    ]
    text = ChatTemplate(SHORT_IDS, {}).render(talk)
    id_ = text.split("[ARGS]{} ")[1][:9]
    assert id_.isalnum()
    assert f"{id_}=7" in text
    kept = [{**talk[1], "tool_calls": [{**call, "id": "abcdefghi"}]}, {**talk[2], "tool_call_id": "abcdefghi"}]
    assert "abcdefghi=7" in ChatTemplate(SHORT_IDS, {}).render([talk[0], *kept])
    with pytest.raises(ChatTemplateError, match="nine characters"):
        ChatTemplate(SHORT_IDS.replace("!= 9", "!= 8"), {}).render(talk)


def test_the_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": TURNS},
        {"name": "tool_use", "template": TOOLS + "<tool_call>" + TURNS},
    ]
    folder = save(tmp_path, byte_level(), tokenizer_config={"chat_template": templates}, config={"vocab_size": 400})
    tokenizer = RoleTokenizer.load(str(folder))
    talk = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render(talk) == "user: Hi\n"
    assert '"name": "f"' in tokenizer.render(talk, tools=[function_tool("f")])
    assert tokenizer.tool_template is not None
    assert tokenizer.tool_template.tool_format is FORMATS["hermes"]


def test_special_tokens_that_are_shown_stand_in_the_text() -> None:
    tokenizer = role_tokenizer(byte_level(("<|turn|>", "<|call|>")))
    ids = tokenizer.encode("<|turn|>a<|call|>b")
    stream = tokenizer.stream(shown=[tokenizer.added_tokens["<|call|>"]])
    assert "".join(map(stream.push, ids)) + stream.flush() == "a<|call|>b"


def test_the_configured_form_goes_before_the_templates() -> None:
    assert role_tokenizer().tool_format("mistral").name == "mistral"
    assert role_tokenizer().tool_format("auto").name == "hermes"
    assert role_tokenizer(template=TURNS).tool_format("auto").name == "json"
    assert role_tokenizer(template=None).tool_format("auto").name == "json"
