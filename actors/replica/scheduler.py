"""Scheduled extends, and the chunks of them that the next forward takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from actors.decoding.hashing import extend_hashes
from actors.engine.interface import BLOCK, KEEP_ALL, Extend
from actors.wire.columns import ExtendItem
from actors.wire.replies import AnsweredItems, Recipient

DECODE_TOKENS = 8  # an extend of at most so many tokens is a decode step or a verification, and never delayed


@dataclass(slots=True, eq=False)
class ScheduledExtend:
    """An extend and its progress. A long prompt takes several forwards, and so do drafts."""

    peer: Recipient
    item: ExtendItem
    done: int = 0  # tokens that earlier forwards computed
    drafted: list[int] = field(default_factory=list)  # drafted tokens, which follow the item's own
    answers: list[AnsweredItems] = field(default_factory=list)  # rows of the drafts so far
    prefix: int = field(init=False)  # running hash of the tokens before the next one to compute
    extend: Extend = field(init=False)  # the whole item
    blocks: Sequence[int] = field(init=False, default=())  # a prompt's running hashes after each block before its rows

    def __post_init__(self) -> None:
        item = self.item
        self.prefix = item.prefix
        self.extend = Extend(item.session, item.position, item.prefix, item.tokens, item.rows, item.age, item.keep)
        if item.position == 0 and len(item.tokens) > BLOCK:
            whole = (len(item.tokens) - max(item.rows, 1)) // BLOCK * BLOCK
            self.blocks = extend_hashes(item.prefix, item.tokens[:whole])[BLOCK - 1 :: BLOCK]

    @property
    def left(self) -> int:
        return len(self.item.tokens) + len(self.drafted) - self.done

    @property
    def is_decode(self) -> bool:
        return len(self.item.tokens) <= DECODE_TOKENS or self.is_drafting

    @property
    def is_drafting(self) -> bool:
        """True if the item's own tokens are computed and drafts follow."""
        return bool(self.drafted)

    @property
    def end(self) -> int:
        """The position after the last token known so far."""
        return self.item.end + len(self.drafted)

    @property
    def keep(self) -> int:
        """Held rows that the next forward keeps: drafts and later chunks follow directly after them."""
        return KEEP_ALL if self.is_drafting or self.done else self.item.keep

    @property
    def draws(self) -> bool:
        """True if a draft is to be sampled from the next row."""
        return self.item.draft is not None and len(self.drafted) < self.item.draft.drafts

    def makes(self, position: int) -> bool:
        """True if this extend computes the row of the token at `position`."""
        return self.end - len(self.drafted) - self.item.rows <= position < self.end

    def chunk(self, budget: int, forked: int = 0) -> Chunk:
        """The next chunk, given room for `budget` tokens. Tokens that give rows stay together, at the end."""
        left = self.left - forked
        ahead = left - self.item.rows
        return Chunk(self, left if left <= budget or ahead <= 0 else min(ahead, budget), forked)

    def tokens(self, count: int, forked: int = 0) -> list[int]:
        """The next `count` tokens to compute, after `forked` ones."""
        if self.is_drafting:
            return self.drafted[self.done - len(self.item.tokens) :]
        first = self.done + forked
        return self.item.tokens[first : first + count]

    def advance(self, tokens: int) -> None:
        """Record that a forward has computed `tokens` more."""
        self.prefix = extend_hashes(self.prefix, self.tokens(tokens))[-1]
        self.done += tokens


class Chunk(NamedTuple):
    """The part of an extend that one forward computes."""

    scheduled: ScheduledExtend
    tokens: int  # number of tokens to compute
    forked: int = 0  # tokens before them, in whole blocks, that are copied from another session's cache

    @property
    def taken(self) -> int:
        """Tokens that are done after this chunk."""
        return self.forked + self.tokens

    @property
    def is_last(self) -> bool:
        """True if it completes the extend as far as its tokens are known, and so gives the rows."""
        return self.taken == self.scheduled.left

    @property
    def forked_blocks(self) -> Sequence[int]:
        """The running hash after each forked block."""
        return self.scheduled.blocks[: self.forked // BLOCK]

    def extend(self) -> Extend:
        scheduled = self.scheduled
        item = scheduled.item
        if self.tokens == len(item.tokens) and not scheduled.done:
            return scheduled.extend
        tokens = scheduled.tokens(self.tokens, self.forked)
        rows = item.rows if self.is_last else 0
        position = item.position + scheduled.done + self.forked
        prefix = self.forked_blocks[-1] if self.forked else scheduled.prefix
        return Extend(item.session, position, prefix, tokens, rows, item.age, keep=scheduled.keep)


Shared = Callable[[Sequence[int]], int]


def choose(waiting: Iterable[ScheduledExtend], prefill_chunk: int, shared: Shared = lambda blocks: 0) -> list[Chunk]:
    """The chunks of the next forward: every decode step, then prompts, oldest first, up to `prefill_chunk` tokens.

    A chunk whose rows belong together may exceed the budget if it is the only prompt. A prompt starts after the blocks
    that some session's cache holds already (`shared` counts them, see `Engine`). It waits while an older prompt is
    about to compute its next block, which it can then copy.

    Example, prefill_chunk = 100, blocks of 16 tokens, nothing in any cache:
        session 1, a decode step of 1 token       -> chunk of 1, outside the budget
        session 2, a prompt of 70 tokens          -> chunk of 70; 30 are left
        session 3, a prompt that begins alike     -> waits for session 2's blocks, and copies them in a later forward
        session 4, another prompt of 200 tokens   -> chunk of 30; the rest takes later forwards
    """
    chunks: list[Chunk] = []
    coming: set[int] = set()  # blocks that older prompts are about to compute
    prompts: list[ScheduledExtend] = []
    for scheduled in waiting:
        if scheduled.is_decode:
            chunks.append(Chunk(scheduled, scheduled.left))
        else:
            prompts.append(scheduled)
    budget = prefill_chunk
    for scheduled in sorted(prompts, key=lambda scheduled: scheduled.item.age):
        held = 0
        if scheduled.blocks and not scheduled.done:
            held = shared(scheduled.blocks)
            if held < len(scheduled.blocks) and scheduled.blocks[held] in coming:
                continue
        # Waiting prompts need no entry: a prompt that shares their blocks also waits for the same older one.
        coming.update(scheduled.blocks)
        chunk = scheduled.chunk(budget, held * BLOCK)
        if chunk.tokens > budget and budget < prefill_chunk:
            continue
        chunks.append(chunk)
        budget -= chunk.tokens
        if budget <= 0:
            break
    return chunks
