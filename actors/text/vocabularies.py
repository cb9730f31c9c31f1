"""What sessions must know of the models' vocabularies, built once from their tokenizers and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from actors.api.generation import Role
from actors.api.sampling_params import Thinking
from actors.decoding.cross_vocab.translators import Alignment
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
    """A tokenizer's tokens, as the maps between vocabularies need them."""
    return Vocabulary(tokenizer.text_tokens, tokenizer.added_tokens, tokenizer.eos_ids, tokenizer.width)


def small_maps(tokenizers: Mapping[Role, RoleTokenizer]) -> dict[Role, VocabularyMap | Alignment]:
    """How the small models read the target: one for one, or both as texts. Raises SpellingError."""
    target, small = tokenizers["target"], [role for role in tokenizers if role != "target"]
    try:
        ours = vocabulary_of(target)
        return {role: map_vocabulary(ours, vocabulary_of(tokenizers[role]), tokenizers[role].encode) for role in small}
    except VocabularyError:
        return {role: align(target, tokenizers[role]) for role in small}


class VocabularyRegistry:
    """Maps between roles, and spellings of the texts that decoding may force.

    Where the target's text tokens are not those of both small models, these are aligned with it by their texts. Raises
    SpellingError when they cannot be. What depends on a client's texts is small, and forgotten when it is not used.
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

    def map(self, primary: Role, role: Role) -> VocabularyMap | Alignment:
        """The map from `primary` to `role`."""
        return self._own[role] if primary == role else self._small[role]

    def plain_map(self, primary: Role, role: Role) -> VocabularyMap:
        """The same, of a role that reads the primary's tokens one for one."""
        mapping = self.map(primary, role)
        assert isinstance(mapping, VocabularyMap)
        return mapping

    def alignment(self, role: Role) -> Alignment:
        """The same, of a small role of another family."""
        mapping = self._small[role]
        assert isinstance(mapping, Alignment)
        return mapping

    def width(self, role: Role) -> int:
        """Of a role's rows."""
        return self._vocabularies[role].width

    def token_by_token(
        self, primary: Role, role: Role, ours: Sequence[int], theirs: Sequence[int]
    ) -> tuple[list[int], list[int]] | None:
        """A role's prompt as it reads the primary's token by token, and how many it has read after each of these.

        What either has before raw text is its own. None where the prompts are not the same text.
        """
        own, other, mapping = self._tokenizers[primary], self._tokenizers[role], self.plain_map(primary, role)
        skip, lead = own.lead(ours), other.lead(theirs)
        if any(token >= len(mapping.to_role) for token in ours):
            return None
        if any(mapping.to_role[token] < 0 and token not in mapping.spelled for token in ours[skip:]):
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
        """The id that stands for `token` in decisions: all end ids are one event, the first of them."""
        ends = self._vocabularies[role].eos_ids
        return ends[0] if token in ends else token

    def _required(self, primary: Role, role: Role, end: str, forced: tuple[int, ...] = ()) -> RequiredLogits:
        """What rows of `role` must know: `end` closes the thinking, and `forced` primary ids are wanted."""
        mapping = self.map(primary, role)
        if isinstance(mapping, Alignment):
            return NO_REQUIRED_LOGITS  # its tables say what each event is
        folds = dict(mapping.folds)
        if end and primary != role:
            vocabularies = self._vocabularies[primary], self._vocabularies[role]
            folds |= marker_fold(*vocabularies, mapping, end, self._tokenizers[primary].encode)
        return required_logits(folds, mapping, forced)

    def _vocabulary(self, primary: Role, roles: tuple[Role, ...], thinking: Thinking) -> SessionVocabulary:
        """The language of sessions of these roles."""
        forced_texts = {
            role: ForcedTextIds(
                tuple(self._tokenizers[role].encode(thinking.end)), tuple(self._tokenizers[role].encode(thinking.wait))
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
        )
