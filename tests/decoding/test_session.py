"""The state of a sequence: its text, its end, and each role's token stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from actors.api.generation import Delta, Generate, Resume, Role, Scores
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.decoding.closing_tokens import ClosingTokens
from actors.decoding.hashing import extend_hashes
from actors.decoding.session import ForcedTextIds, Session, SessionVocabulary
from actors.decoding.stream import Stream
from actors.decoding.vocabulary import Vocabulary, map_vocabulary
from tests.decoding.compiled import adjust
from tests.support.letter_vocabularies import adapter, text, vocabulary

END = "</think>"
LETTER = text()
SMALL: tuple[Role, ...] = ("guider", "guider_base")


@dataclass
class Letters:
    """A text stream: each id is its token, except special tokens, and `late` ids, whose text comes one token later."""

    texts: dict[int, str]
    late: frozenset[int] = frozenset()
    held: str = ""

    def push(self, token: int, /) -> str:
        text, self.held = self.held + self.texts[token], ""
        if token in self.late:
            text, self.held = "", text
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


@dataclass
class Setting:
    """Three vocabularies and the sessions over them. special: added tokens without text."""

    target: Vocabulary = field(default_factory=lambda: vocabulary({"<e>": 40, "<e2>": 41, END: 42}, ["<e>", "<e2>"]))
    small: Vocabulary = field(default_factory=lambda: vocabulary({"<e>": 52, END: 50}, ["<e>"], first=20))
    special: tuple[str, ...] = ("<e>", "<e2>")
    late: frozenset[int] = frozenset()

    def session(
        self,
        *,
        sampling: Sampling | None = None,
        thinking: Thinking | None = None,
        guidance: Guidance | None = None,
        explain: bool = False,
    ) -> Session:
        """A session whose prompt is `ab`."""
        thinking = thinking or Thinking()
        texts = {i: t for tokens in (self.target.text, self.target.added) for t, i in tokens.items()}
        texts |= {self.target.added[t]: "" for t in self.special}
        vocabularies: dict[Role, Vocabulary] = {"target": self.target, **dict.fromkeys(SMALL, self.small)}
        vocabulary = SessionVocabulary(
            {role: map_vocabulary(self.target, self.small, adapter(self.small)) for role in SMALL},
            {
                role: ForcedTextIds(*(tuple(adapter(v)(t)) for t in (thinking.end, thinking.wait, thinking.closing)))
                for role, v in vocabularies.items()
            },
            self.target.eos_ids,
            frozenset(self.target.added.values()),
            lambda after, skip, shown: Letters(
                texts if skip else texts | {i: t for t, i in self.target.added.items()}, self.late
            ),
            ClosingTokens(thinking.end, texts, lambda i: texts[i].encode()) if thinking.min_tokens else None,
        )
        prompts = {role: adapter(v)("ab") for role, v in vocabularies.items()}
        request = Generate("r", "target", prompts, sampling or Sampling(), guidance or Guidance(), thinking, 1, explain)
        return Session(request, vocabulary, dict.fromkeys(vocabularies, 9))


def feed(session: Session, tokens: Sequence[int] | str, alpha: float = 1.0) -> Delta:
    """Commit tokens (or the text tokens of a string) until the session is over; return all text shown."""
    total = Delta()
    for token in [LETTER[c] for c in tokens] if isinstance(tokens, str) else tokens:
        assert session.finish_reason is None
        part = session.commit(token, alpha, changed=False)
        total = total + Delta(part.reasoning, part.content, list(part.tokens), list(part.notes))
    return total


def generated(session: Session, role: Role = "target") -> list[int]:
    return session.streams[role].tokens[2:]


THINK = Thinking(start="<think>", end=END, wait="bad")
TEXT_TARGET = Setting(vocabulary({"<e>": 40, "<e2>": 41}, ["<e>", "<e2>"]))  # writes the thinking's end as text


# -- streams


def test_a_stream_keeps_the_hash_of_every_prefix() -> None:
    stream = Stream(7, [3, 1])
    stream.append([4, 1])
    assert len(stream) == 4
    assert [stream.hash_before(n) for n in range(5)] == [7, *extend_hashes(7, [3, 1, 4, 1])]


def test_a_replaced_tail_is_hashed_anew_and_no_longer_held() -> None:
    stream = Stream(7, [3, 1, 4])
    stream.held = 3
    stream.replace_tail(2, [9])
    assert stream.tokens == [3, 9]
    assert stream.hash_before(2) == extend_hashes(7, [3, 9])[-1]
    assert stream.held == 1


def test_another_models_stream_starts_from_its_seed_and_holds_nothing() -> None:
    stream = Stream(7, [3, 1])
    stream.held = 2
    stream.reseed(8)
    assert stream.tokens == [3, 1]
    assert stream.held == 0
    assert stream.hash_before(2) == extend_hashes(8, [3, 1])[-1]


# -- streams of the roles


def test_each_stream_has_the_answer_in_its_own_ids() -> None:
    session = Setting().session(thinking=THINK)
    feed(session, [LETTER["a"], 42, LETTER["b"]])
    assert generated(session) == [LETTER["a"], 42, LETTER["b"]]
    assert generated(session, "guider") == [LETTER["a"] + 20, 50, LETTER["b"] + 20]


def test_a_token_that_a_role_lacks_is_appended_as_text() -> None:
    setting = Setting(small=vocabulary({"<e>": 52}, ["<e>"], first=20))
    session = setting.session(thinking=THINK)
    feed(session, [42])
    assert generated(session, "guider") == [LETTER[c] + 20 for c in END]


# -- the end


def test_any_end_token_ends_the_answer_and_is_counted() -> None:
    for end in (40, 41):
        session = Setting().session()
        delta = feed(session, [LETTER["a"], end])
        assert (delta.content, delta.tokens) == ("a", [LETTER["a"], end])
        assert (session.finish_reason, session.stop_reason) == ("stop", None)
        assert session.usage().completion_tokens == 2


def test_an_ignored_end_token_is_appended_to_all_streams() -> None:
    session = Setting().session(sampling=Sampling(ignore_eos=True))
    feed(session, [40, LETTER["a"]])
    assert session.finish_reason is None
    assert generated(session, "guider") == [52, LETTER["a"] + 20]


def test_the_answer_ends_at_exactly_max_tokens() -> None:
    session = Setting().session(sampling=Sampling(max_tokens=3))
    assert feed(session, "abc").content == "abc"
    assert session.finish_reason == "length"


def test_an_end_token_at_max_tokens_is_a_stop() -> None:
    session = Setting().session(sampling=Sampling(max_tokens=2))
    feed(session, [LETTER["a"], 40])
    assert session.finish_reason == "stop"


def test_a_stop_token_ends_the_answer_without_its_text() -> None:
    session = Setting().session(sampling=Sampling(stop_token_ids=(LETTER["c"],)))
    assert feed(session, "abc").content == "ab"
    assert (session.finish_reason, session.stop_reason) == ("stop", LETTER["c"])


def test_a_stop_text_across_tokens_ends_the_answer() -> None:
    session = Setting().session(sampling=Sampling(stop=("bc",)))
    assert feed(session, "abbc").content == "ab"
    assert (session.finish_reason, session.stop_reason) == ("stop", "bc")


def test_a_stop_text_is_kept_when_asked_for() -> None:
    session = Setting().session(sampling=Sampling(stop=("bc",), include_stop_str_in_output=True))
    assert feed(session, "abc").content == "abc"


def test_special_tokens_stand_in_the_text_where_they_are_not_skipped() -> None:
    for skip, said in ((True, "ab"), (False, "a<e2>b")):
        session = Setting().session(sampling=Sampling(ignore_eos=True, skip_special_tokens=skip))
        assert feed(session, [LETTER["a"], 41, LETTER["b"]]).content == said


def test_no_token_completes_a_bad_word() -> None:
    a, b, c = (LETTER[letter] for letter in "abc")
    session = Setting().session(sampling=Sampling(bad_words=((c,), (a, b), (b, a, b))))
    for said, banned in (("", {c}), ("a", {b, c}), ("b", {c}), ("a", {b, c})):
        feed(session, said)
        ids, logits = np.array(sorted((a, b, c))), np.zeros(3)
        adjust(ids, logits, session.request.sampling, session.adjustments())
        assert set(ids[np.isneginf(logits)]) == banned


def test_nothing_but_what_is_allowed_may_be_chosen() -> None:
    a, b, c = (LETTER[letter] for letter in "abc")
    session = Setting().session(sampling=Sampling(allowed_token_ids=(c, a)))
    ids, logits = np.array(sorted((a, b, c))), np.zeros(3)
    adjust(ids, logits, session.request.sampling, session.adjustments())
    assert set(ids[np.isneginf(logits)]) == {b}


@pytest.mark.parametrize(("include", "said"), [(False, "a"), (True, "ab")])
def test_a_stop_id_stands_in_the_text_where_stops_are_included(include: bool, said: str) -> None:
    sampling = Sampling(stop_token_ids=(LETTER["b"],), include_stop_str_in_output=include)
    session = Setting().session(sampling=sampling)
    assert feed(session, "ab").content == said
    assert (session.finish_reason, session.stop_reason) == ("stop", LETTER["b"])


@pytest.mark.parametrize(("skip", "include", "said"), [(False, True, "a<e>"), (False, False, "a"), (True, True, "a")])
def test_the_end_token_is_shown_with_stops_and_special_tokens(skip: bool, include: bool, said: str) -> None:
    session = Setting().session(sampling=Sampling(skip_special_tokens=skip, include_stop_str_in_output=include))
    assert feed(session, [LETTER["a"], 40]).content == said
    assert (session.finish_reason, session.stop_reason) == ("stop", None)


def test_text_held_back_for_a_stop_is_shown_at_the_end() -> None:
    session = Setting().session(sampling=Sampling(stop=("bcd",), max_tokens=3))
    assert session.commit(LETTER["a"], 1.0, False).content == "a"
    assert session.commit(LETTER["b"], 1.0, False).content == ""
    assert session.commit(LETTER["c"], 1.0, False).content == "bc"


def test_a_stop_text_in_a_half_decoded_character_counts_at_the_end() -> None:
    setting = Setting(late=frozenset([LETTER["c"]]))
    session = setting.session(sampling=Sampling(stop=("bc",), max_tokens=3))
    assert feed(session, "abc").content == "a"
    assert (session.finish_reason, session.stop_reason) == ("stop", "bc")


def test_the_same_token_so_many_times_in_a_row_ends_the_answer() -> None:
    session = Setting().session(sampling=Sampling(stop_on_repeat=3))
    assert feed(session, "aabaaa").content == "aabaaa"
    assert (session.finish_reason, session.stop_reason) == ("stop", "repeat")


def test_repeats_are_not_counted_unless_asked() -> None:
    session = Setting().session()
    feed(session, "a" * 50)
    assert session.finish_reason is None


def test_nothing_may_end_the_answer_before_min_tokens() -> None:
    session = Setting().session(sampling=Sampling(min_tokens=2, stop_token_ids=(3,)))
    ids = np.array([1, 3, 40])
    for expected in ([0, -np.inf, -np.inf], [0, -np.inf, -np.inf], [0, 0, 0]):
        logits = np.zeros(3)
        adjust(ids, logits, session.request.sampling, session.adjustments())
        assert logits.tolist() == expected
        feed(session, "a")


def test_finishing_from_outside_shows_what_was_held_back() -> None:
    setting = Setting(late=frozenset([LETTER["c"]]))
    session = setting.session(sampling=Sampling(stop=("bd",)))
    feed(session, "abc")
    assert session.finish("abort").content == "bc"
    assert session.finish_reason == "abort"


# -- thinking


def test_thinking_ends_by_a_token_with_text() -> None:
    session = Setting().session(thinking=THINK)
    delta = feed(session, [LETTER["a"], 42, LETTER["b"]])
    assert (delta.reasoning, delta.content) == ("a", "b")
    assert session.usage().reasoning_tokens == 2


def test_thinking_ends_by_a_token_without_text() -> None:
    session = Setting(special=("<e>", "<e2>", END)).session(thinking=THINK)
    delta = feed(session, [LETTER["<"], 42, LETTER["b"]])
    assert (delta.reasoning, delta.content) == ("<", "b")


def test_thinking_ends_by_text_across_tokens() -> None:
    session = TEXT_TARGET.session(thinking=THINK)
    delta = feed(session, f"a{END}b")
    assert (delta.reasoning, delta.content) == ("a", "b")
    assert session.usage().reasoning_tokens == 1 + len(END)


def test_without_thinking_all_text_is_content() -> None:
    delta = feed(Setting().session(), [LETTER["a"], 42, LETTER["b"]])
    assert (delta.reasoning, delta.content) == ("", f"a{END}b")


def test_guiding_the_thinking_ends_with_it() -> None:
    session = Setting().session(thinking=THINK, guidance=Guidance(0.5, guide="thinking"))
    assert session.alpha() == 0.5
    feed(session, "a")
    assert session.alpha() == 0.5
    feed(session, [42])
    assert session.alpha() == 0


@pytest.mark.parametrize("setting", [Setting(), Setting(special=("<e>", "<e2>", END)), TEXT_TARGET])
def test_thinking_guidance_ends_also_if_the_prompt_opened_the_thinking(setting: Setting) -> None:
    session = setting.session(thinking=Thinking("", END), guidance=Guidance(0.5, guide="thinking"))
    tokens = [42] if END in setting.target.added else [LETTER[c] for c in END]
    feed(session, "ab")
    feed(session, tokens[:-1])
    assert session.alpha() == 0.5
    feed(session, tokens[-1:])
    assert session.alpha() == 0
    feed(session, "c" * 30)
    assert session.alpha() == 0


def test_guiding_the_thinking_without_an_end_guides_always() -> None:
    session = Setting().session(thinking=Thinking("", ""), guidance=Guidance(0.5, guide="thinking"))
    feed(session, "ab")
    assert session.alpha() == 0.5


def test_an_early_end_that_became_wait_ends_no_guidance() -> None:
    thinking = Thinking("<think>", END, min_tokens=2, wait="bad")
    session = Setting().session(thinking=thinking, guidance=Guidance(0.5, guide="thinking"))
    feed(session, [42])
    assert session.alpha() == 0.5


def test_the_thinkings_end_is_forced_in_each_roles_own_spelling() -> None:
    session = TEXT_TARGET.session(thinking=Thinking("<think>", END, max_tokens=2))
    delta = feed(session, "ab")
    assert generated(session) == [LETTER[c] for c in f"ab{END}"]
    assert generated(session, "guider") == [LETTER["a"] + 20, LETTER["b"] + 20, 50]
    assert (delta.reasoning, delta.content) == ("ab", "")
    assert delta.tokens == generated(session)
    assert feed(session, "c").content == "c"


def test_a_forced_end_follows_the_closing_text_in_each_role() -> None:
    session = TEXT_TARGET.session(thinking=Thinking("<think>", END, max_tokens=2, closing="so"))
    delta = feed(session, "ab")
    assert generated(session) == [LETTER[c] for c in f"abso{END}"]
    assert generated(session, "guider") == [*(LETTER[c] + 20 for c in "abso"), 50]
    assert (delta.reasoning, delta.content) == ("abso", "")
    assert session.usage().reasoning_tokens == 4 + len(END)
    assert feed(session, "c").content == "c"


def test_an_end_that_comes_by_itself_has_no_closing_text() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, max_tokens=2, closing="so"))
    feed(session, [LETTER["a"], 42, LETTER["b"]])
    assert generated(session) == [LETTER["a"], 42, LETTER["b"]]


def test_a_closing_text_that_ends_the_answer_is_the_last() -> None:
    for sampling, reason in ((Sampling(max_tokens=3), "length"), (Sampling(stop=("s",)), "stop")):
        thinking = Thinking("<think>", END, max_tokens=2, closing="so")
        session = TEXT_TARGET.session(thinking=thinking, sampling=sampling)
        assert feed(session, "ab").tokens == [LETTER[c] for c in "abs"]
        assert session.finish_reason == reason


def test_a_closing_text_that_completes_the_end_is_the_end() -> None:
    thinking = Thinking("<think>", END, max_tokens=len(END) - 1, closing=END[-1])
    session = TEXT_TARGET.session(thinking=thinking)
    feed(session, END[:-1])
    assert generated(session) == [LETTER[c] for c in END]
    assert feed(session, "c").content == "c"


def test_the_time_in_queues_adds_up_over_coordinators() -> None:
    session, again = (Setting().session() for _ in range(2))
    session.count_queued(1.5)
    again.replay(Resume([], session.tally()))
    again.count_queued(0.25)
    assert again.usage().queued_s == again.tally().queued_s == 1.75


def test_cached_tokens_are_those_of_the_prompts_first_computation() -> None:
    session, again = (Setting().session() for _ in range(2))
    for tokens in (1, 2):  # the second one of an evicted session
        session.count_cached(tokens)
    feed(session, "a")
    again.replay(Resume(session.choices, session.tally()))
    again.count_cached(2)
    assert again.usage().cached_tokens == session.usage().cached_tokens == 1
    endless = Setting().session()
    endless.count_cached(2**31 - 1)
    assert endless.usage().cached_tokens == 2  # the prompt's length


def test_a_replay_repeats_the_closing_text() -> None:
    thinking = Thinking("<think>", END, max_tokens=2, closing="so")
    session, again = (TEXT_TARGET.session(thinking=thinking) for _ in range(2))
    feed(session, "abc")
    again.replay(Resume(session.choices, session.tally()))
    assert {role: stream.tokens for role, stream in again.streams.items()} == {
        role: stream.tokens for role, stream in session.streams.items()
    }


def test_a_forced_end_may_be_one_token_here_and_text_there() -> None:
    setting = Setting(small=vocabulary({"<e>": 52}, ["<e>"], first=20))
    session = setting.session(thinking=Thinking("<think>", END, max_tokens=1))
    assert feed(session, "a").tokens == [LETTER["a"], 42]
    assert generated(session, "guider") == [LETTER[c] + 20 for c in f"a{END}"]


def test_an_end_that_comes_by_itself_is_not_forced_again() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, max_tokens=2))
    feed(session, [LETTER["a"], 42, LETTER["b"]])
    assert generated(session) == [LETTER["a"], 42, LETTER["b"]]


def test_a_forced_end_stops_at_max_tokens() -> None:
    session = TEXT_TARGET.session(thinking=Thinking("<think>", END, max_tokens=2), sampling=Sampling(max_tokens=5))
    assert len(feed(session, "ab").tokens) == 5
    assert session.finish_reason == "length"


@pytest.mark.parametrize("early", [40, 41, 42])
def test_an_early_end_of_the_thinking_becomes_wait(early: int) -> None:
    session = Setting().session(thinking=Thinking("<think>", END, min_tokens=4, wait="bad"))
    delta = feed(session, [LETTER["a"], early])
    assert generated(session) == [LETTER[c] for c in "abad"]
    assert generated(session, "guider") == [LETTER[c] + 20 for c in "abad"]
    assert delta.reasoning == "abad"
    feed(session, [42])
    assert not session.finish_reason
    assert feed(session, [LETTER["c"]]).content == "c"


def banned(session: Session) -> set[int]:
    """The target's ids that the next row excludes."""
    ids, logits = np.arange(60), np.zeros(60)
    adjust(ids, logits, session.request.sampling, session.adjustments())
    return {int(i) for i in ids[np.isneginf(logits)]}


def test_the_token_that_completes_an_early_end_is_banned() -> None:
    session = TEXT_TARGET.session(thinking=Thinking("<think>", END, min_tokens=12, wait="bad"))
    for before in END:
        assert (before == ">") == bool(banned(session)), "only the last letter completes the end"
        assert not session.history_free
        if before != ">":
            feed(session, before)
    assert banned(session) == {LETTER[">"]}
    assert banned(session) == {LETTER[">"]}, "asking changes nothing"
    feed(session, "a")
    assert banned(session) == set()
    feed(session, "bab")
    assert session.reasoning_tokens == 11
    feed(session, END[:-1])
    assert banned(session) == set(), "enough was thought"
    assert session.history_free
    assert feed(session, ">a").content == "a"


def test_an_end_of_one_token_is_replaced_and_not_banned() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, min_tokens=9, wait="bad"))
    assert banned(session) == set()
    feed(session, END[:-1])
    assert banned(session) == {LETTER[">"]}, "the same end as text"


def test_nothing_is_banned_without_a_minimum_of_thinking() -> None:
    session = TEXT_TARGET.session(thinking=THINK)
    feed(session, END[:-1])
    assert (banned(session), session.history_free) == (set(), True)


def test_the_end_after_enough_thinking_stands() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, min_tokens=2))
    feed(session, [LETTER["a"], LETTER["b"], 40])
    assert session.finish_reason == "stop"


def test_content_may_end_at_once() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, min_tokens=1))
    feed(session, [LETTER["a"], 42, 40])
    assert session.finish_reason == "stop"


# -- an end that is written as text


def test_an_end_written_as_text_becomes_the_roles_own_token() -> None:
    session = TEXT_TARGET.session(thinking=THINK)
    session.streams["guider"].held = 2 + 1 + len(END) - 1  # all but the last letter
    feed(session, f"a{END}b")
    assert generated(session) == [LETTER[c] for c in f"a{END}b"]
    assert generated(session, "guider") == [LETTER["a"] + 20, 50, LETTER["b"] + 20]
    assert session.streams["guider"].held == 3


def test_an_end_across_other_token_boundaries_stays() -> None:
    session = TEXT_TARGET.session(thinking=THINK)
    forced_texts = {**session.vocabulary.forced_texts, "target": ForcedTextIds((LETTER["<"],), ())}
    session.vocabulary = replace(session.vocabulary, forced_texts=forced_texts)
    feed(session, f"a{END}b")
    assert generated(session, "guider") == [LETTER[c] + 20 for c in f"a{END}b"]


def test_a_role_without_an_end_token_keeps_the_text() -> None:
    setting = Setting(TEXT_TARGET.target, vocabulary({"<e>": 52}, ["<e>"], first=20))
    session = setting.session(thinking=THINK)
    feed(session, f"a{END}b")
    assert generated(session, "guider") == [LETTER[c] + 20 for c in f"a{END}b"]


# -- counts


def test_usage_counts_what_guidance_did() -> None:
    session = Setting().session(guidance=Guidance(1.0, warmup_tokens=1))
    session.commit(LETTER["a"], 0.0, changed=False)
    session.commit(LETTER["b"], 1.0, changed=True)
    session.commit(LETTER["c"], 1.0, changed=False)
    session.uncovered = 0.5
    usage = session.usage()
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 3)
    assert (usage.guided_tokens, usage.changed_tokens) == (2, 1)
    assert usage.uncovered_mass == 0.25


def test_notes_hold_each_token_and_its_alpha() -> None:
    session = Setting().session(explain=True)
    (note,) = session.commit(LETTER["a"], 0.5, changed=True).notes
    assert (note.id, note.text, note.alpha, note.changed) == (LETTER["a"], "a", 0.5, True)
    assert Setting().session().commit(LETTER["a"], 0.5, changed=True).notes == []


@pytest.mark.parametrize("chosen", ["a", "<", "h"])
def test_notes_of_forced_tokens_are_not_marked_changed(chosen: str) -> None:
    session = TEXT_TARGET.session(thinking=Thinking("<think>", END, max_tokens=1), explain=True)
    notes = session.commit(LETTER[chosen], 0.5, changed=True).notes
    assert [note.text for note in notes] == [chosen, *END]
    assert [note.changed for note in notes] == [True, *[False] * len(END)]


def test_scores_are_in_the_note_of_their_token_only() -> None:
    said = Scores(-0.5, 0.25, ((LETTER["a"], -0.5),))
    session = TEXT_TARGET.session(thinking=Thinking("<think>", END, max_tokens=1), explain=True)
    first, *forced = session.commit(LETTER["a"], 0.5, changed=False, drafted=True, scores=said).notes
    assert (first.drafted, first.scores) == (True, said)
    assert {(note.drafted, note.scores) for note in forced} == {(False, None)}


def test_a_wait_instead_of_an_end_has_no_scores() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, min_tokens=9, wait="bad"), explain=True)
    notes = session.commit(42, 0.5, True, True, Scores(-0.5, 0.25, ())).notes
    assert [(note.drafted, note.scores) for note in notes] == [(False, None)] * 3


def test_a_wait_instead_of_an_end_is_not_marked_changed() -> None:
    session = Setting().session(thinking=Thinking("<think>", END, min_tokens=9, wait="bad"), explain=True)
    notes = session.commit(42, 0.5, changed=True).notes
    assert [(note.text, note.changed) for note in notes] == [(c, False) for c in "bad"]


def test_penalties_count_what_was_forced_too() -> None:
    session = Setting().session(
        thinking=Thinking("<think>", END, max_tokens=1), sampling=Sampling(presence_penalty=-1.0)
    )
    feed(session, "a")
    assert session.required_ids() == {LETTER["a"], 42}
