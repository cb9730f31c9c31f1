"""Sessions and replicas without connections, for tests of admission and cache budgets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession
from actors.decoding.session import Session
from actors.directory import Endpoint
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.messages import Welcome
from tests.support.tokenizers import MARKS, byte_level

_keys = itertools.count(1)


@cache
def vocabularies() -> VocabularyRegistry:
    """Three equal vocabularies of bytes."""
    config, generation = {"vocab_size": 400}, {"eos_token_id": [301]}
    return VocabularyRegistry(
        dict.fromkeys(ROLES, RoleTokenizer(byte_level(MARKS), {"eos_token": "<|end|>"}, config, generation))
    )


class UnconnectedReplica(Replica):
    """A replica without a connection."""

    def __init__(self, role: Role = "target", cache_tokens: int = 1_024, max_position: int = 4_096) -> None:
        super().__init__(Endpoint(role, "", 0, incarnation=f"{role}-{next(_keys)}", cache_free=cache_tokens))
        self._welcome = Welcome(
            role, self.endpoint.incarnation, 400, 1, cache_tokens, max_position, batch_invariant=True, devices=""
        )

    @property
    def welcome(self) -> Welcome:
        return self._welcome

    def set_heartbeat(self, *, sessions: int, used: int) -> None:
        """Set what the last heartbeat reported."""
        self.endpoint = replace(self.endpoint, sessions=sessions, cache_free=self.welcome.cache_tokens - used)


def request(
    prompt: int = 32, *, client: str = "", max_tokens: int | None = None, guided: bool = False, priority: int = 0
) -> Generate:
    """A request with a prompt of so many tokens."""
    roles: Sequence[Role] = ROLES if guided else ("target",)
    prompts = {role: [1] * prompt for role in roles}
    guidance = Guidance(1.0 if guided else 0.0)
    sampling, thinking = Sampling(max_tokens=max_tokens), Thinking()
    return Generate("r", "target", prompts, sampling, guidance, thinking, 1, client=client, priority=priority)


def session(generate: Generate, age: int = 0) -> ActiveSession:
    """A session that is queued nowhere yet."""
    roles = tuple(generate.prompts)
    vocabulary = vocabularies().vocabulary("target", roles, generate.thinking)
    return ActiveSession(Session(generate, vocabulary, dict.fromkeys(roles, 0)), next(_keys), age, {})
