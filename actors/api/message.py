"""The base of messages between router and coordinator, which may run different versions of this code for a while."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

M = TypeVar("M", bound="Message")


class UnknownField(TypeError):
    """A message has a field that this version does not know, and needs it: only a newer process can take it."""


class Message:
    """A dataclass that is pickled by the names of its fields.

    A process that receives it from an older version gives the fields that are missing their defaults. From a newer
    version it drops fields that it does not know if they are empty: "", 0, False, None, (), [] or {}. Others raise
    UnknownField.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return restore, (type(self), {each.name: getattr(self, each.name) for each in fields(self)})  # type: ignore[arg-type]


def restore(kind: type[M], given: dict[str, Any]) -> M:
    """The message of a kind with these fields. Raises UnknownField."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name, value in given.items() if name not in known and value]
    if unknown:
        raise UnknownField(f"{kind.__name__} has no field {unknown[0]} in this version")
    return kind(**{name: value for name, value in given.items() if name in known})
