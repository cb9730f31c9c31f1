"""Requests whose grammar is made to end, fill or block what compiles it, or is no grammar at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

Fields: TypeAlias = dict[str, Any]


def hostile(count: int) -> list[Fields]:
    """So many requests' fields, at most 200, the quick ones of each kind first."""
    kinds = [_schemas(), _lark(), _regexes(), _recursions(), _combinations(), _forms()]
    found = [fields for row in itertools.zip_longest(*kinds) for fields in row if fields is not None]
    assert len(found) >= 200, len(found)
    return found[:count]


def _schema(value: Any) -> Fields:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def _grammar(text: str) -> Fields:
    return {"structured_outputs": {"grammar": text}}


def _regex(text: str) -> Fields:
    return {"structured_outputs": {"regex": text}}


def _schemas() -> Iterator[Fields]:
    """Counts, numbers, names and values that are too large, too odd or not of their kind."""
    large = (4_096, 10**6, 10**9, 10**18, 2**63, 2**64)
    for keyword, most in itertools.product(("minItems", "maxItems"), large):
        yield _schema({"type": "array", "items": {"type": "integer"}, keyword: most})
    for keyword, most in itertools.product(("minLength", "maxLength"), large):
        yield _schema({"type": "string", keyword: most})
    for keyword in ("minProperties", "maxProperties"):
        yield _schema({"type": "object", keyword: 4_096})
    for divisor in (0, -1, 7_919, 99_991, 999_983, 2**31 - 1, 10**18 + 9, 1e-9, 1e-300, 0.1234567):
        yield _schema({"type": "integer" if divisor >= 1 else "number", "multipleOf": divisor})
    yield _schema({"allOf": [{"type": "integer", "multipleOf": prime} for prime in (10_007, 10_009, 10_037)]})
    for least in (-(2**63), 2**64, 10**40, 1e308, 1e-308, -123456789.123456789):
        yield _schema({"type": "number", "minimum": least})
        yield _schema({"type": "integer", "minimum": int(least), "maximum": int(least) + 10**6})
    yield _schema({"enum": ["x" * 60_000]})
    yield _schema({"enum": [f"value {number}" for number in range(3_500)]})
    yield _schema({"enum": [[number, {"a": number}] for number in range(2_000)]})
    for schema in ({}, {"type": "string"}, {"type": "number", "minimum": 0.123456, "maximum": 1e9}):
        yield _schema({"type": "object", "properties": {f"p{number}": schema for number in range(600)}})
    yield _schema({"type": "object", "properties": {"k" * 60_000: {}}})
    yield _schema({"type": "object", "required": [f"p{number}" for number in range(5_000)]})
    odd: tuple[Any, ...] = (3, "x", None, [], {}, True, -1, 1.5)
    for keyword in (
        "type",
        "properties",
        "items",
        "required",
        "minLength",
        "pattern",
        "enum",
        "anyOf",
        "$ref",
        "allOf",
    ):
        yield _schema({keyword: odd[len(keyword) % len(odd)]})
    for reference in (
        "#/a~2b/%zz",
        "#nowhere",
        "#/$defs/none",
        "http://[::1",
        "file:///etc/passwd",
        "#/" + "a/" * 9_000,
    ):
        yield _schema({"$ref": reference})
    yield _schema({"$id": "http://[::1", "$schema": "http://nowhere.invalid/schema", "type": "integer"})
    yield _schema({"x-guidance": {"whitespace_pattern": ".*" * 100, "lenient": True}, "not": {}})


def _lark() -> Iterator[Fields]:
    """Grammars that are ambiguous, deep, wide, empty, circular or wrong."""
    yield _grammar('start: start start | "a" |')
    yield _grammar('start: s\ns: s s s | s s | "a" | "a" "a" |')
    yield _grammar("start: " + "(" * 20_000 + '"a"' + ")" * 20_000)
    yield _grammar("start: " + "[" * 20_000 + '"a"' + "]" * 20_000)
    for depth in (300, 1_000, 2_000):
        rules = (f'r{number}: "a" r{number + 1} | "b" r{number + 1}' for number in range(depth))
        yield _grammar("start: r0\n" + "\n".join(rules) + f'\nr{depth}: "c"')
    for depth, body in itertools.product((12, 40), ("{0} {0}", "{0} {0} | {0} |", '{0} "y" {0} | "z" {0}')):
        rules = (f"a{number}: " + body.format(f"a{number + 1}") for number in range(depth))
        yield _grammar("start: a0\n" + "\n".join(rules) + f'\na{depth}: "x" |')
        terms = (f"A{number}: " + body.format(f"A{number + 1}").rstrip("| ") for number in range(depth))
        yield _grammar("start: A0\n" + "\n".join(terms) + f'\nA{depth}: "x"')
    yield _grammar('start: a*\na: b*\nb: c*\nc: "x"*')
    yield _grammar('start: x{4096}\nx: y{4096}\ny: z{4096}\nz: "a"')
    yield _grammar('start: x{0,4096}\nx: y{0,4096}\ny: z{0,4096}\nz: "a"')
    yield _grammar('start: "a"{1000000}')
    yield _grammar("start: X\nX: /(.*a.{30}.*)/ & /(.*b.{25}.*)/ & /(.*c.{25}.*)/")
    yield _grammar("start: X\nX: ~/(.*a.{20}b.*)/ & ~/(.*c.{20}d.*)/ & ~/(.*e.{15}f.*)/")
    yield _grammar('start: %json {"type": "array", "minItems": 1000000000}')
    yield _grammar('start: %json {"not": {}}')
    yield _grammar('start: %regex {"substring_chars": "' + "abcdefghij klm" * 3_000 + '"}')
    yield _grammar('start: %regex {"substring_words": "' + "ab cd ef gh " * 3_000 + '"}')
    terminals = range(1_500)
    yield _grammar(
        "start: ("
        + "|".join(f"T{number}" for number in terminals)
        + ")*\n"
        + "\n".join(f"T{number}: /[a-z]*{number}[a-z]*/" for number in terminals)
    )
    yield _grammar('start: "a"*\n%ignore /.*/')
    yield _grammar("start[temperature=1e308]: /.*/")
    yield _grammar("start: a\na[max_tokens=1000000000]: /.*/")
    yield _grammar('start: a*\na[capture="x"]: /.{1,3}/')
    yield _grammar('%llguidance {"no_forcing": true, "allow_invalid_utf8": true}\nstart: /(.|\\n)*/')
    for text in ("start: <[*]>*", "start: <|endoftext|>", "start: <[0-100000]>", "start: <|im_start|>"):
        yield _grammar(text)
    for text in (
        "start: nope",
        "start: start",
        "start: a\na: b\nb: a",
        'start: X*\nX: ""',
        'start: "\\u"',
        "\x00\x01",
        " ",
    ):
        yield _grammar(text)
    yield _grammar('start: "' + "a" * 60_000 + '"')
    yield _grammar('root ::= root root | "a" | ""')
    yield _grammar("root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000)
    yield _grammar("%import common.NOTHING\nstart: NOTHING")
    yield _grammar('start: "\ud83d"')


def _regexes() -> Iterator[Fields]:
    """Regexes with repetitions of repetitions, many states, or a wrong form."""
    for count in (12, 20, 64, 500):
        yield _regex(f"[ab]*a[ab]{{{count}}}")
        yield _regex(f"(.|\\n)*a(.|\\n){{{count}}}")
    yield _regex("((a{4096}){4096}){4096}")
    yield _regex("((((a{0,4096}){0,4096}){0,4096})*)*")
    yield _regex("(([ab]{0,64}c{0,64}){0,64}){0,64}")
    yield _regex("a{1000000}")
    yield _regex("\\p{L}{4096}")
    yield _regex("(\\p{L}|\\p{N}|\\p{S}){0,4096}(\\w\\W)*")
    yield _regex(".*".join("abcdefghijklmnopqrst"))
    yield _regex("|".join(f"[a-z]*{letter}[a-z]{{{number}}}" for number, letter in enumerate("abcdefghijklmnop" * 4)))
    for piece, count in itertools.product(("a?", "a*", "(a|aa)", "(a|b|ab)*"), (500, 3_000)):
        yield _regex(piece * count)
    yield _regex("(" * 20_000 + "a" + ")" * 20_000)
    yield _regex("a" + "*" * 20_000)
    yield _regex("|".join(f"word{number}x*" for number in range(5_000)))
    for text in (
        "(",
        "[",
        "a{2,1}",
        "\\",
        "(?=a)b",
        "(a)\\1",
        "\\ba",
        "(?P<x>a)",
        "[[:bad:]]",
        "\\p{Nope}",
        "^a$",
        "a\x00b",
    ):
        yield _regex(text)


def _recursions() -> Iterator[Fields]:
    """Schemas that name themselves, or each other."""
    yield _schema({"$ref": "#"})
    yield _schema({"allOf": [{"$ref": "#"}]})
    yield _schema({"anyOf": [{"$ref": "#"}, {"type": "integer"}]})
    yield _schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})
    yield _schema(
        {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#"}, {"properties": {"b": {"$ref": "#"}}}]}}}
    )
    yield _schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1})
    yield _schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})
    for depth in (20, 60):
        for twice in (
            lambda each: {"type": "array", "prefixItems": [each, each], "minItems": 2},
            lambda each: {"allOf": [each, each]},
            lambda each: {"anyOf": [each, each]},
            lambda each: {"type": "object", "properties": {"l": each, "r": each}, "required": ["l", "r"]},
        ):
            names = {f"a{number}": twice({"$ref": f"#/$defs/a{number + 1}"}) for number in range(depth)}
            yield _schema({"$ref": "#/$defs/a0", "$defs": {**names, f"a{depth}": {"type": "integer"}}})
    for width in (8, 40):
        each: list[Any] = [{"type": "array", "items": {"$ref": f"#/$defs/a{number}"}} for number in range(width)]
        yield _schema({"$ref": "#/$defs/a0", "$defs": {f"a{number}": {"anyOf": each} for number in range(width)}})
    for depth in (40, 60, 100, 200):
        nested: Any = {"type": "integer"}
        for _ in range(depth):
            nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
        yield _schema(nested)


def _combinations() -> Iterator[Fields]:
    """Schemas whose parts multiply."""
    for parts, ways in ((3, 3), (6, 4), (12, 3), (10, 10)):
        for keyword in ("anyOf", "oneOf"):
            choices = [
                {
                    keyword: [
                        {"properties": {f"p{part}.{way}": {"type": "integer"}}, "required": [f"p{part}.{way}"]}
                        for way in range(ways)
                    ]
                }
                for part in range(parts)
            ]
            yield _schema({"allOf": choices})
    for count in (50, 500):
        yield _schema({"anyOf": [{"type": "object", "properties": {"a": {"type": "string"}}} for _ in range(count)]})
        yield _schema({"anyOf": [{"type": "string", "pattern": f"^{number}.*{number}$"} for number in range(count)]})
    yield _schema({"allOf": [{"type": "string", "pattern": f".*{letter}.{{15}}{letter}.*"} for letter in "abc"]})
    yield _schema({"type": "string", "pattern": "(.*a.{30}.*)(.*b)", "minLength": 3_000, "maxLength": 4_000})
    yield _schema({"type": "string", "format": "email", "minLength": 200, "maxLength": 201})
    patterns = {f".*{letter}.{{{number}}}$": {"type": "integer"} for number, letter in enumerate("abcdefgh")}
    yield _schema({"type": "object", "patternProperties": patterns})
    nested: Any = {"type": "integer"}
    for _ in range(28):
        nested = {"anyOf": [{"type": "array", "items": nested}, {"type": "array", "items": {"type": "string"}}]}
    yield _schema(nested)


def _forms() -> Iterator[Fields]:
    """Choices, and texts that are no schema."""
    yield {"structured_outputs": {"choice": ["a" * 900] * 60}}
    yield {"structured_outputs": {"choice": [f"choice {number}" for number in range(1_000)]}}
    yield {"structured_outputs": {"choice": ["", "a"]}}
    yield {"structured_outputs": {"choice": ["<|im_end|>", "<|endoftext|>", "\x00", '"', "\\"]}}
    yield {"structured_outputs": {"choice": ["\ud800"]}}
    for text in (
        "",
        "{",
        "1",
        "[]",
        "null",
        '"a"',
        "[" * 5_000,
        '{"a":' * 5_000,
        '{"minItems": 1e999}',
        '{"enum": [NaN]}',
    ):
        yield {"structured_outputs": {"json": text}}
