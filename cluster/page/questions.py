"""The YAML or JSON file of a recording's questions.

title: Embedded trio
about: Three tiny models of the repository.     # for the reader of the page
models: {target: ..., guider: ..., guider_base: ...}   # names, for the reader
service: ray_config.yaml      # the Serve config file of the service to start
settings: {alpha: 1.0, warmup_tokens: 0, temperature: 0, max_tokens: 160, seed: 1}
request: {stop: ["\\n\\n"]}   # further fields of each request
guidance: {guide: thinking}   # further fields of the guided mode's guidance
prompt: "Q: {question}\\nA:"  # asks with this raw text; without: as a user's message of a chat
questions: [{question: "Who is ...?", gold: Ada}]   # gold: the right answer, for the reader
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from cluster.jobs.config import Section, validated
from cluster.page.recording import Kind
from cluster.serve_file import read_mapping

QUESTION = "{question}"
_OWN_FIELDS = ("model", "messages", "prompt", "guidance", "stream", "stream_options")
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class ModelNames(Section):
    """The name of each role's model, for the reader."""

    target: Text
    guider: Text
    guider_base: Text


class Settings(Section):
    """The settings of the playground, in tokens where they count. alpha, warmup_tokens: of the guided mode."""

    alpha: float = Field(1.0, ge=0, le=2)
    warmup_tokens: int = Field(0, ge=0)
    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(ge=1)
    seed: int = Field(1, ge=0)


class GradedQuestion(Section):
    """A question and its right answer, for the reader."""

    question: Text
    gold: Text


class Questions(Section):
    """The questions of a recording, and how to ask them."""

    title: Text
    about: Text
    models: ModelNames
    service: Path = Path("ray_config.yaml")
    settings: Settings
    request: dict[str, Any] = Field(default_factory=dict)
    guidance: dict[str, Any] = Field(default_factory=dict)
    prompt: str | None = None
    questions: tuple[GradedQuestion, ...] = Field(min_length=1)

    @field_validator("prompt")
    @classmethod
    def _with_question(cls, prompt: str | None) -> str | None:
        if prompt is not None and prompt.count(QUESTION) != 1:
            raise ValueError(f"must hold {QUESTION} once")
        return prompt

    @field_validator("questions")
    @classmethod
    def _different(cls, questions: tuple[GradedQuestion, ...]) -> tuple[GradedQuestion, ...]:
        if len({each.question for each in questions}) < len(questions):
            raise ValueError("repeats a question")
        return questions

    @model_validator(mode="after")
    def _no_field_twice(self) -> Self:
        for key, given, own in (
            ("request", self.request, {*Settings.model_fields, *_OWN_FIELDS}),
            ("guidance", self.guidance, {*Settings.model_fields, "explain"}),
        ):
            if twice := sorted(given.keys() & own):
                raise ValueError(f"{key} must not set {', '.join(twice)}: settings, guidance and prompt do")
        return self

    def body(self, kind: Kind, model: str, question: str) -> dict[str, Any]:
        """The request of one mode, as the playground makes it. model: the mode's name in the API."""
        settings = self.settings.model_dump()
        strength = {name: settings.pop(name) for name in ("alpha", "warmup_tokens")}
        guidance = {**(self.guidance | strength if kind == "guided" else {}), "explain": True}
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
        if self.prompt is not None:
            asked = {"prompt": self.prompt.replace(QUESTION, question)}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {**self.request, **asked, **settings, **stream, "model": model, "guidance": guidance}


def read_questions(file: Path) -> Questions:
    """The questions in a file. Raises ConfigError naming every wrong key."""
    return validated(Questions, read_mapping(file))
