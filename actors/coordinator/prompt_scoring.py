"""Reading a prompt for what the models say of its tokens: whole rows, a few at a time, before anything is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.api.generation import Delta, Generate, PromptNote, Rejected, Role
from actors.coordinator.exchange import Exchange
from actors.coordinator.session import Live
from actors.coordinator.window import Window
from actors.decoding.cross_vocab.translators import Alignment
from actors.decoding.prompt import prompt_notes, spread
from actors.text.vocabularies import Languages

_ROWS, _LOGITS = 32, 1 << 20  # of a role at once at most: so much memory, and so long does nobody else get a token
_OTHER_FAMILY = (
    "log-probabilities of the prompt need small models of the target's family: ask for alpha 0, or leave out "
    "prompt_logprobs, or echo with logprobs"
)
_OTHER_TEXT = (
    "log-probabilities of the prompt need the same text in every model, and the {role} reads another one (its chat "
    "template or its marks differ): ask for alpha 0, or use /v1/completions"
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a prompt that are read together: those of the primary's tokens from `begin` on."""

    begin: int
    rows: int
    guided: bool


class PromptReading:
    """How a session's models read its prompt, side by side."""

    def __init__(self, request: Generate, reads: Mapping[Role, Sequence[int]], width: int) -> None:
        """reads: how many of its tokens a role has read after each of the primary's. width: of the primary's rows."""
        self._request, self._reads, self._width = request, reads, width

    @property
    def roles(self) -> tuple[Role, ...]:
        """All that take part."""
        return tuple(self._reads)

    def next(self, live: Live) -> Chunk | None:
        """What is read next; None at the end. A row says what follows its token.

        Where a small model has no row, or none any more, the target speaks alone.
        """
        begin = max(live.session.scored - 1, 0)
        most = min(max(1, min(_ROWS, _LOGITS // self._width)), len(self._reads[live.primary]) - 1 - begin)
        if most < 1:
            return None
        guided = self._guided(live, begin)
        return Chunk(begin, next((n for n in range(1, most) if self._guided(live, begin + n) != guided), most), guided)

    def reads(self, chunk: Chunk, role: Role) -> Sequence[int]:
        """How many of its tokens a role has read at each row of a chunk."""
        return self._reads[role][chunk.begin : chunk.begin + chunk.rows]

    def notes(self, window: Window, languages: Languages) -> list[PromptNote]:
        """What the complete rows of a window say of the tokens after them."""
        live, request = window.live, self._request
        rows = {
            role: spread([row.slices[role] for row in window.rows], window.known[role], self._width)
            for role in window.roles
        }
        begin = live.session.scored
        tokens = request.prompts[live.primary][begin : begin + len(window.rows)]
        events = [languages.canonical(live.primary, token) for token in tokens]
        return prompt_notes(rows, request.guidance.alpha, tokens, events, request.prompt_logprobs or 0)

    def _guided(self, live: Live, row: int) -> bool:
        small = [(role, reads[row]) for role, reads in self._reads.items() if role != live.primary]
        return bool(small) and all(1 <= read <= live.limit(role) for role, read in small)


class PromptReader:
    """Reads the prompts of one coordinator's sessions, chunk after chunk."""

    def __init__(self, exchange: Exchange, languages: Languages) -> None:
        self._exchange, self._languages = exchange, languages

    def ask(self, live: Live, reading: PromptReading) -> bool:
        """Ask for the next rows inside the session's prompt; False if nothing of it is wanted any more."""
        if not live.session.scored:  # of the first token nobody says anything
            self._tell(live, [PromptNote(live.session.primary.tokens[0], None)])
        chunk = reading.next(live)
        if chunk is None:
            live.reading = None
            return False
        live.row_since = time.monotonic()
        roles = reading.roles if chunk.guided else (live.primary,)
        self._exchange.read_prompt(live, chunk.guided, {role: reading.reads(chunk, role) for role in roles})
        return True

    def tell(self, windows: Iterable[Window], go_on: Callable[[Live], None]) -> list[Window]:
        """Tell what those of the windows say that lie inside prompts, and go on with their sessions; the others."""
        others = []
        for window in windows:
            live = window.live
            if not window.reads_prompt:
                others.append(window)
                continue
            assert live.reading is not None
            self._tell(live, live.reading.notes(window, self._languages))
            live.faults = live.misses = 0
            window.settle()
            self._exchange.drop(live)
            go_on(live)
        return others

    def _tell(self, live: Live, notes: list[PromptNote]) -> None:
        live.session.scored += len(notes)
        live.events.emit(Delta(prompt=notes))


def side_by_side(request: Generate, languages: Languages) -> tuple[Generate, PromptReading] | Rejected:
    """How the models read a prompt, and the request with prompts that they can read so. Rejected: they cannot."""
    primary = request.primary
    ours = request.prompts[primary]
    prompts, reads = dict(request.prompts), {primary: list(range(1, len(ours) + 1))}
    if request.guidance.alpha:
        for role in [role for role in prompts if role != primary]:
            if isinstance(languages.map(primary, role), Alignment):
                return Rejected("invalid", _OTHER_FAMILY)
            read = languages.token_by_token(primary, role, ours, prompts[role])
            if read is None:
                return Rejected("invalid", _OTHER_TEXT.format(role=role))
            prompts[role], reads[role] = read
    return replace(request, prompts=prompts), PromptReading(request, reads, languages.width(primary))
