"""Log-probabilities in response bodies, in the form of OpenAI's API and of vLLM."""

from __future__ import annotations

import copy
from math import log
from typing import Any

import pytest

from actors.api.generation import PromptNote, Scores, TokenNote
from router.logprobs import MIN_LOGPROB, TextOffsets, TokenFormatter
from tests.router.test_api import CHAT, TEXT, events, post
from tests.support.scripted_service import ScriptedBackend
from tests.support.tokenizers import byte_level, role_tokenizer, sentence_piece

TOKENIZER = role_tokenizer()
(A,), (E,) = TOKENIZER.encode("a"), TOKENIZER.encode("e")
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


def note(id_: int, logprob: float, *guided: tuple[int, float]) -> TokenNote:
    return TokenNote(id_, TOKENIZER.decode([id_]), 1.0, False, scores=Scores(logprob, 0.0, guided))


def offsets() -> TextOffsets:
    return TextOffsets(TOKENIZER)


def test_a_chat_token_lists_only_its_top_candidates() -> None:
    content = TokenFormatter(TOKENIZER).chat([note(A, log(0.25), (E, log(0.5)), (A, log(0.25)))], 1)["content"]
    assert content == [
        {
            "token": "a",
            "logprob": log(0.25),
            "bytes": [97],
            "top_logprobs": [{"token": "e", "logprob": log(0.5), "bytes": [101]}],
        }
    ]


def test_a_completion_token_is_listed_beside_its_top_candidates() -> None:
    notes = [note(A, log(0.25), (E, log(0.5)), (A, log(0.25))), note(E, log(0.5), (E, log(0.5)))]
    counted = offsets()
    for _ in range(5):
        counted.next(note(A, 0.0))
    assert TokenFormatter(TOKENIZER).completion(notes, 1, counted) == {
        "tokens": ["a", "e"],
        "token_logprobs": [log(0.25), log(0.5)],
        "top_logprobs": [{"a": log(0.25), "e": log(0.5)}, {"e": log(0.5)}],
        "text_offset": [5, 6],
    }


def test_tokens_can_be_named_by_their_ids() -> None:
    tokens = TokenFormatter(TOKENIZER, as_ids=True)
    entry = tokens.chat([note(A, log(0.5), (A, log(0.5)))], 1)["content"][0]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["token"]) == (
        f"token_id:{A}",
        [97],
        f"token_id:{A}",
    )
    assert tokens.completion([note(A, 0.0)], 0, offsets())["top_logprobs"] == [{f"token_id:{A}": 0.0}]


def test_a_forced_token_has_log_probability_zero() -> None:
    forced = TokenNote(A, "a", 1.0, False)
    assert TokenFormatter(TOKENIZER).chat([forced], 3)["content"][0]["logprob"] == 0.0
    assert TokenFormatter(TOKENIZER).chat([forced], 3)["content"][0]["top_logprobs"] == []
    assert TokenFormatter(TOKENIZER).completion([forced], 3, offsets())["top_logprobs"] == [{"a": 0.0}]


def test_minus_infinity_becomes_a_json_number() -> None:
    assert TokenFormatter(TOKENIZER).completion([note(A, -float("inf"))], 0, offsets())["token_logprobs"] == [
        MIN_LOGPROB
    ]


def test_token_bytes_join_to_the_text_in_every_kind_of_vocabulary() -> None:
    for tokenizer in (TOKENIZER, role_tokenizer(sentence_piece())):
        text = " is 漢字 ü"
        ids = tokenizer.encode(text)
        content = TokenFormatter(tokenizer).chat([note(id_, -1.0) for id_ in ids], 0)["content"]
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode().strip() == text.strip()


async def test_log_probabilities_are_returned_on_request() -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "n": 2}
    choices = (await post(ScriptedBackend(), CHAT_URL, CHAT | fields)).json()["choices"]
    for choice in choices:
        assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2, 2, 0, 2]
    plain = (await post(ScriptedBackend(), CHAT_URL, CHAT)).json()["choices"][0]
    assert plain["logprobs"] is None
    bare = (await post(ScriptedBackend(), CHAT_URL, CHAT | {"logprobs": True})).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert [entry["top_logprobs"] for entry in bare] == [[]] * 4
    assert bare[1]["logprob"] == 2 * -log(2)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_URL, CHAT | {"logprobs": True, "top_logprobs": 3}),
        (TEXT_URL, TEXT | {"logprobs": 3}),
        (TEXT_URL, TEXT | {"logprobs": 2, "echo": True}),
    ],
)
async def test_a_stream_has_the_log_probabilities_of_the_whole_answer(path: str, body: dict[str, Any]) -> None:
    whole = (await post(ScriptedBackend(), path, body | {"n": 2})).json()["choices"]
    texts, found = ["", ""], [dict[str, list[Any]](), dict[str, list[Any]]()]
    for chunk in events(await post(ScriptedBackend(), path, body | {"n": 2, "stream": True})):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            for name, values in (choice["logprobs"] or {}).items():
                found[choice["index"]].setdefault(name, []).extend(values)
    assert texts == [choice["text"] if "text" in choice else choice["message"]["content"] for choice in whole]
    assert found == [choice["logprobs"] for choice in whole]
    assert found[0]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT_URL, CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT_URL, CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT_URL, CHAT | {"logprobs": 2}, "logprobs"),
        (TEXT_URL, TEXT | {"logprobs": 21}, "logprobs"),
        (TEXT_URL, TEXT | {"logprobs": -1}, "logprobs"),
        (TEXT_URL, TEXT | {"logprobs": "many"}, "logprobs"),
        (TEXT_URL, TEXT | {"top_logprobs": 2}, "top_logprobs"),
        (TEXT_URL, TEXT | {"max_tokens": 0}, "max_tokens"),
        (CHAT_URL, CHAT | {"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
        (TEXT_URL, TEXT | {"max_tokens": 0, "echo": True, "min_tokens": 2}, "min_tokens"),
        (CHAT_URL, CHAT | {"echo": True}, "echo"),
        (TEXT_URL, TEXT | {"prompt_logprobs": 21}, "prompt_logprobs"),
        (TEXT_URL, TEXT | {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
async def test_invalid_log_probability_requests_are_refused_by_name(
    path: str, body: dict[str, Any], param: str
) -> None:
    response = await post(ScriptedBackend(), path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# -- prompts


async def choice_of(**more: Any) -> dict[str, Any]:
    response = await post(ScriptedBackend(), TEXT_URL, TEXT | more)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def test_an_echo_precedes_the_answer() -> None:
    assert (await choice_of(echo=True))["text"] == "HiIt is Eve ."
    ids = TOKENIZER.encode("Hi")
    assert (await choice_of(echo=True, prompt=ids))["text"] == "HiIt is Eve ."
    both = (await post(ScriptedBackend(), TEXT_URL, TEXT | {"prompt": ["Hi", "Ho"], "n": 2, "echo": True})).json()[
        "choices"
    ]
    assert [choice["text"][:2] for choice in both] == ["Hi", "Hi", "Ho", "Ho"]


async def test_an_echo_includes_the_prompts_log_probabilities() -> None:
    logprobs = (await choice_of(echo=True, logprobs=1))["logprobs"]
    assert logprobs["tokens"][:2] == ["H", "i"]
    assert logprobs["token_logprobs"][:2] == [None, -2.0]
    assert logprobs["top_logprobs"][0] is None
    assert sorted(logprobs["top_logprobs"][1].values()) == [-2.0, -1.0]
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert len(logprobs["tokens"]) == 6


async def test_a_prompt_alone_can_be_scored() -> None:
    for fields in ({"logprobs": 1}, {}):
        response = await post(ScriptedBackend(), TEXT_URL, TEXT | {"echo": True, "max_tokens": 0} | fields)
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
        assert response.json()["usage"]["completion_tokens"] == 0
    assert choice["logprobs"] is None


async def test_prompt_logprobs_have_vllms_form() -> None:
    _, second = TOKENIZER.encode("Hi")
    expected = {
        str(second): {"logprob": -2.0, "rank": 2, "decoded_token": "i"},
        str(second + 1): {"logprob": -1.0, "rank": 1, "decoded_token": TOKENIZER.decode([second + 1])},
    }
    choice = await choice_of(prompt_logprobs=1)
    assert choice["prompt_logprobs"] == [None, expected]
    assert choice["logprobs"] is None
    assert (await choice_of(prompt_logprobs=0))["prompt_logprobs"] == [None, {str(second): expected[str(second)]}]
    body = (await post(ScriptedBackend(), CHAT_URL, CHAT | {"prompt_logprobs": 1})).json()
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"][1]) == 2
    assert (await post(ScriptedBackend(), CHAT_URL, CHAT)).json()["prompt_logprobs"] is None


@pytest.mark.parametrize("build", [None, sentence_piece], ids=["byte-level", "sentence-piece"])
@pytest.mark.parametrize("text", ["你好 a", "naïve 👩‍👧 b", " two  spaces", "a<|end|>b"])
def test_offsets_are_places_in_the_text_also_within_characters(build: Any, text: str) -> None:
    tokenizer = role_tokenizer(build()) if build else TOKENIZER
    ids = tokenizer.encode(text)
    stream, counted = tokenizer.stream(), TextOffsets(tokenizer)
    pieces = [stream.push(id_) for id_ in ids]
    found = [counted.next(TokenNote(id_, piece, 1.0, False)) for id_, piece in zip(ids, pieces, strict=True)]
    assert found == [len("".join(pieces[:i])) for i in range(len(ids))]
    assert found[-1] <= len(tokenizer.decode(ids))


def test_offsets_of_an_echo_count_the_prompts_text_without_its_bos() -> None:
    tokenizer = role_tokenizer(byte_level(bos="<s>"))
    ids = tokenizer.encode("你a", special=True)
    raw, given = TextOffsets(tokenizer, "你a"), TextOffsets(tokenizer, "<s>你a")
    assert [raw.next(PromptNote(id_, None)) for id_ in ids] == [0, 0, 0, 0, 1]
    assert [given.next(PromptNote(id_, None)) for id_ in ids] == [0, 3, 3, 3, 4]


def test_offsets_of_an_echo_do_not_count_an_end_token_after_the_prompt() -> None:
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.trailing_ids = tokenizer.eos_ids[:1]
    counted = TextOffsets(tokenizer, "Hi")
    prompt = [counted.next(PromptNote(id_, None)) for id_ in (*tokenizer.encode("Hi"), *tokenizer.trailing_ids)]
    assert [prompt[-1], counted.next(TokenNote(3, "!", 1.0, False))] == [2, 2]


async def test_offsets_go_on_through_a_stream() -> None:
    body = TEXT | {"logprobs": 1, "echo": True, "stream": True}
    streamed = [event["choices"][0] for event in events(await post(ScriptedBackend(), TEXT_URL, body))]
    offsets = [offset for choice in streamed if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert offsets == (await choice_of(logprobs=1, echo=True))["logprobs"]["text_offset"]
    assert offsets[:4] == [0, 1, 2, 4]
