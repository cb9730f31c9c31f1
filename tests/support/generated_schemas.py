"""JSON schemas from a seed, such as clients send: nested, recursive, with bounds, patterns and names in any script."""

from __future__ import annotations

import random
from typing import Any, TypeAlias
from urllib.parse import quote

Schema: TypeAlias = dict[str, Any]

_NAMES = (
    *("name", "id", "kind", "value", "items", "note", "person", "default", "type", "a", "b", "c", "x y", "maxLength"),
    *("größe", "名前", "имя", "عنوان", "naïve", "😀", 'quo"te', "back\\slash", "tab\tkey", "é", "$ref", "a/b", "~", ""),
)
_TEXTS = (
    "near",
    "far",
    "Ada",
    "Bo",
    "",
    " ",
    "ünïcode",
    "漢字",
    "😀😀",
    'say "hi"',
    "line\nbreak",
    "\\",
    "a/b",
    "null",
)
_PATTERNS = (
    *("^[A-Z][a-z]{1,8}$", "^\\d{3}-\\d{4}$", "^(yes|no|maybe)$", "^[a-f0-9]{2,6}$", "^\\S+ \\S+$", "[0-9]", "^v\\d+"),
    *("^[ぁ-ん]{1,4}$", "^\\w{1,5}$", "x$", "^(ab)*c?$", "^[^a-z]{0,6}$", "^.{2,5}$", "^$"),
)
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """So many schemas, always the same ones for a seed; the first ones are also the first of a longer list."""
    return [_Generator(random.Random(f"{seed}.{number}")).whole() for number in range(count)]


class _Generator:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.keyword = chance.choice(("$defs", "definitions"))
        self.shared: list[str] = []  # names that a $ref may have

    def whole(self) -> Schema:
        """A schema for an answer."""
        names = self.shared = self.chance.sample(("node", "größe", "a b", "item"), self.chance.randint(0, 2))
        definitions = {name: self._recursive(name) if self.chance.random() < 0.5 else self._any(2) for name in names}
        schema = self.chance.choice((self._object, self._object, self._array, self._any_of, self._leaf))(3)
        if definitions:
            schema = {"type": "object", "properties": {"root": schema}, "required": ["root"]}
            for name in names:
                schema["properties"][f"of {name}"] = self._reference(name)
            schema["additionalProperties"] = False
            schema[self.keyword] = definitions
        if self.chance.random() < 0.3:
            schema |= {"title": "Answer", "description": "as generated", "$comment": "restricts nothing"}
        return schema

    def _any(self, depth: int) -> Schema:
        if depth <= 0:
            return self._leaf(0)
        leaves = [self._leaf] * 4
        return self.chance.choice((*leaves, self._object, self._object, self._array, self._any_of, self._all_of))(depth)

    def _leaf(self, _depth: int) -> Schema:
        return self.chance.choice(
            (self._string, self._pattern, self._integer, self._number, self._enum, self._const, self._simple)
        )()

    def _string(self) -> Schema:
        if self.chance.random() < 0.3:
            return {"type": "string", "format": self.chance.choice(FORMATS)}
        least = self.chance.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self.chance.randint(0, 12)}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self.chance.choice(_PATTERNS)}

    def _integer(self) -> Schema:
        least = self.chance.randint(-1_000, 1_000)
        found: Schema = {"type": "integer", "minimum": least}
        if self.chance.random() < 0.7:
            found["maximum"] = least + self.chance.choice((0, 1, 9, 255, 10_000))
        elif self.chance.random() < 0.5:
            found = {"type": "integer", "multipleOf": self.chance.choice((2, 5, 7, 12, 100))}
        return found

    def _number(self) -> Schema:
        least = round(self.chance.uniform(-50, 50), self.chance.randint(0, 3))
        kind = self.chance.choice(("minimum", "exclusiveMinimum"))
        other = self.chance.choice(("maximum", "exclusiveMaximum"))
        return {"type": "number", kind: least, other: least + self.chance.choice((0.5, 1, 100, 1e6))}

    def _enum(self) -> Schema:
        values: list[Any] = [*self.chance.sample(_TEXTS, self.chance.randint(1, 4))]
        if self.chance.random() < 0.4:
            values += [self.chance.randint(-9, 9), None, True, 1.5, ["a", 1], {"k": "v"}][: self.chance.randint(1, 6)]
        return {"enum": values}

    def _const(self) -> Schema:
        return {"const": self.chance.choice((*_TEXTS, 0, -1, 2.5, None, False, [], {}, {"a": [1, {"b": None}]}))}

    def _simple(self) -> Schema:
        kinds = self.chance.sample(("boolean", "null", "integer", "string"), self.chance.randint(1, 3))
        if kinds == ["string"]:
            return {"type": "string", "maxLength": 20}
        return {"type": kinds[0] if len(kinds) == 1 else kinds}

    def _object(self, depth: int) -> Schema:
        names = self.chance.sample(_NAMES, self.chance.randint(1, 4))
        properties = {name: self._any(depth - 1) for name in names}
        required = [name for name in names if self.chance.random() < 0.6]
        found: Schema = {"type": "object", "properties": properties, "required": required}
        roll = self.chance.random()
        if roll < 0.75:
            found["additionalProperties"] = False
        elif roll < 0.85:
            found |= {"patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False}
        elif roll < 0.92:
            found = {"type": "object", "additionalProperties": self._leaf(0), "maxProperties": 3}
        if self.shared and self.chance.random() < 0.3:
            properties["ref"] = self._reference(self.chance.choice(self.shared))
        return found

    def _array(self, depth: int) -> Schema:
        least = self.chance.randint(0, 2)
        found: Schema = {"type": "array", "items": self._any(depth - 1), "minItems": least}
        found["maxItems"] = least + self.chance.randint(0, 3)
        if self.chance.random() < 0.25:
            found["prefixItems"] = [self._leaf(0) for _ in range(self.chance.randint(1, 2))]
            if self.chance.random() < 0.5:
                found = {**found, "items": False, "minItems": 0, "maxItems": len(found["prefixItems"])}
        return found

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1) for _ in range(self.chance.randint(2, 3))]}

    def _all_of(self, depth: int) -> Schema:
        names = self.chance.sample(_NAMES, 2)
        parts = [{"type": "object", "properties": {name: self._any(depth - 2)}, "required": [name]} for name in names]
        return {"allOf": parts}

    def _reference(self, name: str) -> Schema:
        return {"$ref": f"#/{self.keyword}/{quote(name)}"}

    def _recursive(self, name: str) -> Schema:
        """A tree of nodes of its own kind."""
        children = {"type": "array", "items": self._reference(name), "maxItems": 2}
        return {
            "type": "object",
            "properties": {"label": self._leaf(0), "next": {"anyOf": [{"type": "null"}, children]}},
            "required": ["label"],
            "additionalProperties": False,
        }
