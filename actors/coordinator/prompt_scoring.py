"""Scores the tokens of a prompt from whole rows, chunk by chunk, before the answer is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from actors.api.generation import Delta, Generate, PromptNote, Rejected
from actors.coordinator.exchange import Exchange
from actors.coordinator.session import ActiveSession, PromptScoring, VerificationWindow
from actors.decoding.cross_vocab.translators import Alignment
from actors.text.vocabularies import VocabularyRegistry

_OTHER_FAMILY = (
    "log-probabilities of the prompt need small models of the target's family: ask for alpha 0, or leave out "
    "prompt_logprobs, or echo with logprobs"
)
_OTHER_TEXT = (
    "log-probabilities of the prompt need the same text in every model, and the {role} reads another one (its chat "
    "template or its marks differ): ask for alpha 0, or use /v1/completions"
)


class PromptScorer:
    """Scores the prompts of one coordinator's sessions."""

    def __init__(self, exchange: Exchange, vocabularies: VocabularyRegistry) -> None:
        self._exchange, self._vocabularies = exchange, vocabularies

    def begin_chunk(self, active: ActiveSession, prompt_scoring: PromptScoring) -> bool:
        """Request the rows of the prompt's next chunk. Returns False at the end of the prompt."""
        if not active.session.scored:  # no row predicts the first token
            self._emit(active, [PromptNote(active.session.primary.tokens[0], None)])
        chunk = prompt_scoring.next(active)
        if chunk is None:
            active.end_prompt_scoring()
            return False
        active.expect_rows()
        roles = prompt_scoring.roles if chunk.guided else (active.primary,)
        self._exchange.read_prompt(active, chunk.guided, {role: prompt_scoring.reads(chunk, role) for role in roles})
        return True

    def emit_scores(
        self, windows: Iterable[VerificationWindow], go_on: Callable[[ActiveSession], None]
    ) -> list[VerificationWindow]:
        """Emit the scores of windows inside prompts and call `go_on` for their sessions. Returns the other windows."""
        others = []
        for window in windows:
            active = window.active
            if not window.scores_prompt:
                others.append(window)
                continue
            assert active.prompt_scoring is not None
            self._emit(active, active.prompt_scoring.notes(window, self._vocabularies))
            active.reset_faults()
            window.settle()
            self._exchange.drop(active)
            go_on(active)
        return others

    def _emit(self, active: ActiveSession, notes: list[PromptNote]) -> None:
        active.session.count_scored(len(notes))
        active.events.emit(Delta(prompt=notes))


def plan_scoring(request: Generate, vocabularies: VocabularyRegistry) -> tuple[Generate, PromptScoring] | Rejected:
    """Plan how to score a prompt: the request with prompts that every model reads token by token, and the plan.

    Rejected if a model has another vocabulary, or reads another text.
    """
    primary = request.primary
    ours = request.prompts[primary]
    prompts, reads = dict(request.prompts), {primary: list(range(1, len(ours) + 1))}
    if request.guidance.alpha:
        for role in [role for role in prompts if role != primary]:
            if isinstance(vocabularies.map(primary, role), Alignment):
                return Rejected("invalid", _OTHER_FAMILY)
            aligned = vocabularies.token_by_token(primary, role, ours, prompts[role])
            if aligned is None:
                return Rejected("invalid", _OTHER_TEXT.format(role=role))
            prompts[role], reads[role] = aligned
    return replace(request, prompts=prompts), PromptScoring(request, reads, vocabularies.width(primary))
