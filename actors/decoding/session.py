"""The state of one sequence that is being decoded.

Its token ids, seed and parameters are all of its durable state: another coordinator can continue from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from actors.api.generation import EXPLAINED, FinishReason, Generate, Resume, Role, Scores, Tally, TokenNote, Usage
from actors.decoding.answer import AnswerText, VisibleText
from actors.decoding.closing_tokens import ClosingTokens
from actors.decoding.cross_vocab.translators import Alignment, translator_for
from actors.decoding.grammar import GrammarMatcher
from actors.decoding.penalties import Adjustments, adjustments, changes_rows, lifted_ids
from actors.decoding.stream import Stream
from actors.decoding.vocabulary import VocabularyMap


class TextStream(Protocol):
    """Decodes token ids one by one and holds text back until no later token can change it."""

    def push(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ForcedTextIds:
    """One role's token ids of the texts that decoding may force."""

    end: tuple[int, ...]  # of thinking.end
    wait: tuple[int, ...]  # of thinking.wait
    closing: tuple[int, ...] = ()  # of thinking.closing


@dataclass(frozen=True, slots=True)
class SessionVocabulary:
    """The vocabularies of a session's roles."""

    maps: Mapping[Role, VocabularyMap | Alignment]  # from the primary to each small role
    forced_texts: Mapping[Role, ForcedTextIds]  # of every role of the session
    eos_ids: tuple[int, ...]  # of the primary; the first represents all of them
    added: frozenset[int]  # the primary's added tokens
    # Decodes what follows these ids; True skips special tokens but the last argument's.
    text: Callable[[Sequence[int], bool, Sequence[int]], TextStream]
    closing_tokens: ClosingTokens | None = None  # of thinking.end, if the thinking has a minimum
    matcher: Callable[[str], GrammarMatcher] | None = None  # at the beginning of a grammar


class AnswerPart(NamedTuple):
    """The part of an answer that one step adds: text to show, tokens, and their notes if the request wants them."""

    reasoning: str
    content: str
    tokens: Sequence[int] = ()
    notes: Sequence[TokenNote] = ()


class Session:
    """One sequence: `commit` takes a chosen token and returns the text to show, until `finish_reason` is set.

    Raises GrammarError if the request's grammar cannot be used.
    """

    def __init__(self, request: Generate, vocabulary: SessionVocabulary, hash_seeds: Mapping[Role, int]) -> None:
        self.request, self.vocabulary = request, vocabulary
        self.streams = {role: Stream(hash_seeds[role], tokens) for role, tokens in request.prompts.items()}
        self.primary = self.streams[request.primary]  # of the role whose vocabulary the answer is in
        self.translators = {
            role: translator_for(mapping, self.streams[role]) for role, mapping in vocabulary.maps.items()
        }
        self._translators = tuple(self.translators.values())
        self.retokenizes = any(isinstance(mapping, Alignment) for mapping in vocabulary.maps.values())
        sampling = request.sampling
        self._changes_rows = changes_rows(sampling)
        # Numbers of candidates to list for each token, of the distribution and of each model; None for no list.
        self.listed = None if request.top is None else (request.top, EXPLAINED if request.explain else 0)
        # True if a penalty makes emitted tokens likelier, so that each one becomes a required id of the next row.
        self.lifts_own_output = (
            sampling.presence_penalty < 0 or sampling.frequency_penalty < 0 or sampling.repetition_penalty < 1
        )
        self.prompt = frozenset(self.primary.tokens)
        self.choices: list[int] = []  # chosen tokens; with the request they determine the whole state
        self.output: Counter[int] = Counter()
        self.generated = self.reasoning_tokens = self.guided = self.changed = self.widened = 0
        self.drafted = self.accepted = 0  # drafts that were verified, and those that became tokens
        self.uncovered = 0.0
        self.queued_s = 0.0  # in admission queues
        self.cached = 0  # tokens of the prompt that the primary's replica had in its cache
        self.scored = 0  # tokens of the prompt whose log-probabilities were sent
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._last_run = (-1, 0)
        self._text = vocabulary.text(self.primary.tokens, sampling.skip_special_tokens, request.shown_specials)
        thinking_end = request.thinking.end if request.thinking.start else None
        self._answer = AnswerText(thinking_end, sampling.stop, sampling.include_stop_str_in_output)
        end = vocabulary.forced_texts[request.primary].end
        self._end_seen, self._tail = False, ""  # True once thinking.end was emitted, even if no thinking was open
        self._end_token = end[0] if len(end) == 1 and end[0] in vocabulary.added else None
        self._tail_bytes = b""  # the newest bytes of the answer, for `vocabulary.closing_tokens`
        self._grammar = vocabulary.matcher(request.grammar) if request.grammar and vocabulary.matcher else None

    def alpha(self, ahead: int = 0) -> float:
        """Alpha for the next token, or for the one `ahead` tokens later if the thinking does not end before."""
        return self.request.guidance.alpha_at(self.generated + ahead, self._end_seen)

    @property
    def grammar(self) -> GrammarMatcher | None:
        """The grammar in which the next token must be legal; None without one, and before the end of the thinking."""
        return None if self._answer.thinking else self._grammar

    @property
    def only_token(self) -> int | None:
        """The next token if a grammar allows no other and nothing of the request can forbid it; else None."""
        if self.grammar is None or not self.history_free or self.listed is not None:
            return None
        legal = self.grammar.few(1)
        return legal[0] if legal else None

    @property
    def history_free(self) -> bool:
        """True if the next choices depend on no earlier token but through the models and a grammar."""
        early = self.generated < self.request.sampling.min_tokens or self._thinking_is_too_short()
        return not (early or self._changes_rows)

    def decides(self, ahead: int) -> bool:
        """True if the row behind `ahead` drafts can be decided before they have become tokens."""
        return self.history_free and (self.grammar is None or self.grammar.masks > ahead)

    def required_ids(self) -> set[int]:
        """Ids of the primary whose exact logits the next row needs besides the folded events."""
        return lifted_ids(self.request.sampling, self.prompt, self.output) if self._changes_rows else set()

    def adjustments(self, ahead: int = 0) -> Adjustments | None:
        """The bias, penalties and bans of the next row, or of that behind `ahead` drafts; None if there are none.

        Before min_tokens all end ids are banned, before thinking.min_tokens the ids that complete thinking.end as text.
        """
        sampling = self.request.sampling
        early = self.generated < sampling.min_tokens
        banned = [*self.vocabulary.eos_ids[:1], *sampling.stop_token_ids] if early else []
        banned += [*self._ends_of_bad_words(), *self._ends_of_short_thinking()]
        grammar = self.grammar
        legal = None if grammar is None else grammar.legal(ahead)
        if not banned and legal is None and not changes_rows(sampling):
            return None
        return adjustments(sampling, self.prompt, self.output, banned, legal)

    def commit(
        self, token: int, alpha: float, changed: bool, drafted: bool = False, scores: Scores | None = None
    ) -> AnswerPart:
        """Append the chosen token; return the text to show. Sets `finish_reason` when the answer is over.

        drafted, scores: go into the token's note if the request wants notes. An end of the thinking before
        thinking.min_tokens is replaced by `wait`; after thinking.max_tokens `closing` and the end are forced. An end of
        the answer within a thinking that a grammar follows is replaced by the end of the thinking. Raises GrammarError
        if the grammar is given up.
        """
        self.choices.append(token)
        self.guided += alpha != 0
        self.changed += changed
        replacement = self._replacement(token)
        if replacement is not None:
            taken, shown = self._append_forced(replacement)
        else:
            for translator in self._translators:
                translator.append(token)
            taken, shown = self._append((token,))
        if self.finish_reason is None and self._thinking_is_over_limit():
            for select in (_closing_ids, _end_ids):
                if self.finish_reason is None and self._answer.thinking:
                    forced, visible = self._append_forced(select)
                    taken, shown = taken + forced, shown.then(visible)
        notes: list[TokenNote] = []
        if self.listed is not None:
            notes = [TokenNote(i, text, alpha, changed=False) for i, text in taken]
            if replacement is None:  # forced tokens are not chosen
                notes[0] = replace(notes[0], changed=changed, drafted=drafted, scores=scores)
        return AnswerPart(shown.reasoning, shown.content, [i for i, _ in taken], notes)

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> AnswerPart:
        """End the answer; return the text held back."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        shown = self._answer.push(self._text.flush())
        if shown.stop is not None:
            self.finish_reason, self.stop_reason = "stop", shown.stop
        else:
            shown = shown.then(self._answer.flush())
        return AnswerPart(shown.reasoning, shown.content)

    def replay(self, resume: Resume) -> None:
        """Bring a new session to the state at which another coordinator left it. Its text was sent before."""
        for token in resume.choices:
            self.commit(token, 0.0, False)
        self.scored = resume.scored
        tally = resume.tally
        self.guided, self.changed, self.widened = tally.guided, tally.changed, tally.widened
        self.uncovered, self.drafted, self.accepted = tally.uncovered, tally.drafted, tally.accepted
        self.queued_s += tally.queued_s
        self.cached = tally.cached

    def count_widened(self) -> None:
        """One more row needed slices wider than the first ones."""
        self.widened += 1

    def count_uncovered(self, mass: float) -> None:
        """So much probability of a guided row lay outside its candidates."""
        self.uncovered += mass

    def count_queued(self, seconds: float) -> None:
        """The session waited in an admission queue for so long."""
        self.queued_s += seconds

    def count_cached(self, tokens: int) -> None:
        """So many tokens of the prompt were in a cache. Later extends, of an evicted session, count no more."""
        if not self.generated and not self.cached:
            self.cached = max(0, min(tokens, len(self.primary)))

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """So many drafts were checked, and so many of them became tokens."""
        self.drafted += drafted
        self.accepted += accepted

    def count_scored(self, tokens: int) -> None:
        """The log-probabilities of so many more tokens of the prompt were emitted."""
        self.scored += tokens

    def tally(self) -> Tally:
        """The counts so far that a replay of the choices cannot restore."""
        counts = self.guided, self.changed, self.widened, self.uncovered, self.drafted, self.accepted
        return Tally(*counts, queued_s=self.queued_s, cached=self.cached)

    def usage(self) -> Usage:
        """The counts so far."""
        return Usage(
            prompt_tokens=len(self.request.prompts[self.request.primary]),
            completion_tokens=self.generated,
            reasoning_tokens=self.reasoning_tokens,
            guided_tokens=self.guided,
            changed_tokens=self.changed,
            widened_rows=self.widened,
            uncovered_mass=self.uncovered / self.guided if self.guided else 0.0,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            queued_s=self.queued_s,
            cached_tokens=self.cached,
        )

    def _ends_of_bad_words(self) -> list[int]:
        """Ids that would complete one of the request's bad words after the tokens so far."""
        tokens, begun = self.primary.tokens, len(self.primary) - self.generated
        return [
            word[-1]
            for word in self.request.sampling.bad_words
            if len(word) - 1 <= self.generated and tuple(tokens[max(begun, len(tokens) - len(word) + 1) :]) == word[:-1]
        ]

    def _ends_of_short_thinking(self) -> set[int]:
        """Ids that would end the thinking as text before its minimum. Its own token is not among them: `commit`
        replaces it."""
        closing = self.vocabulary.closing_tokens
        if closing is None or not self._thinking_is_too_short():
            return set()
        return closing.after(self._tail_bytes) - {self._end_token}

    def _thinking_is_too_short(self) -> bool:
        return self._answer.thinking and self.reasoning_tokens < self.request.thinking.min_tokens

    def _ends_thinking_too_early(self, token: int) -> bool:
        return self._thinking_is_too_short() and (token in self.vocabulary.eos_ids or token == self._end_token)

    def _replacement(self, token: int) -> Callable[[ForcedTextIds], tuple[int, ...]] | None:
        """Picks the forced text that takes the place of a chosen token; None if the token stays."""
        if self._ends_thinking_too_early(token):
            return _wait_ids
        ends = token in self.vocabulary.eos_ids and not self.request.sampling.ignore_eos
        return _end_ids if ends and self._grammar is not None and self._answer.thinking else None

    def _thinking_is_over_limit(self) -> bool:
        limit = self.request.thinking.max_tokens
        return self._answer.thinking and limit is not None and self.reasoning_tokens >= limit

    def _append_forced(
        self, select: Callable[[ForcedTextIds], tuple[int, ...]]
    ) -> tuple[list[tuple[int, str]], VisibleText]:
        """Append a text that was not chosen. select: picks the text's ids from those of a role."""
        forced_texts = self.vocabulary.forced_texts
        ours = select(forced_texts[self.request.primary])
        if ours:
            for role, translator in self.translators.items():
                translator.append_forced(ours, select(forced_texts[role]))
        return self._append(ours)

    def _append(self, ids: Sequence[int]) -> tuple[list[tuple[int, str]], VisibleText]:
        """Append ids of the primary until the answer is over; return them with their texts, and the text to show.

        The streams of the other roles hold them already.
        """
        taken: list[tuple[int, str]] = []
        shown: VisibleText | None = None
        closing = self.vocabulary.closing_tokens
        for token in ids:
            self.primary.tokens.append(token)
            self.output[token] += 1
            self.generated += 1
            self.reasoning_tokens += self._answer.thinking
            self._last_run = (token, self._last_run[1] + 1 if token == self._last_run[0] else 1)
            text = self._text.push(token)
            if closing is not None:
                self._tail_bytes = closing.extend(self._tail_bytes, token)
            if self.grammar is not None and token not in self.vocabulary.eos_ids:
                self.grammar.take(token)
            if not self._end_seen:
                self._watch_for_thinking_end(token, text)
            taken.append((token, text))
            visible = self._visible_text(token, text)
            shown = visible if shown is None else shown.then(visible)
            if self.finish_reason is not None:
                break
        return taken, shown or VisibleText()

    def _watch_for_thinking_end(self, token: int, text: str) -> None:
        end = self.request.thinking.end
        if end:
            self._tail = (self._tail + text)[-len(end) - len(text) :]
            self._end_seen = token == self._end_token or end in self._tail

    def _visible_text(self, token: int, text: str) -> VisibleText:
        """The text that one more token of the primary shows. Sets `finish_reason` if the answer is over."""
        sampling = self.request.sampling
        ends = token in self.vocabulary.eos_ids and not sampling.ignore_eos
        if ends or token in sampling.stop_token_ids:
            kept = self._answer.push(text) if sampling.include_stop_str_in_output else VisibleText()
            return kept.then(self._end("stop", None if ends else token))
        shown = self._answer.push(text)
        if token == self._end_token and self._answer.thinking:
            shown = shown.then(self._answer.close_thinking())
        elif shown.closed:
            self._retokenize_end()
            if self._grammar is not None and (rest := (shown.content + self._answer.held).lstrip()):
                self._grammar.take_text(rest)  # the token that ends the thinking has text behind the end
        if shown.stop is not None:
            self.finish_reason, self.stop_reason = "stop", shown.stop
        elif sampling.stop_on_repeat and self._last_run[1] >= sampling.stop_on_repeat:
            shown = shown.then(self._end("stop", "repeat"))
        elif self.grammar is not None and self.grammar.over and self._end_is_excluded():
            shown = shown.then(self._end("stop"))
        elif sampling.max_tokens is not None and self.generated >= sampling.max_tokens:
            shown = shown.then(self._end("length"))
        return shown

    def _end_is_excluded(self) -> bool:
        """True if the next token cannot end the answer, although a grammar may allow no other."""
        sampling = self.request.sampling
        return sampling.ignore_eos or self.generated < sampling.min_tokens or not self.vocabulary.eos_ids

    def _end(self, reason: FinishReason, stop_reason: str | int | None = None) -> VisibleText:
        rest = self.finish(reason, stop_reason)
        return VisibleText(rest.reasoning, rest.content)

    def _retokenize_end(self) -> None:
        """The answer ends with the end of the thinking as text: roles with one token for it get that token instead."""
        ours = self.vocabulary.forced_texts[self.request.primary].end
        if tuple(self.primary.tokens[-len(ours) :]) != ours:
            return
        for role, translator in self.translators.items():
            translator.retokenize(ours, self.vocabulary.forced_texts[role].end, self.request.thinking.end)


def _closing_ids(forced: ForcedTextIds) -> tuple[int, ...]:
    return forced.closing


def _wait_ids(forced: ForcedTextIds) -> tuple[int, ...]:
    return forced.wait


def _end_ids(forced: ForcedTextIds) -> tuple[int, ...]:
    return forced.end
