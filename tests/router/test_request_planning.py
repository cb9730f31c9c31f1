import math
from typing import Any

import pytest
from tokenizers import decoders

from actors.api.generation import ROLES, Generate
from actors.config import ServiceConfig
from actors.decoding.hashing import derive_seed
from actors.text.tokenizer import RoleTokenizer
from router.backend import ApiError, BadRequest, NotFound
from router.request_planning import UNSTREAMED_INTERVAL_S, Plan, client_id, plan_chat, plan_completion
from router.schema import ChatRequest, CompletionRequest, parse
from tests.support.scripted_service import config, tokenizers
from tests.support.tokenizers import byte_level, role_tokenizer

TOKENIZERS = tokenizers()
HI = [{"role": "user", "content": "Hi"}]
DEFAULTS = {
    "sampling": {"temperature": 0.6, "top_p": 0.95, "stop_on_repeat": 10},
    "guidance": {"alpha": 1.0, "warmup_tokens": 100, "schedule": [[50, 0.5]]},
    "thinking": {"start": "<think>\n", "max_tokens": 90, "min_tokens": 5},
}


def chat(service: ServiceConfig | None = None, **body: Any) -> Plan:
    request = parse(ChatRequest, {"model": "duo", "messages": HI} | body)
    return plan_chat(request, service or config(), TOKENIZERS, "r")


def completion(service: ServiceConfig | None = None, **body: Any) -> Plan:
    request = parse(CompletionRequest, {"model": "duo", "prompt": "Hi"} | body)
    return plan_completion(request, service or config(), TOKENIZERS, "r")


def first(plan: Plan) -> Generate:
    return plan.sequences[0]


def test_a_request_overrides_the_defaults_field_by_field() -> None:
    body = {
        "temperature": 0,
        "guidance": {"warmup_tokens": 3},
        "thinking": {"max_tokens": None, "wait": "Hold on"},
    }
    sequence = first(chat(config(**DEFAULTS), **body))
    assert (sequence.sampling.temperature, sequence.sampling.top_p, sequence.sampling.stop_on_repeat) == (0, 0.95, 10)
    assert (sequence.guidance.alpha, sequence.guidance.warmup_tokens, sequence.guidance.schedule) == (
        1.0,
        3,
        ((50, 0.5),),
    )
    assert (sequence.thinking.start, sequence.thinking.max_tokens, sequence.thinking.min_tokens) == (
        "<think>\n",
        None,
        5,
    )
    assert sequence.thinking.wait == "Hold on"


def test_a_requested_alpha_replaces_the_schedule() -> None:
    assert first(chat(config(**DEFAULTS), guidance={"alpha": 0.7})).guidance.schedule == ()


def test_every_sampling_field_arrives() -> None:
    sequence = first(
        chat(
            top_k=-1,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=-0.2,
            logit_bias={"7": 1, "3": -100},
            min_tokens=2,
            max_completion_tokens=20,
            stop="END",
            stop_token_ids=[5],
            include_stop_str_in_output=True,
            ignore_eos=True,
            stop_on_repeat=4,
            skip_special_tokens=False,
        )
    ).sampling
    assert (sequence.top_k, sequence.min_p, sequence.repetition_penalty) == (0, 0.1, 1.1)
    assert (sequence.presence_penalty, sequence.frequency_penalty) == (0.2, -0.2)
    assert sequence.logit_bias == ((3, -100.0), (7, 1.0))
    assert (sequence.min_tokens, sequence.max_tokens, sequence.stop, sequence.stop_token_ids) == (2, 20, ("END",), (5,))
    assert (sequence.include_stop_str_in_output, sequence.ignore_eos, sequence.stop_on_repeat) == (True, True, 4)
    assert sequence.skip_special_tokens is False
    assert first(chat()).sampling.skip_special_tokens is True
    assert first(chat(stop=["a", "b"])).sampling.stop == ("a", "b")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guidance": {"alpha": math.inf}}, "guidance.alpha"),
        ({"guidance": {"alpha": math.nan}}, "guidance.alpha"),
        ({"guidance": {"alpha": 1e308}}, "guidance.alpha"),
        ({"guidance": {"warmup_tokens": -1}}, "guidance.warmup_tokens"),
        ({"guidance": {"schedule": [[5, 1], [2, 1]]}}, "guidance.schedule"),
        ({"thinking": {"min_tokens": -1}}, "thinking.min_tokens"),
        ({"speculation": {"drafts": 9}}, "speculation.drafts"),
        ({"speculation": {"drafts": -1}}, "speculation.drafts"),
        ({"speculation": {"drafter": "target"}}, "speculation.drafter"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**body)
    assert caught.value.param == param


def test_a_decoder_that_always_adds_spaces_cannot_omit_them() -> None:
    spaced = byte_level()
    spaced.decoder = decoders.WordPiece()
    request = parse(CompletionRequest, {"model": "duo", "prompt": "Hi", "spaces_between_special_tokens": False})
    assert plan_completion(request, config(), TOKENIZERS, "r").sequences
    with pytest.raises(BadRequest) as caught:
        plan_completion(request, config(), TOKENIZERS | {"target": role_tokenizer(spaced)}, "r")
    assert caught.value.param == "spaces_between_special_tokens"


def test_an_unknown_model_gets_the_list_of_served_ones() -> None:
    with pytest.raises(NotFound, match="duo, duo/target, duo/guider, duo/guider-base"):
        chat(model="gpt")


def test_each_choice_has_a_seed_and_an_id_of_its_own() -> None:
    plan = chat(n=3, seed=11)
    assert [sequence.seed for sequence in plan.sequences] == [derive_seed(11, index) for index in range(3)]
    assert len({sequence.request_id for sequence in plan.sequences + chat(n=3).sequences}) == 6


def test_an_answer_that_is_not_streamed_uses_few_messages() -> None:
    assert first(chat(stream=True)).interval_s == first(completion(stream=True)).interval_s == 0
    assert first(chat()).interval_s == first(completion()).interval_s == UNSTREAMED_INTERVAL_S


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert chat().seed != chat().seed
    assert 0 <= chat().seed < 2**53


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    plan = completion(prompt=["Ada", "Bob Eve"], n=2, seed=1)
    texts = [TOKENIZERS["target"].decode(sequence.prompts["target"]) for sequence in plan.sequences]
    assert texts == ["Ada", "Ada", "Bob Eve", "Bob Eve"]
    assert plan.prompt_tokens == sum(len(TOKENIZERS["target"].encode(text)) for text in ("Ada", "Bob Eve"))


def test_bad_words_are_encoded_once_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    spelled: list[str] = []
    encode = RoleTokenizer.encode_continuation

    def noting(tokenizer: RoleTokenizer, text: str) -> list[int]:
        spelled.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(RoleTokenizer, "encode_continuation", noting)
    completion(prompt=["Ada", "Bob", "Eve"], n=2, bad_words=["zebra"])
    assert [text for text in spelled if "zebra" in text] == ["zebra", " zebra"]


def test_more_answers_than_the_service_holds_are_refused() -> None:
    service = config(coordinator={"max_sessions": 2, "max_waiting": 1})
    assert len(chat(service, n=3).sequences) == 3
    with pytest.raises(BadRequest, match="holds 3"):
        chat(service, n=4)


def test_only_guidance_needs_all_three_roles() -> None:
    assert tuple(first(chat()).prompts) == ROLES
    assert tuple(first(chat(guidance={"alpha": 0})).prompts) == ("target",)


@pytest.mark.parametrize(("name", "role"), [("target", "target"), ("guider", "guider"), ("guider-base", "guider_base")])
def test_a_role_alone_is_not_guided(name: str, role: str) -> None:
    sequence = first(chat(config(**DEFAULTS), model=f"duo/{name}"))
    assert (sequence.primary, tuple(sequence.prompts)) == (role, (role,))
    assert sequence.guidance.never_guides()
    assert first(chat(model=f"duo/{name}", guidance={"alpha": 0, "explain": True})).explain
    for guidance in ({"alpha": 1}, {"schedule": [[0, 1]]}):
        with pytest.raises(ApiError, match="ask duo for guidance"):
            chat(model=f"duo/{name}", guidance=guidance)


def test_thinking_is_marked_in_a_completion_only_on_demand() -> None:
    service = config(**DEFAULTS)
    assert first(completion(service)).thinking.start == ""
    sequence = first(completion(service, thinking={"min_tokens": 7}))
    assert (sequence.thinking.start, sequence.thinking.min_tokens) == ("<think>\n", 7)
    assert TOKENIZERS["target"].decode(sequence.prompts["target"]) == "Hi<think>\n"


def test_a_continued_answer_opens_no_thinking() -> None:
    messages = [*HI, {"role": "assistant", "content": "It is"}]
    sequence = first(chat(config(**DEFAULTS), messages=messages, continue_final_message=True))
    assert sequence.thinking.start == ""
    assert TOKENIZERS["target"].decode(sequence.prompts["target"]).endswith("assistant\nIt is")


def test_completions_default_to_16_tokens_and_chats_to_the_context() -> None:
    assert first(completion()).sampling.max_tokens == 16
    sequence = first(chat())
    left = {role: (TOKENIZERS[role].max_position or 0) - len(sequence.prompts[role]) for role in ROLES}
    assert sequence.sampling.max_tokens == min(left.values())
    assert first(completion(config(sampling={"max_tokens": 20}))).sampling.max_tokens == 20


@pytest.mark.parametrize(
    ("body", "drafts", "drafter"),
    [
        ({}, None, "auto"),
        ({"speculation": None}, None, "auto"),
        ({"speculation": {"drafts": None, "drafter": None}}, None, "auto"),
        ({"speculation": {"drafts": 0}}, 0, "auto"),
        ({"speculation": {"drafts": 8, "drafter": "guider"}}, 8, "guider"),
    ],
)
def test_a_request_overrides_speculation(body: dict[str, Any], drafts: int | None, drafter: str) -> None:
    for sequence in (*chat(n=2, **body).sequences, *completion(**body).sequences):
        assert (sequence.drafts, sequence.drafter) == (drafts, drafter)


def test_one_authorization_header_is_one_client_for_any_user() -> None:
    key = client_id(None, "Bearer secret", "ada")
    assert key == client_id(None, "Bearer secret", None) != client_id(None, "Bearer other", "ada")
    assert "secret" not in key
    assert client_id(None, None, "ada") != client_id(None, None, "eve")
    assert client_id(None, None, key) != key  # no client can claim the identity of another
    assert client_id(None, "", None) == client_id(None, None, "") == ""


def test_the_name_of_a_verified_key_is_the_client() -> None:
    named = client_id("ada", "Bearer one", "x")
    assert named == client_id("ada", "Bearer another", None) != client_id("eve", "Bearer one", "x")
    assert named not in (
        client_id(None, "Bearer one", None),
        client_id(None, None, "ada"),
        client_id(None, None, named),
    )


def test_every_sequence_carries_the_client() -> None:
    plan = chat(n=3).for_client("ada")
    assert [sequence.client for sequence in plan.sequences] == ["ada"] * 3


CLOSED = "{{ messages[0].content }}{{ '<think></think>' if enable_thinking is defined else '' }}"


def closed(**more: Any) -> Generate:
    """The sequence of a chat whose templates state that there is no thinking."""
    own = {**TOKENIZERS, "target": role_tokenizer(template=CLOSED), "guider": role_tokenizer(template=CLOSED)}
    body = {"model": "duo", "messages": HI, "chat_template_kwargs": {"enable_thinking": False}}
    return first(plan_chat(parse(ChatRequest, body | more), config(**DEFAULTS), own, "r"))


def test_an_answer_after_closed_thinking_begins_with_content() -> None:
    sequence = closed()
    assert (sequence.thinking.start, set(sequence.prompts)) == ("", set(ROLES))
    assert TOKENIZERS["target"].decode(sequence.prompts["target"]) == "Hi<think></think>"


def test_guidance_of_the_thinking_alone_is_off_after_closed_thinking() -> None:
    sequence = closed(guidance={"guide": "thinking"})
    assert sequence.guidance.never_guides()
    assert set(sequence.prompts) == {"target"}


@pytest.mark.parametrize("prompt", ["Hi<think>\n", TOKENIZERS["target"].encode("Hi<think>\n")], ids=["text", "ids"])
def test_a_raw_prompt_that_opens_the_thinking_is_left_as_it_is(prompt: Any) -> None:
    plan = completion(config(**DEFAULTS), prompt=prompt, thinking={"max_tokens": 9, "min_tokens": 0}, echo=True)
    assert TOKENIZERS["target"].decode(plan.sequences[0].prompts["target"]) == "Hi<think>\n"
    assert (plan.sequences[0].thinking.start, plan.echo) == ("<think>\n", ["Hi<think>\n"])


def test_each_raw_prompt_has_its_own_state_of_thinking() -> None:
    prompts = ["Hi", "Hi<think></think>"]
    plan = completion(config(**DEFAULTS), prompt=prompts, thinking={"max_tokens": 9, "min_tokens": 0}, echo=True)
    assert [sequence.thinking.start for sequence in plan.sequences] == ["<think>\n", ""]
    assert plan.echo == ["Hi<think>\n", "Hi<think></think>"]


def test_a_continued_thought_stays_thinking() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nSo"}]
    sequence = first(chat(config(**DEFAULTS), messages=messages, continue_final_message=True))
    assert sequence.thinking.start == "<think>\n"
    assert TOKENIZERS["target"].decode(sequence.prompts["target"]).endswith("<think>\nSo")


# -- how much thinking

EFFORTS = {"brief": {"thinking_tokens": 20, "alpha": 0.5}, "tiny": {"thinking_tokens": 2}, "free": {}}


def effortful(effort: str | None, **body: Any) -> Generate:
    """The sequence of a chat with this effort, in a service with EFFORTS."""
    return first(chat(config(**DEFAULTS, reasoning_effort=EFFORTS), reasoning_effort=effort, **body))


def limits(sequence: Generate) -> tuple[int | None, float]:
    return sequence.thinking.max_tokens, sequence.guidance.alpha


def test_an_effort_sets_the_limit_of_the_thinking_and_alpha() -> None:
    sequence = effortful("brief")
    assert limits(sequence) == (20, 0.5)
    assert (sequence.guidance.warmup_tokens, sequence.guidance.schedule) == (100, ())


def test_an_effort_leaves_what_it_does_not_set() -> None:
    assert limits(effortful("free")) == limits(effortful(None)) == (90, 1.0)
    assert effortful("free").guidance.schedule == ((50, 0.5),)


def test_the_minimum_of_the_thinking_wins_over_a_lower_limit_of_an_effort() -> None:
    assert effortful("tiny").thinking.max_tokens == 5
    assert effortful("tiny", thinking={"min_tokens": 7}).thinking.max_tokens == 7


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"guidance": {"alpha": 2}}, (20, 2.0)),
        ({"thinking": {"max_tokens": 30}}, (30, 0.5)),
        ({"thinking": {"max_tokens": None}}, (None, 0.5)),
        ({"thinking_token_budget": 40}, (40, 0.5)),
        ({"thinking_token_budget": -1}, (None, 0.5)),
    ],
)
def test_the_requests_own_fields_win_over_its_effort(body: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert limits(effortful("brief", **body)) == expected


def test_a_requested_schedule_begins_with_the_alpha_of_its_effort() -> None:
    guidance = effortful("brief", guidance={"schedule": [[9, 2]]}).guidance
    assert [guidance.alpha_at(tokens) for tokens in (100, 9)] == [2.0, 0.0]  # the warm-up stays
    assert (guidance.alpha, guidance.schedule) == (0.5, ((9, 2.0),))


def test_no_effort_is_the_target_alone_without_thinking() -> None:
    sequence = effortful("none")
    assert (sequence.thinking.start, sequence.guidance.alpha, set(sequence.prompts)) == ("", 0.0, {"target"})


@pytest.mark.parametrize("body", [{"thinking_token_budget": 9}, {"thinking": {"max_tokens": 9}}])
def test_a_limit_of_the_thinking_wins_over_no_effort(body: dict[str, Any]) -> None:
    sequence = effortful("none", **body)
    assert (sequence.thinking.start, sequence.thinking.max_tokens) == ("<think>\n", 9)


def test_a_budget_of_zero_wins_over_an_effort() -> None:
    assert effortful("brief", thinking_token_budget=0).thinking.start == ""


def test_an_effort_guides_no_single_model() -> None:
    assert limits(effortful("brief", model="duo/target")) == (20, 0.0)


def test_an_unknown_effort_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadRequest) as raised:
        effortful("high")
    assert raised.value.message == "reasoning_effort: 'high' is none of none, brief, tiny, free"
    assert raised.value.param == "reasoning_effort"


VARIABLES = "{{ reasoning_effort | default(false) }} {{ enable_thinking | default(false) }}"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "False False"),
        ({"reasoning_effort": "low"}, "low True"),
        ({"reasoning_effort": "none"}, "none False"),
        ({"reasoning_effort": "none", "thinking_token_budget": 5}, "none True"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "high True"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "low False"),
        ({"thinking_token_budget": 0}, "False False"),
    ],
)
def test_templates_read_the_effort_and_whether_to_think(body: dict[str, Any], text: str) -> None:
    own = dict.fromkeys(ROLES, role_tokenizer(template=VARIABLES))
    request = parse(ChatRequest, {"messages": HI} | body)
    sequence = first(plan_chat(request, config(), own, "r"))
    assert own["target"].decode(sequence.prompts["target"]) == text


@pytest.mark.parametrize("prompt", ["Hi<think>\n", TOKENIZERS["target"].encode("Hi<think>\n")], ids=["text", "ids"])
def test_a_budget_of_zero_closes_the_thinking_of_raw_text(prompt: Any) -> None:
    plan = completion(prompt=prompt, thinking={"start": "<think>\n"}, thinking_token_budget=0, echo=True)
    assert (plan.sequences[0].thinking.start, plan.echo) == ("", ["Hi<think>\n</think>"])
    assert completion(prompt="Hi", thinking={"start": "<think>"}, thinking_token_budget=0, echo=True).echo == ["Hi"]


def test_raw_text_has_a_budget_only_with_thinking() -> None:
    with pytest.raises(BadRequest, match=r"thinking\.start"):
        completion(thinking_token_budget=5)
    for nothing in (0, -1):
        assert first(completion(thinking_token_budget=nothing)).thinking.start == ""
    assert first(completion(thinking={"start": "<think>"}, thinking_token_budget=5)).thinking.max_tokens == 5


def test_a_budget_is_given_once() -> None:
    with pytest.raises(BadRequest, match="send one"):
        chat(thinking={"max_tokens": 5}, thinking_token_budget=5)
