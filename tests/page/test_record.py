"""Answers are recorded from a service over HTTP, as chats and as raw texts; failures are told with a way out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from actors.config import ConfigError
from cluster.page.questions import read_questions
from cluster.page.record import record_file
from cluster.page.recording import KINDS, read_recording
from router.api import create_app
from tests.support.browsing import SCRIPT, ScriptedService, serving
from tests.support.scripted_service import ScriptedBackend, config, tokenizers

QUESTIONS: dict[str, Any] = {
    "title": "A trio",
    "about": "For tests.",
    "models": {"target": "T", "guider": "G", "guider_base": "B"},
    "settings": {"alpha": 0.5, "warmup_tokens": 2, "temperature": 0.6, "max_tokens": 20, "seed": 3},
    "questions": [{"question": "Why?", "gold": "So."}, {"question": "How?", "gold": "Thus."}],
}


def questions(folder: Path, **more: Any) -> Path:
    """A file of questions, as JSON, which is YAML too."""
    file = folder / "asked.yaml"
    file.write_text(json.dumps(QUESTIONS | more))
    return file


@pytest.fixture
def script() -> ScriptedService:
    return ScriptedService(config(), SCRIPT)


@pytest.fixture
def scripted(script: ScriptedService) -> Iterator[str]:
    with serving(script.create) as url:
        yield url


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def routed(backend: ScriptedBackend) -> Iterator[str]:
    """The router over a scripted backend."""

    @asynccontextmanager
    async def create() -> AsyncIterator[FastAPI]:
        yield create_app(config(), tokenizers(), backend)

    with serving(create) as url:
        yield url


def test_each_question_is_asked_in_all_modes_as_the_playground_does(
    tmp_path: Path, script: ScriptedService, scripted: str
) -> None:
    assert record_file(questions(tmp_path, request={"stop": ["."]}, guidance={"guide": "thinking"}), scripted) == 0
    rehearsal, *bodies = script.requests
    assert rehearsal["model"] == "duo", "the first answer is not recorded"
    assert sorted((body["model"], body["messages"][0]["content"]) for body in bodies) == sorted(
        (model, question) for model in ("duo", "duo/guider", "duo/target") for question in ("Why?", "How?")
    )
    for body in bodies:
        guided = {"alpha": 0.5, "warmup_tokens": 2, "guide": "thinking", "explain": True}
        assert body["guidance"] == (guided if body["model"] == "duo" else {"explain": True})
        assert (body["temperature"], body["max_tokens"], body["seed"], body["stop"]) == (0.6, 20, 3, ["."])


def test_a_recording_keeps_texts_times_counts_and_candidates(tmp_path: Path, scripted: str) -> None:
    assert record_file(questions(tmp_path), scripted) == 0
    recording = read_recording(tmp_path / "asked.json")
    assert recording["command"] == f"python -m cluster.page --record {tmp_path / 'asked.yaml'} --url {scripted}"
    assert recording["served"] == {"target": "duo/target", "guider": "duo/guider", "guided": "duo"}
    assert (recording["longest"], recording["cores"]) == (4096, None)
    vocabulary = recording["vocabulary"]
    second = recording["questions"][1]
    assert (second["question"], second["gold"]) == ("How?", "Thus.")
    answers = second["answers"]
    assert answers.keys() == {*KINDS}
    for kind, answer in answers.items():
        times, thoughts, texts, tokens = zip(*answer["chunks"], strict=True)
        assert list(times) == sorted(times)
        assert ("".join(thoughts), "".join(texts)) == ("It is Vera", "So: Vera.")
        packed = [token for listed in tokens for token in listed]
        assert [vocabulary[token[0]][1] for token in packed] == [
            *("It", " is", " Vera", "</think>", "So", ":", " Vera", ".", "")
        ]
        assert {len(token) for token in packed} == {8 if kind == "guided" else 3}, (
            "candidates of the guided answer only"
        )
        counts = {"completion_tokens": 9, "changed_tokens": 1, "drafted_tokens": 8, "acceptance": 0.75}
        assert (answer["finish_reason"], answer["usage"]) == ("stop", counts)
    entry, alpha, flags, shift, probability, target, *_ = answers["guided"]["chunks"][1][3][0]
    assert (vocabulary[entry][1], alpha, flags, shift, probability) == (" Vera", 1.0, 3, 1.3863, 0.8)
    listed = [vocabulary[target[at]][1] for at in (0, 2)]
    assert (listed, target[1::2]) == ([" Nora", " Vera"], [0.4, 0.2])


def test_a_raw_prompt_is_asked_as_a_completion(tmp_path: Path, backend: ScriptedBackend, routed: str) -> None:
    assert record_file(questions(tmp_path, prompt="Q: {question}\nA:"), routed) == 0
    texts = {tokenizers()[role].decode(ids) for request in backend.requests for role, ids in request.prompts.items()}
    assert {text.removeprefix("<bos>") for text in texts} == {"Q: Why?\nA:", "Q: How?\nA:"}
    answer = read_recording(tmp_path / "asked.json")["questions"][0]["answers"]["guided"]
    assert "".join(content for _, _, content, _ in answer["chunks"]) == "It is Eve ."


def test_a_refusal_and_a_broken_answer_are_told_and_nothing_is_written(
    tmp_path: Path, backend: ScriptedBackend, routed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record_file(questions(tmp_path, request={"max_token": 1}), routed) == 1
    assert "max_token" in capsys.readouterr().out
    backend.error = "a replica was lost"
    assert record_file(questions(tmp_path), routed) == 1
    assert "a replica was lost" in capsys.readouterr().out
    assert not (tmp_path / "asked.json").exists()


def test_a_service_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record_file(questions(tmp_path), "http://127.0.0.1:9") == 1
    assert "no service answers at http://127.0.0.1:9" in capsys.readouterr().out


def test_answers_do_not_overwrite_their_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = questions(tmp_path).rename(tmp_path / "asked.json")
    assert record_file(file, "http://127.0.0.1:9") == 1
    assert "would be overwritten" in capsys.readouterr().out
    assert json.loads(file.read_text()) == QUESTIONS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"question": []}, "question: unknown key"),
        ({"questions": []}, "questions"),
        ({"questions": [{"question": "Why?"}]}, "questions.0.gold"),
        ({"questions": [{"question": each, "gold": "So."} for each in ("Why?", " Why? ")]}, "repeats a question"),
        ({"prompt": "Q:"}, "must hold {question} once"),
        ({"request": {"temperature": 1}}, "request must not set temperature"),
        ({"guidance": {"alpha": 1}}, "guidance must not set alpha"),
        ({"settings": {}}, "settings.max_tokens"),
        ({"models": {"target": "T"}}, "models.guider"),
    ],
)
def test_wrong_keys_of_a_file_of_questions_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_questions(questions(tmp_path, **change))
    assert named in str(refused.value)
