"""The errors of an engine, as types. Callers turn them into replies and messages."""

from __future__ import annotations

from collections.abc import Sequence


class EngineError(RuntimeError):
    """Base of every error that an engine raises on purpose."""


class LoadError(EngineError):
    """A model cannot be served. what: the refused thing; why: the reason; out: a command or setting that helps."""

    def __init__(self, what: str, why: str, out: str) -> None:
        super().__init__(f"{what}: {why}. {out}")
        self.what, self.why, self.out = what, why, out


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type: errors of transformers have paragraphs."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BadExtend(EngineError):
    """An extend that can never succeed, whatever other sessions do. It changed nothing."""

    def __init__(self, session: int, why: str) -> None:
        super().__init__(f"session {session}: {why}")
        self.session, self.why = session, why


class StepFailed(EngineError):
    """The forward raised (its error is the cause). The caches of `sessions` are dropped and must be sent again."""

    def __init__(self, sessions: Sequence[int], error: BaseException) -> None:
        super().__init__(f"a forward over {len(sessions)} sessions failed: {error}; extend them again from position 0")
        self.sessions = tuple(sessions)


class RowGone(EngineError):
    """The rows of a session are not held, or not any more: extend the session again."""

    def __init__(self, session: int) -> None:
        super().__init__(f"no rows of session {session} are held; extend it again")
        self.session = session
