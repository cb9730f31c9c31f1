"""A small model's tokens of a text in pieces equal those of the whole text."""

from __future__ import annotations

import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from actors.decoding.cross_vocab.retokenizer import AddedTokenMatcher, IncrementalRetokenizer
from actors.decoding.cross_vocab.tables import TokenizerAdapter
from actors.decoding.cross_vocab.translators import RetokenizingTranslator
from actors.decoding.hashing import prefix_hash
from actors.decoding.stream import Stream
from actors.text.tokenizer import RoleTokenizer
from tests.support.trained_models import KINDS, alignment, texts, tokenizer

STRANGE = (
    "It's  what we'll   say:\n\n\tdon't\r\n  ",
    "Größe, naïve café, 日本語のテキスト。 Привет, мир! ",
    "12 345,678.90 = 1e-7 ",
    "👩‍👩‍👧 e\u0301 ﬁ ①  \u00a0x\u200by ",
    "<|im_end|> </think> <0x41> ▁x ",
    "   \n \n  if x:\n        return 1\n",
)


def _draw(draw: random.Random) -> str:
    """A text of unusual pieces and of prose."""
    corpus = draw.choice(list(texts().values()))
    running = corpus.held_out + corpus.train
    start = draw.randrange(len(running) - 200)
    return "".join(draw.sample(STRANGE, 3)) + running[start : start + 150] + "".join(draw.sample(STRANGE, 2))


def _pieces(draw: random.Random, data: bytes) -> list[bytes]:
    """The bytes cut anywhere, in the middle of characters too."""
    cuts = sorted(draw.sample(range(1, len(data)), min(len(data) - 1, len(data) // 3)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind: str) -> None:
    adapter, draw = tokenizer(kind).adapter, random.Random(11)
    checks = longest = 0
    for _ in range(25):
        reading, ids, said = IncrementalRetokenizer(adapter), list[int](), b""
        for piece in _pieces(draw, _draw(draw).encode()):
            back, news = reading.push(0, piece)
            ids[len(ids) - back :] = news
            said += piece
            longest = max(longest, back)
            try:
                whole = said.decode()
            except UnicodeDecodeError:
                continue
            assert ids == adapter.encode(whole)[0], whole
            checks += 1
    assert checks > 1_000
    assert longest <= 12, "bytes come one by one here; by tokens of a target it is three"


@pytest.mark.parametrize("kind", KINDS)
def test_an_added_token_in_the_text_is_one_token_in_any_context(kind: str) -> None:
    """Like a tokenizer, which finds its added tokens before it splits anything."""
    adapter, draw = tokenizer(kind).adapter, random.Random(13)
    whole_texts = {"<think>": 100_001, "</think>": 100_002, "</thinking aloud>": 100_003}
    found = 0
    for _ in range(25):
        reading, ids = IncrementalRetokenizer(adapter, AddedTokenMatcher(whole_texts)), list[int]()
        parts = [
            part for piece in draw.sample(STRANGE, 3) for part in (piece, draw.choice([*whole_texts, "</thin", ".<"]))
        ]
        for piece in _pieces(draw, "".join(parts).encode()):
            back, news = reading.push(0, piece)
            ids[len(ids) - back :] = news
        expected = list[int]()
        for part in re.split("(<think>|</think>|</thinking aloud>)", "".join(parts)):
            found += part in whole_texts
            expected += [whole_texts[part]] if part in whole_texts else adapter.encode(part)[0]
        assert ids == expected
    assert found > 50


def test_no_token_crosses_the_end_of_an_added_token() -> None:
    pair = alignment("grouped", "single")
    reading = IncrementalRetokenizer(pair.role, AddedTokenMatcher({"</think>": 100_002}))
    reading.push(0, b"so</think")
    reading.push(pair.target.encode(">")[0][0], b">The")  # one token of the target spans it
    boundaries = reading.boundaries(pair.crossing_finder)
    assert boundaries is None or boundaries.first >= len(reading)


@pytest.mark.parametrize("role", [kind for kind in KINDS if kind != "bytes"])
def test_invalid_bytes_become_byte_tokens_and_a_hard_boundary(role: str) -> None:
    adapter = tokenizer(role).adapter
    reading, ids = IncrementalRetokenizer(adapter), list[int]()
    for piece in (b"a good \xe4", b"\xff day", b" and \xf0\x9f", b" night"):
        back, news = reading.push(0, piece)
        ids[len(ids) - back :] = news
    assert b"".join(adapter.texts[id_] or b"?" for id_ in ids) == b"a good \xe4\xff day and \xf0\x9f night"
    assert ids[-len(adapter.encode(" night")[0]) :] == adapter.encode(" night")[0]


def test_words_in_pieces_have_the_tokens_of_the_whole() -> None:
    """WordPiece has no spaces and no case: the bytes of its tokens differ from the text."""
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
    words.train_from_iterator([texts()["english"].train], trainer)
    adapter = RoleTokenizer(words, {}, {}).adapter
    said = "The value of 12 items isn't UNKNOWN (so far), is it?  No."
    reading, ids = IncrementalRetokenizer(adapter), list[int]()
    for at in range(0, len(said), 3):
        back, news = reading.push(0, said[at : at + 3].encode())
        ids[len(ids) - back :] = news
        assert ids == adapter.encode(said[: at + 3])[0]
    assert len(ids) > 12


def test_a_fork_does_not_change_the_retokenizer() -> None:
    adapter = tokenizer("single").adapter
    reading = IncrementalRetokenizer(adapter)
    reading.push(0, b"the num")
    fork = reading.fork()
    fork.push(0, b"ber 12")
    assert reading.push(0, b"bers") == IncrementalRetokenizer.push(_after(adapter, b"the num"), 0, b"bers")


def _after(adapter: TokenizerAdapter, data: bytes) -> IncrementalRetokenizer:
    reading = IncrementalRetokenizer(adapter)
    reading.push(0, data)
    return reading


@pytest.mark.parametrize(("target", "role"), [("grouped", "single"), ("pieces", "single"), ("single", "grouped")])
def test_a_stream_has_the_true_tokens_and_hashes_after_rollbacks(target: str, role: str) -> None:
    pair, draw = alignment(target, role), random.Random(5)
    stream = Stream(9, [1, 2, 3])
    reader, text = RetokenizingTranslator(pair, stream), _draw(draw)
    tokens = pair.target.encode(text)[0]
    for token in tokens:
        reader.append(token)
        running = 9
        for at, each in enumerate(stream.tokens):
            running = prefix_hash(running, each)
            assert stream.hash_before(at + 1) == running
    assert stream.tokens[3:] == pair.role.encode(_text(pair.target, tokens))[0]


@pytest.mark.parametrize(("target", "role"), [("grouped", "single"), ("pieces", "single"), ("bytes", "large")])
def test_what_is_read_ahead_is_what_is_read(target: str, role: str) -> None:
    pair, draw = alignment(target, role), random.Random(7)
    tokens = pair.target.encode(_draw(draw))[0]
    stream = Stream(1, [5])
    reader = RetokenizingTranslator(pair, stream)
    cut = 0
    for at, token in enumerate(tokens[:-4]):
        ahead = reader.translate_drafts(tokens[at : at + 4])
        assert reader.translate_drafts(()).boundaries_by_row[0] == ahead.boundaries_by_row[0]
        for rows, read in enumerate(ahead.ends[1:], 1):
            said = tokens[: at + rows]
            if _whole(pair.target, said):
                assert [*stream.tokens[1:], *ahead.tokens[:read]] == pair.role.encode(_text(pair.target, said))[0]
        cut += len(ahead.ends) < 5
        reader.append(token)
    assert cut < len(tokens) - 4, "some are read to their end"


def _text(adapter: TokenizerAdapter, tokens: list[int]) -> str:
    return b"".join(adapter.texts[token] or b"" for token in tokens).decode(errors="ignore")


def _whole(adapter: TokenizerAdapter, tokens: list[int]) -> bool:
    data = b"".join(adapter.texts[token] or b"" for token in tokens)
    return data.decode(errors="ignore").encode() == data
