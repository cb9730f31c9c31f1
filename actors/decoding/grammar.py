"""Grammars of answers: which tokens may come next. llguidance computes them, from JSON schemas, regexes and Lark.

A grammar is a text in llguidance's own form, which `grammar_text` makes of what a request asks for. Only texts that
`actors.grammar_checker` has compiled before may reach a coordinator: some grammars end the process that compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import (
    fill_next_token_bitmask,
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)
from numpy.typing import NDArray

T = TypeVar("T")
_KEPT = 8  # compiled grammars of a vocabulary; one may take 100 MB
_IN_WORDS = {"NoExtensionBias": "nothing satisfies it"}
# Work that one token may take, in llguidance's units. A grammar that needs more ends in an error. The time of ambiguous
# grammars grows with the square of the items in a row: with a vocabulary of 150,000 tokens 2,000 of them take 1 s of a
# CPU, 1,000 take 0.03 s. An object has about 4 items for each property that may come next.
LIMITS = LLParserLimits(
    max_items_in_row=1_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=5_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar is wrong, or was given up. The message is a sentence that clients may read."""


class GrammarVocabulary:
    """The tokens of one vocabulary, as grammars read them. Building it takes seconds for a large vocabulary.

    tokens: by id the bytes that a token adds to a text. special: ids that no text may become; a grammar allows them
    only where it names one, and at its end. ends: ids that end an answer. choosable: ids that decoding may choose, of
    the ends the first. encode: the ids of bytes, which must not raise.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Collection[int],
        ends: Sequence[int],
        choosable: Collection[int],
        encode: Callable[[bytes], Sequence[int]],
    ) -> None:
        if not ends:  # llguidance wants one: an id beyond the vocabulary, which nothing may choose
            tokens, special, ends = [*tokens, b""], [*special, len(tokens)], [len(tokens)]
        source = _TokenSource(tokens, special, ends, encode)
        self._tokenizer = LLTokenizer(TokenizerWrapper(source), n_vocab=len(tokens), eos_token=list(ends))
        self._compiled = lru_cache(_KEPT)(self._compile)
        self.end = ends[0]
        self.choosable = _bits(len(tokens), choosable)  # one bit for each id that decoding may choose

    def matcher(self, grammar: str) -> GrammarMatcher:
        """A matcher at the beginning of a grammar. Raises GrammarError if it cannot be compiled."""
        return GrammarMatcher(self._compiled(grammar).deep_copy(), self)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special ones among them."""
        ids: list[int] = self._tokenizer.greedy_tokenize(text)
        return ids

    def _compile(self, grammar: str) -> LLMatcher:
        try:
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        except BaseException as error:  # a panic of Rust, or a text that is no UTF-8
            raise GrammarError(str(error) if isinstance(error, ValueError) else _panic(error)) from error
        if compiled.is_error():
            raise GrammarError(first_line(compiled.get_error()))
        return compiled


class _TokenSource:
    """Our tokenizer in the form that llguidance calls."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Collection[int],
        ends: Sequence[int],
        encode: Callable[[bytes], Sequence[int]],
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = list(tokens), sorted(special), ends[0]
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return list(self._encode(text))


class GrammarMatcher:
    """The state of one answer in its grammar.

    llguidance's matcher never raises when a grammar becomes too complex: it stops, and says so if it is asked. error: a
    sentence for the client once the grammar was given up, else "".
    """

    __slots__ = ("_drafts", "_masks", "_matcher", "_vocabulary", "error")

    def __init__(self, matcher: LLMatcher, vocabulary: GrammarVocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        # Masks of the next token and of those behind drafts, as far as they are computed.
        self._masks: list[NDArray[np.int32]] = []
        self._drafts: list[int] = []
        self.error = ""

    @property
    def masks(self) -> int:
        """Number of masks that are computed: of the next token, and of those behind drafts."""
        return len(self._masks)

    def legal(self, ahead: int = 0) -> NDArray[np.int32]:
        """One bit for each id, as int32 words: set if the id may come next, or behind `ahead` of the known drafts.

        The first end id stands for all. No bit is set once the grammar was given up.
        """
        if not self._masks:
            fill_masks([(self, ())])
        return self._masks[ahead]

    def few(self, most: int) -> list[int]:
        """The ids that may come next if there are at most so many, else none."""
        words = self.legal()
        if int(np.bitwise_count(words.view(np.uint32)).sum()) > most:
            return []
        at = np.flatnonzero(words)
        bits = words[at, None] >> np.arange(32, dtype=np.int32) & 1
        ids: list[int] = ((at[:, None] << 5) + np.arange(32))[bits == 1].tolist()
        return ids

    def take(self, token: int) -> None:
        """Go on by a token. Raises GrammarError if it is not legal, or if the grammar is given up."""
        if self._drafts and self._drafts[0] == token:
            del self._masks[0], self._drafts[0]
        else:
            self._masks, self._drafts = [], []
        self._ask(self._matcher.consume_token, token)
        self._note_error()
        if self.error:
            raise GrammarError(self.error)

    def take_text(self, text: str) -> None:
        """Go on by a text that is part of a token. Raises GrammarError if it is not legal."""
        for token in self._vocabulary.encode(text):
            self.take(token)

    def drafts(self, most: int) -> list[int]:
        """At most so many tokens that spell the only text that may come next, as the tokenizer would; often none."""
        forced = self._ask(self._matcher.compute_ff_tokens) if most > 0 else None
        return (forced or [])[:most]

    def legal_length(self, tokens: Sequence[int]) -> int:
        """Number of these tokens, from the first one on, that are legal one after another."""
        return max(0, self._ask(self._matcher.validate_tokens, list(tokens)) or 0)

    @property
    def over(self) -> bool:
        """True if nothing but the end of the answer may follow."""
        return bool(self._matcher.is_stopped())

    def _keep(self, masks: NDArray[np.int32], drafts: Sequence[int]) -> None:
        self._note_error()
        if self.error:
            masks, drafts = np.zeros_like(masks[:1]), ()
        self._masks, self._drafts = list(masks), list(drafts)

    def _ask(self, call: Callable[..., T], *given: object) -> T | None:
        """Call llguidance. If it panics, the matcher is given up, and the answer is None."""
        try:
            return call(*given)
        except BaseException as error:
            self.error = self.error or _panic(error)
            return None

    def _note_error(self) -> None:
        if not self.error and self._matcher.is_error():
            error = first_line(self._matcher.get_error())
            self.error = f"the grammar was given up: {_IN_WORDS.get(error, error)}"


def fill_masks(wanted: Sequence[tuple[GrammarMatcher, Sequence[int]]]) -> None:
    """Compute the masks of matchers of one vocabulary, each with legal drafts: of its next token and behind each draft.

    wanted is not empty. They are computed on all cores, and kept until the matchers go on by another token than the
    draft.
    """
    firsts = np.cumsum([0, *(len(drafts) + 1 for _, drafts in wanted)])
    choosable = wanted[0][0]._vocabulary.choosable
    masks = np.empty((int(firsts[-1]), len(choosable)), np.int32)
    given = [(each._matcher, first, list(drafts)) for (each, drafts), first in zip(wanted, firsts.tolist())]  # noqa: B905
    plain = [(matcher, first) for matcher, first, drafts in given if not drafts]
    try:
        if len(given) == len(plain) == 1:
            fill_next_token_bitmask(plain[0][0], masks)  # in this thread: a process that has forked has no others
        elif plain:
            fill_next_token_bitmask_par(_executor(), plain, masks)
        if len(plain) < len(given):
            fill_next_token_bitmask_par_with_draft_tokens(_executor(), [each for each in given if each[2]], masks)
    except BaseException as error:
        panic = _panic(error)
        if len(wanted) > 1:  # find the matcher that did it
            for one in wanted:
                fill_masks([one])
            return
        wanted[0][0].error = panic
    masks &= choosable
    for number, (each, drafts) in enumerate(wanted):
        each._keep(masks[firsts[number] : firsts[number + 1]], drafts)


def _panic(error: BaseException) -> str:
    """The sentence for a panic of Rust, a BaseException of no public class. Raises any other error again."""
    if isinstance(error, Exception | KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    return f"the grammar was given up: {first_line(str(error))}"


@lru_cache
def _executor() -> LLExecutor:
    return LLExecutor()


def _bits(width: int, ids: Collection[int]) -> NDArray[np.int32]:
    """One bit for each id, as int32 words."""
    chosen = np.zeros(-(-width // 32) * 32, np.uint8)
    chosen[list(ids)] = 1
    return np.packbits(chosen, bitorder="little").view("<i4")


def first_line(error: str) -> str:
    """The part of an error of llguidance that says what is wrong, without its trace."""
    first, *rest = error.splitlines() or [""]
    cause = next((line.removeprefix("error:") for line in rest if line.startswith("error:")), "")  # of a regex
    return first.strip() + cause.rstrip()
