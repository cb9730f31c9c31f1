"""Maps between the roles' vocabularies, built once from their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from actors.api.generation import Role
from actors.api.sampling_params import Thinking
from actors.decoding.closing_tokens import ClosingTokens
from actors.decoding.cross_vocab.translators import Alignment
from actors.decoding.grammar import GrammarVocabulary
from actors.decoding.session import ForcedTextIds, SessionVocabulary
from actors.decoding.vocabulary import (
    NO_REQUIRED_LOGITS,
    RequiredLogits,
    Vocabulary,
    VocabularyError,
    VocabularyMap,
    map_vocabulary,
    marker_fold,
    required_logits,
    self_map,
)
from actors.text.alignment_cache import align
from actors.text.tokenizer import RoleTokenizer


def vocabulary_of(tokenizer: RoleTokenizer) -> Vocabulary:
    """The tokens of a tokenizer."""
    return Vocabulary(tokenizer.text_tokens, tokenizer.added_tokens, tokenizer.eos_ids, tokenizer.width)


def small_maps(tokenizers: Mapping[Role, RoleTokenizer]) -> dict[Role, VocabularyMap | Alignment]:
    """By small role its map from the target: one to one, or alignments for all. Raises UnsupportedTokenizer."""
    target, small = tokenizers["target"], [role for role in tokenizers if role != "target"]
    try:
        ours = vocabulary_of(target)
        return {
            role: map_vocabulary(ours, vocabulary_of(tokenizers[role]), tokenizers[role].encode_continuation)
            for role in small
        }
    except VocabularyError:
        return {role: align(target, tokenizers[role]) for role in small}


class VocabularyRegistry:
    """Maps between roles, and the ids of texts that decoding may force.

    If the text tokens of the target and the small models differ, both small models are aligned with it. Raises
    UnsupportedTokenizer if that is impossible. Entries that depend on a client's texts are small, in an LRU cache.
    """

    def __init__(self, tokenizers: Mapping[Role, RoleTokenizer]) -> None:
        self._tokenizers = dict(tokenizers)
        self._vocabularies = {role: vocabulary_of(tokenizer) for role, tokenizer in tokenizers.items()}
        self._legal = {role: frozenset(v.legal().nonzero()[0].tolist()) for role, v in self._vocabularies.items()}
        self._own = {role: self_map(vocabulary) for role, vocabulary in self._vocabularies.items()}
        self._small = small_maps(tokenizers)
        self.aligned = any(isinstance(mapping, Alignment) for mapping in self._small.values())  # of another family
        self.vocabulary = lru_cache(maxsize=256)(self._vocabulary)
        self.required = lru_cache(maxsize=256)(self._required)
        self._closing_tokens = lru_cache(maxsize=64)(self._find_closing_tokens)
        self.grammars = lru_cache(maxsize=None)(self._grammar_vocabulary)

    def map(self, primary: Role, role: Role) -> VocabularyMap | Alignment:
        """The map from `primary` to `role`."""
        return self._own[role] if primary == role else self._small[role]

    def plain_map(self, primary: Role, role: Role) -> VocabularyMap:
        """The map to a role whose tokens correspond to the primary's one to one."""
        mapping = self.map(primary, role)
        assert isinstance(mapping, VocabularyMap)
        return mapping

    def alignment(self, role: Role) -> Alignment:
        """The alignment of a small role with another vocabulary."""
        mapping = self._small[role]
        assert isinstance(mapping, Alignment)
        return mapping

    def width(self, role: Role) -> int:
        """Columns of a role's logits rows."""
        return self._vocabularies[role].width

    def token_by_token(
        self, primary: Role, role: Role, ours: Sequence[int], theirs: Sequence[int]
    ) -> tuple[list[int], list[int]] | None:
        """Translate the primary's prompt `ours` to a role, token by token: its ids, and their number after each token.

        Tokens before raw text (a BOS) are each role's own. None if the prompts are different texts.
        """
        own, other, mapping = self._tokenizers[primary], self._tokenizers[role], self.plain_map(primary, role)
        skip, lead = own.lead(ours), other.lead(theirs)
        if any(token >= len(mapping.to_role) for token in ours):
            return None
        if any(mapping.to_role[token] < 0 and token not in mapping.expansions for token in ours[skip:]):
            return None
        pieces = [(), *(mapping.tokens(token) for token in ours[skip:])]
        ends = list(accumulate(map(len, pieces), initial=lead))[1:]
        read = [*theirs[:lead], *(token for piece in pieces for token in piece)]
        if read != list(theirs) and own.decode(ours[skip:], False) != other.decode(theirs[lead:], False):
            return None
        return read, ends[:1] * skip + ends[1:]

    def legal(self, role: Role) -> frozenset[int]:
        """Ids that may be chosen in a role."""
        return self._legal[role]

    def canonical(self, role: Role, token: int) -> int:
        """The id that represents `token` in decisions: the first end id for all end ids."""
        ends = self._vocabularies[role].eos_ids
        return ends[0] if token in ends else token

    def _required(self, primary: Role, role: Role, end: str, forced: tuple[int, ...] = ()) -> RequiredLogits:
        """The required logits of `role`. end: the text that ends the thinking. forced: further ids of the primary."""
        mapping = self.map(primary, role)
        if isinstance(mapping, Alignment):
            return NO_REQUIRED_LOGITS  # its tables hold all events
        folds = dict(mapping.folds)
        if end and primary != role:
            vocabularies = self._vocabularies[primary], self._vocabularies[role]
            folds |= marker_fold(*vocabularies, mapping, end, self._tokenizers[primary].encode_continuation)
        return required_logits(folds, mapping, forced)

    def _vocabulary(self, primary: Role, roles: tuple[Role, ...], thinking: Thinking) -> SessionVocabulary:
        """The vocabularies of sessions with these roles."""
        forced_texts = {
            role: ForcedTextIds(
                tuple(self._tokenizers[role].encode_continuation(thinking.end)),
                tuple(self._tokenizers[role].encode_continuation(thinking.wait)),
                tuple(self._tokenizers[role].encode_continuation(thinking.closing)),
            )
            for role in roles
        }
        tokenizer = self._tokenizers[primary]
        return SessionVocabulary(
            maps={role: self.map(primary, role) for role in roles if role != primary},
            forced_texts=forced_texts,
            eos_ids=tokenizer.eos_ids,
            added=frozenset(tokenizer.added_tokens.values()),
            text=tokenizer.stream,
            matcher=lambda grammar: self.grammars(primary).matcher(grammar),
            closing_tokens=self._closing_tokens(primary, thinking.end)
            if thinking.start and thinking.min_tokens
            else None,
        )

    def _grammar_vocabulary(self, role: Role) -> GrammarVocabulary:
        """The vocabulary of a role, as grammars read it; slow the first time."""
        tokenizer = self._tokenizers[role]
        tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.width)]
        how = tokenizer.ids_beside_text, tokenizer.eos_ids, self.legal(role), tokenizer.encode_bytes
        return GrammarVocabulary(tokens, *how)

    def _find_closing_tokens(self, primary: Role, end: str) -> ClosingTokens:
        tokenizer = self._tokenizers[primary]
        return ClosingTokens(end, tokenizer.ids_with_byte(end.encode()[-1]), tokenizer.token_bytes)
