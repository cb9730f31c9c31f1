"""Reading a prompt for what the models say of its tokens: whole rows, a few at a time, before anything is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from actors.api.generation import Delta, Generate, PromptNote, Rejected
from actors.coordinator.exchange import Exchange
from actors.coordinator.session import Live, PromptReading, Window
from actors.decoding.cross_vocab.translators import Alignment
from actors.text.vocabularies import Languages

_OTHER_FAMILY = (
    "log-probabilities of the prompt need small models of the target's family: ask for alpha 0, or leave out "
    "prompt_logprobs, or echo with logprobs"
)
_OTHER_TEXT = (
    "log-probabilities of the prompt need the same text in every model, and the {role} reads another one (its chat "
    "template or its marks differ): ask for alpha 0, or use /v1/completions"
)


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
