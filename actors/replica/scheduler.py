"""What waits for a model's forwards, and what the next one takes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from actors.api.sampling_params import Sampling
from actors.decoding.hashing import extend_hashes
from actors.engine.interface import BLOCK, KEEP_ALL, Extend
from actors.wire.columns import ExtendItem
from actors.wire.replies import Answer, Recipient

DECODE_TOKENS = 8  # an extend of so many tokens or fewer is a decode step or a check of drafts, never held back


@dataclass(slots=True, eq=False)
class ScheduledExtend:
    """An extend on its way, and how far it has got: a long one takes several forwards, and so do drafts."""

    peer: Recipient
    item: ExtendItem
    prefix: int
    sampling: Sampling | None = None  # how drafts are drawn
    done: int = 0  # tokens that earlier forwards took
    drafted: list[int] = field(default_factory=list)  # tokens that go on where the item's end
    answers: list[Answer] = field(default_factory=list)  # of a draft's rows so far
    blocks: Sequence[int] = field(init=False)  # of a prompt: the hashes after whole blocks, but for what gives rows

    def __post_init__(self) -> None:
        whole = (len(self.item.tokens) - max(self.item.rows, 1)) // BLOCK * BLOCK if self.item.position == 0 else 0
        self.blocks = extend_hashes(self.prefix, self.item.tokens[:whole])[BLOCK - 1 :: BLOCK]

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
    def keep(self) -> int:
        """Held rows that stay in the next forward: a draft goes on where they end, and so does a later part."""
        return KEEP_ALL if self.is_drafting or self.done else self.item.keep

    @property
    def draws(self) -> bool:
        """Whether the next row that this makes is to draw a draft from."""
        return self.item.draft is not None and len(self.drafted) < self.item.draft.drafts

    def makes(self, position: int) -> bool:
        """Whether the row of the token at `position` will be held when this is done."""
        return self.end - len(self.drafted) - self.item.rows <= position < self.end

    def chunk(self, budget: int, forked: int = 0) -> Chunk:
        """What to take into a forward with room for `budget`; all that give rows go together, at the end."""
        left = self.left - forked
        ahead = left - self.item.rows
        return Chunk(self, left if left <= budget or ahead <= 0 else min(ahead, budget), forked)

    def tokens(self, count: int, forked: int = 0) -> list[int]:
        """The next `count` tokens to take, behind `forked`."""
        if self.is_drafting:
            return self.drafted[self.done - len(self.item.tokens) :]
        first = self.done + forked
        return self.item.tokens[first : first + count]

    def advance(self, tokens: int) -> None:
        """A forward took `tokens` more."""
        self.prefix = extend_hashes(self.prefix, self.tokens(tokens))[-1]
        self.done += tokens


class Chunk(NamedTuple):
    """What one forward takes of an extend."""

    scheduled: ScheduledExtend
    tokens: int  # that it computes
    forked: int = 0  # tokens before them, of whole blocks, that another session's cache already holds

    @property
    def taken(self) -> int:
        """Tokens that are done with it."""
        return self.forked + self.tokens

    @property
    def is_last(self) -> bool:
        """Whether this gives the rows of all tokens known by now."""
        return self.taken == self.scheduled.left

    @property
    def forked_blocks(self) -> Sequence[int]:
        """The running hashes after each block that is forked."""
        return self.scheduled.blocks[: self.forked // BLOCK]

    def extend(self) -> Extend:
        scheduled = self.scheduled
        item, tokens = scheduled.item, scheduled.tokens(self.tokens, self.forked)
        rows = item.rows if self.is_last else 0
        position = item.position + scheduled.done + self.forked
        prefix = self.forked_blocks[-1] if self.forked else scheduled.prefix
        return Extend(item.session, position, prefix, tokens, rows, item.age, keep=scheduled.keep)


Shared = Callable[[Sequence[int]], int]


def choose(waiting: Iterable[ScheduledExtend], prefill_chunk: int, shared: Shared = lambda blocks: 0) -> list[Chunk]:
    """What the next forward takes: every decode step, then prompts, oldest first, up to `prefill_chunk` tokens.

    Rows that belong together may exceed the budget, if nothing else uses it. A prompt begins with the blocks that some
    session holds (`shared`: how many, see `Engine`), and waits as long as an older prompt is about to make its next.
    """
    chunks: list[Chunk] = []
    coming: set[int] = set()  # blocks that the prompts before this one make
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
        # What a prompt that waits would make is also made by the one it waits for, as far as it matters to the others.
        coming.update(scheduled.blocks)
        chunk = scheduled.chunk(budget, held * BLOCK)
        if chunk.tokens > budget and budget < prefill_chunk:
            continue
        chunks.append(chunk)
        budget -= chunk.tokens
        if budget <= 0:
            break
    return chunks
