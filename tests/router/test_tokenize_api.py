"""/tokenize and /detokenize over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.scripted_service import ScriptedBackend, client, config, tokenizers

HI = [{"role": "user", "content": "Hi"}]
TARGET = tokenizers()["target"]


async def post(path: str, body: Any, **service: Any) -> httpx.Response:
    async with client(ScriptedBackend(), config(**service)) as http:
        return await http.post(path, json=body)


async def test_detokenize_inverts_tokenize() -> None:
    body = (await post("/tokenize", {"prompt": "Who is Ada?<|end|>", "return_token_strs": True})).json()
    assert body["tokens"] == TARGET.encode("Who is Ada?<|end|>", special=True)
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 300)
    assert "".join(body["token_strs"]).replace("Ġ", " ") == "Who is Ada?<|end|>"
    assert (await post("/detokenize", {"tokens": body["tokens"]})).json() == {"prompt": "Who is Ada?<|end|>"}


async def test_tokenize_counts_a_chat_as_it_is_answered() -> None:
    for more in ({}, {"continue_final_message": True}, {"add_generation_prompt": False}):
        thinking = {"start": "<think>\n"}
        tokenized = (await post("/tokenize", {"messages": HI} | more, thinking=thinking)).json()
        request = {"model": "duo", "messages": HI, "return_token_ids": True} | more
        answer = (await post("/v1/chat/completions", request, thinking=thinking)).json()
        assert tokenized["tokens"] == answer["prompt_token_ids"]
        assert tokenized["count"] == answer["usage"]["prompt_tokens"]
        assert tokenized["token_strs"] is None


async def test_each_model_has_its_own_tokens_and_length() -> None:
    whole, guider = [(await post("/tokenize", {"messages": HI, "model": m})).json() for m in ("duo", "duo/guider")]
    assert whole["tokens"] != guider["tokens"]
    assert guider["max_model_len"] == 400


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/tokenize", {"messages": HI, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"messages": HI, "chat_template_kwargs": {"self": 1}}, 400, "chat_template_kwargs"),
        ("/detokenize", {"tokens": [TARGET.width]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "1"}, 400, "tokens"),
    ],
)
async def test_an_error_names_the_field(path: str, body: Any, status: int, param: str) -> None:
    response = await post(path, body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
