"""What waits for a model's forwards, and what the next one takes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from actors.decoding.hashing import extend_hashes
from actors.decoding.parameters import Sampling
from actors.engine.verbs import Extend
from actors.wire.columns import ExtendItem
from actors.wire.replies import Answer, Recipient

DECODE_TOKENS = 8  # an extend of so many tokens or fewer is a decode step or a check of drafts, never held back


@dataclass(slots=True, eq=False)
class Pending:
    """An extend on its way, and how far it has got: a long one takes several forwards, and so do drafts."""

    peer: Recipient
    item: ExtendItem
    prefix: int
    sampling: Sampling | None = None  # how drafts are drawn
    done: int = 0  # tokens that earlier forwards took
    drafted: list[int] = field(default_factory=list)  # tokens that go on where the item's end
    answers: list[Answer] = field(default_factory=list)  # of a draft's rows so far

    @property
    def left(self) -> int:
        return len(self.item.tokens) + len(self.drafted) - self.done

    @property
    def is_decode(self) -> bool:
        return self.is_drafting or len(self.item.tokens) <= DECODE_TOKENS

    @property
    def is_drafting(self) -> bool:
        """Whether the item's own tokens are done, and drafts are on their way."""
        return bool(self.drafted)

    @property
    def end(self) -> int:
        """The position after the last token that is known by now."""
        return self.item.position + len(self.item.tokens) + len(self.drafted)

    @property
    def draws(self) -> bool:
        """Whether the next row that this makes is to draw a draft from."""
        return self.item.draft is not None and len(self.drafted) < self.item.draft.drafts

    def makes(self, position: int) -> bool:
        """Whether the row of the token at `position` will be held when this is done."""
        return self.end - len(self.drafted) - self.item.rows <= position < self.end

    def chunk(self, budget: int) -> int:
        """How many tokens to take into a forward with room for `budget`; all that give rows go together, at the end."""
        ahead = self.left - self.item.rows
        return self.left if self.left <= budget or ahead <= 0 else min(ahead, budget)

    def tokens(self, count: int) -> list[int]:
        """The next `count` tokens to take."""
        if self.is_drafting:
            return self.drafted[self.done - len(self.item.tokens) :]
        return self.item.tokens[self.done : self.done + count]

    def advance(self, tokens: int) -> None:
        """A forward took `tokens` more."""
        self.prefix = extend_hashes(self.prefix, self.tokens(tokens))[-1]
        self.done += tokens


class Part(NamedTuple):
    """What one forward takes of an extend."""

    pending: Pending
    tokens: int

    @property
    def is_last(self) -> bool:
        """Whether this gives the rows of all tokens known by now."""
        return self.tokens == self.pending.left

    def extend(self) -> Extend:
        pending = self.pending
        item, tokens = pending.item, pending.tokens(self.tokens)
        rows = item.rows if self.is_last else 0
        position = item.position + pending.done
        return Extend(item.session, position, pending.prefix, tokens, rows, item.age, keep=pending.is_drafting)


def choose(waiting: Iterable[Pending], prefill_chunk: int) -> list[Part]:
    """What the next forward takes: every decode step, then prompts, oldest first, up to `prefill_chunk` tokens.

    Rows that belong together may exceed the budget, if nothing else uses it.
    """
    parts: list[Part] = []
    prompts: list[Pending] = []
    for pending in waiting:
        if pending.is_decode:
            parts.append(Part(pending, pending.left))
        else:
            prompts.append(pending)
    budget = prefill_chunk
    for pending in sorted(prompts, key=lambda pending: pending.item.age):
        tokens = pending.chunk(budget)
        if tokens > budget and budget < prefill_chunk:
            continue
        parts.append(Part(pending, tokens))
        budget -= tokens
        if budget <= 0:
            break
    return parts
