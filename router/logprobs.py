"""Tokens and their log-probabilities as OpenAI's two endpoints and vLLM write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.requests import EXPLAINED, Candidates, TokenNote
from actors.tokenizer import RoleTokenizer

Json = dict[str, Any]
LEAST = -9999.0  # stands for minus infinity, which JSON has not


@dataclass(frozen=True, slots=True)
class Tokens:
    """How an answer's tokens are named: by what they add to a text, or as "token_id:7"."""

    tokenizer: RoleTokenizer
    as_ids: bool = False

    def name(self, id_: int) -> str:
        """What stands for a token in log-probabilities."""
        return f"token_id:{id_}" if self.as_ids else self.text(id_)

    def text(self, id_: int) -> str:
        """What it adds to a text; bytes that are no character of their own become U+FFFD."""
        return self.tokenizer.token_bytes(id_).decode(errors="replace")

    def chat(self, notes: Sequence[TokenNote], top: int) -> Json:
        """`logprobs` of a chat's choice, with `top` candidates of each token. What was forced was certain."""
        content = []
        for note in notes:
            logprob, candidates = _of(note)
            listed = [self._entry(id_, value) for id_, value in candidates[:top]]
            content.append(self._entry(note.id, logprob) | {"top_logprobs": listed})
        return {"content": content}

    def completion(self, notes: Sequence[TokenNote], top: int, offset: int) -> Json:
        """`logprobs` of a completion's choice; offset: characters of its tokens before these.

        A token that is not among its `top` candidates stands beside them, as with OpenAI.
        """
        body: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for note in notes:
            logprob, candidates = _of(note)
            body["tokens"].append(self.name(note.id))
            body["token_logprobs"].append(_finite(logprob))
            listed = {self.name(note.id): _finite(logprob)}
            for id_, value in candidates[:top]:
                listed.setdefault(self.name(id_), _finite(value))
            body["top_logprobs"].append(listed)
            body["text_offset"].append(offset)
            offset += len(self.text(note.id))
        return body

    def length(self, notes: Sequence[TokenNote]) -> int:
        """Characters of these tokens."""
        return sum(len(self.text(note.id)) for note in notes)

    def explained(self, note: TokenNote) -> Json:
        """What guidance did to a token. Of a forced one nothing is said but that."""
        scores = note.scores
        return {
            "id": note.id,
            "text": note.text,
            "alpha": note.alpha,
            "changed": note.changed,
            "drafted": note.drafted,
            "shift": scores and scores.shift,
            "probability": scores and math.exp(scores.logprob),
            "target": self._likely(scores.target if scores else ()),
            "guider": self._likely(scores.guider if scores else ()),
            "guided": self._likely(scores.guided[:EXPLAINED] if scores else ()),
        }

    def _likely(self, candidates: Candidates) -> list[Json]:
        return [{"id": id_, "text": self.text(id_), "probability": math.exp(value)} for id_, value in candidates]

    def _entry(self, id_: int, logprob: float) -> Json:
        return {"token": self.name(id_), "logprob": _finite(logprob), "bytes": [*self.tokenizer.token_bytes(id_)]}


def _of(note: TokenNote) -> tuple[float, Candidates]:
    return (note.scores.logprob, note.scores.guided) if note.scores else (0.0, ())


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
