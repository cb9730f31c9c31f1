"""What sessions must know of the models' vocabularies, built once from their tokenizers and kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from actors.decoding.parameters import Thinking
from actors.decoding.session import Language, Spelling
from actors.decoding.vocabulary import Vocabulary, VocabularyMap, map_vocabulary, own_map
from actors.requests import Role
from actors.tokenizer import RoleTokenizer


def vocabulary_of(tokenizer: RoleTokenizer) -> Vocabulary:
    """A tokenizer's tokens, as the maps between vocabularies need them."""
    return Vocabulary(tokenizer.text_tokens, tokenizer.added_tokens, tokenizer.eos_ids, tokenizer.width)


class Languages:
    """Maps between roles, and spellings of the texts that decoding may force."""

    def __init__(self, tokenizers: Mapping[Role, RoleTokenizer]) -> None:
        self._tokenizers = dict(tokenizers)
        self._vocabularies = {role: vocabulary_of(tokenizer) for role, tokenizer in tokenizers.items()}
        self._legal = {role: frozenset(v.legal().nonzero()[0].tolist()) for role, v in self._vocabularies.items()}
        self.map = lru_cache(maxsize=256)(self._map)
        self.language = lru_cache(maxsize=256)(self._language)

    def legal(self, role: Role) -> frozenset[int]:
        """Ids that may be chosen in a role."""
        return self._legal[role]

    def _map(self, primary: Role, role: Role, end: str) -> VocabularyMap:
        """The map from `primary` to `role` for sessions whose thinking ends with `end`."""
        if primary == role:
            return own_map(self._vocabularies[role])
        ours, theirs = self._tokenizers[primary], self._tokenizers[role]
        vocabularies = self._vocabularies[primary], self._vocabularies[role]
        return map_vocabulary(*vocabularies, theirs.encode, ours.encode, [end] if end else [])

    def _language(self, primary: Role, roles: tuple[Role, ...], thinking: Thinking) -> Language:
        """The language of sessions of these roles."""
        spellings = {
            role: Spelling(
                tuple(self._tokenizers[role].encode(thinking.end)), tuple(self._tokenizers[role].encode(thinking.wait))
            )
            for role in roles
        }
        tokenizer = self._tokenizers[primary]
        return Language(
            maps={role: self.map(primary, role, thinking.end) for role in roles if role != primary},
            spellings=spellings,
            eos_ids=tokenizer.eos_ids,
            added=frozenset(tokenizer.added_tokens.values()),
            text=tokenizer.stream,
        )
