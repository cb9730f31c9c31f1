"""Tokens that would complete a text after the text so far."""

from __future__ import annotations

import random

import pytest

from actors.decoding.closing_tokens import ClosingTokens

TOKENS = [
    b"<",
    b"/",
    b"think",
    b">",
    b">\n",
    b"</",
    b"</think",
    b"</think>",
    b" </think>x",
    b"nk>",
    b"a",
    b"\xe2",
    b"\x97",
    b"\x81",
]


def closing(text: str) -> ClosingTokens:
    last = text.encode()[-1]
    return ClosingTokens(text, [i for i, data in enumerate(TOKENS) if last in data], TOKENS.__getitem__)


@pytest.mark.parametrize(
    ("tail", "completing"),
    [
        (b"", {b"</think>", b" </think>x"}),
        (b"a</think", {b"</think>", b" </think>x", b">", b">\n"}),
        (b"</thi", {b"</think>", b" </think>x", b"nk>"}),
        (b"think", {b"</think>", b" </think>x"}),
    ],
)
def test_all_tokens_that_complete_the_text_are_found(tail: bytes, completing: set[bytes]) -> None:
    assert {TOKENS[i] for i in closing("</think>").after(tail)} == completing


def test_a_character_may_be_split_between_tokens() -> None:
    ids = [TOKENS.index(data) for data in (b"\xe2", b"\x97")]
    tail = b""
    for id_ in ids:
        tail = closing("◁").extend(tail, id_)
    assert {TOKENS[i] for i in closing("◁").after(tail)} == {b"\x81"}


@pytest.mark.parametrize("text", ["</think>", "aa", "<a<a>", ">"])
def test_a_text_without_banned_tokens_never_holds_the_end(text: str) -> None:
    rng = random.Random(3)
    found = closing(text)
    for _ in range(200):
        tail, whole = b"", b""
        for _ in range(40):
            id_ = rng.choice([i for i in range(len(TOKENS)) if i not in found.after(tail)])
            tail, whole = found.extend(tail, id_), whole + TOKENS[id_]
        assert text.encode() not in whole
