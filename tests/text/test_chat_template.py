import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from actors.text.chat_template import ChatTemplate, ChatTemplateError
from tests.support.tokenizers import TEMPLATE

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is <Ada> & 'Eve'?"},
    {"role": "assistant", "content": "<think>Hm.</think>Bob. "},
]
DIALECT = """\
{% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {{ message | tojson }}{% generation %} {{ message.content }} {% endgeneration %}

{% endfor %}
{{ bos_token }}{{ colour }}{% if tools is none %}!{% endif %}"""


@pytest.mark.parametrize("source", [TEMPLATE, DIALECT], ids=["turns", "dialect"])
@pytest.mark.parametrize("opens", [True, False])
def test_text_is_what_transformers_renders(source: str, opens: bool) -> None:
    own = ChatTemplate(source, {"bos_token": "<s>"}).render(TALK, add_generation_prompt=opens, colour="red")
    theirs, _ = render_jinja_template(
        [TALK], None, None, source, add_generation_prompt=opens, bos_token="<s>", colour="red"
    )
    assert own == theirs[0]


@pytest.mark.parametrize("trim", ["message.content", "message.content | trim"])
def test_a_continued_message_is_left_open_as_transformers_leaves_it(trim: str) -> None:
    source = "{% for message in messages %}[{{ " + trim + " }}]{% endfor %}"
    own = ChatTemplate(source, {}).render(TALK, add_generation_prompt=False, continue_final_message=True)
    theirs, _ = render_jinja_template([TALK], None, None, source, continue_final_message=True)
    assert own == theirs[0]
    assert own.endswith("Bob." if "trim" in trim else "Bob. ")


def test_earlier_turns_lose_their_thinking() -> None:
    text = ChatTemplate(TEMPLATE, {}).render([*TALK, {"role": "user", "content": "And?"}])
    assert "Hm." not in text
    assert "Bob." in text


def test_a_template_that_refuses_gives_its_own_words() -> None:
    with pytest.raises(ChatTemplateError, match="no such role"):
        ChatTemplate(TEMPLATE, {}).render([{"role": "judge", "content": ""}])


@pytest.mark.parametrize("source", ["{{ messages[0].content.nothing.more }}", "{{ 1 / 0 }}", "{{ messages[0] + 1 }}"])
def test_a_template_that_fails_is_a_refusal_too(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="refuses"):
        ChatTemplate(source, {}).render(TALK)


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(ChatTemplateError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render(TALK)


def test_a_template_that_does_not_compile_says_where() -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_nothing_to_continue_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="last message"):
        ChatTemplate(TEMPLATE, {}).render([], continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="drops"):
        ChatTemplate("empty", {}).render(TALK, continue_final_message=True)
