"""Formats tokens and log-probabilities as OpenAI's two endpoints and vLLM do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.api.generation import EXPLAINED, Candidates, PromptNote, TokenNote
from actors.text.tokenizer import RoleTokenizer

Json = dict[str, Any]
Note = TokenNote | PromptNote
MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express


@dataclass(frozen=True, slots=True)
class TokenFormatter:
    """Formats tokens of one tokenizer. as_ids: name tokens "token_id:7" instead of by their text."""

    tokenizer: RoleTokenizer
    as_ids: bool = False

    def name(self, id_: int) -> str:
        """A token's name in log-probabilities."""
        return f"token_id:{id_}" if self.as_ids else self.text(id_)

    def text(self, id_: int) -> str:
        """A token's text; bytes that are not a whole character become U+FFFD."""
        return self.tokenizer.token_bytes(id_).decode(errors="replace")

    def chat(self, notes: Sequence[TokenNote], top: int) -> Json:
        """`logprobs` of a chat choice, with `top` candidates per token."""
        content = []
        for note in notes:
            logprob, candidates = _logprob_and_candidates(note)
            listed = [self._entry(id_, value) for id_, value in candidates[:top]]
            content.append(self._entry(note.id, logprob) | {"top_logprobs": listed})
        return {"content": content}

    def completion(self, notes: Sequence[Note], top: int, offsets: TextOffsets) -> Json:
        """`logprobs` of a completion's choice, of its prompt too if `notes` begin there.

        offsets: has counted the choice's earlier tokens. As in OpenAI's API, a token that is not among its `top`
        candidates is listed in addition.
        """
        body: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for note in notes:
            listed = _with_candidates(note, top)
            body["tokens"].append(self.name(note.id))
            body["token_logprobs"].append(_finite(listed[0][1]) if listed else None)
            body["top_logprobs"].append(self._by_name(listed) if listed else None)
            body["text_offset"].append(offsets.next(note))
        return body

    def prompt(self, notes: Sequence[PromptNote], top: int) -> list[Json | None]:
        """vLLM's `prompt_logprobs`: per token, its own and its `top` candidates' entries by id; null for the first."""
        return [self._ranked_candidates(note, top) for note in notes]

    def explain(self, note: TokenNote) -> Json:
        """The effect of guidance on a token; scores and candidates are empty for a forced token."""
        scores = note.scores
        return {
            "id": note.id,
            "text": note.text,
            "alpha": note.alpha,
            "changed": note.changed,
            "drafted": note.drafted,
            "shift": scores and scores.shift,
            "probability": scores and math.exp(scores.logprob),
            "target": self._probabilities(scores.target if scores else ()),
            "guider": self._probabilities(scores.guider if scores else ()),
            "guided": self._probabilities(scores.guided[:EXPLAINED] if scores else ()),
        }

    def _by_name(self, candidates: Candidates) -> Json:
        """Log-probabilities by token name; of several tokens with one name, the first."""
        named: Json = {}
        for id_, value in candidates:
            named.setdefault(self.name(id_), _finite(value))
        return named

    def _ranked_candidates(self, note: PromptNote, top: int) -> Json | None:
        ranks = {note.id: note.rank} | {id_: rank for rank, (id_, _) in enumerate(note.guided[:top], 1)}
        ranked = {
            str(id_): {"logprob": _finite(value), "rank": ranks[id_], "decoded_token": self.text(id_)}
            for id_, value in _with_candidates(note, top)
        }
        return ranked or None

    def _probabilities(self, candidates: Candidates) -> list[Json]:
        return [{"id": id_, "text": self.text(id_), "probability": math.exp(value)} for id_, value in candidates]

    def _entry(self, id_: int, logprob: float) -> Json:
        return {"token": self.name(id_), "logprob": _finite(logprob), "bytes": [*self.tokenizer.token_bytes(id_)]}


class TextOffsets:
    """Counts the characters of one choice's text, token by token.

    A token that ends within a character has no text yet: the character counts for the token that completes it.
    """

    def __init__(self, tokenizer: RoleTokenizer, echo: str = "") -> None:
        """echo: the prompt's text if the choice's text begins with it."""
        self._tokenizer, self._echo, self._characters = tokenizer, echo, 0
        self._prompt = tokenizer.stream(skip_special=False)

    def next(self, note: Note) -> int:
        """Where the next token begins, in characters."""
        offset = self._characters
        self._characters += len(note.text if isinstance(note, TokenNote) else self._prompt_text(note))
        return offset

    def _prompt_text(self, note: PromptNote) -> str:
        text = self._prompt.push(note.id)
        around = note.id in (*self._tokenizer.bos_ids, *self._tokenizer.trailing_ids)
        hidden = around and not self._echo.startswith(text, self._characters)
        return "" if hidden else text


def _logprob_and_candidates(note: TokenNote) -> tuple[float, Candidates]:
    """A token's log-probability and its candidates. A forced token has log-probability 0."""
    return (note.scores.logprob, note.scores.guided) if note.scores else (0.0, ())


def _with_candidates(note: Note, top: int) -> Candidates:
    """A token with its log-probability, then its other candidates; empty for the first token of a prompt."""
    logprob, candidates = (note.logprob, note.guided) if isinstance(note, PromptNote) else _logprob_and_candidates(note)
    if logprob is None:
        return ()
    return ((note.id, logprob), *((id_, value) for id_, value in candidates[:top] if id_ != note.id))


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
