"""Names of the private vocabulary that the code once had stay gone: the field's terms stand in their place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from actors.metrics import METRICS

ROOT = Path(__file__).parent.parent
PACKAGES = ("actors", "router", "cluster", "benchmarks", "tests")

MODULES = {
    *("asked", "joining", "live", "trail", "mending", "deciding", "verbs", "tiles", "packed", "room", "gathering"),
    *("ownership", "pending", "reducing", "drafting", "pace", "links", "outbox", "languages", "spelling", "alignments"),
    *("waiting", "planning", "prompts", "readrows", "scaling", "exporting", "requests", "readers", "events", "forward"),
    *("vocabulary_tables", "vocabulary_reading", "vocabulary_mass", "vocabulary_straddlers"),
    *("texts", "measuring", "access", "event_stream", "convert", "resume"),
    *("asking", "lines", "report", "front", "wide", "killing"),
}
CLASSES = {
    *("Asked", "Tickets", "Joiner", "Live", "Window", "Row", "RowItem", "RowDesk", "RowStore", "Trail", "Mender"),
    *("Decider", "Judged", "Wider", "Stuck", "Question", "Known", "AlignedReader", "Reader", "Ahead", "Straddler"),
    *(
        "Straddlers",
        "Straddled",
        "Straddling",
        "Reading",
        "Heard",
        "Events",
        "Waiting",
        "CacheRoom",
        "Look",
        "Turnover",
    ),
    *("GatherWindow", "Ledger", "Owned", "Pending", "Part", "Drawn", "Pace", "Links", "Languages", "Language"),
    *("Speller", "Spelling"),
}
OTHERS = {  # functions, attributes, keys of the configuration
    *("ticket", "tickets", "known", "exact", "missing_s", "silent_s", "widen_above", "tails", "witnesses", "trail"),
    *("trails", "spell", "speller", "straddled", "straddlers", "told", "gone", "card"),
}
EXEMPT = {
    "cluster.demo.task: Question": "a question of the embedded task",
    "actors.config: exact": "the old key, read for one release",
}


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name, parsed."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text(encoding="utf-8"))
        for file in files
    }


def attributes(tree: ast.Module) -> Iterator[str]:
    """Names that a module gives to fields of classes and to attributes of objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                targets = [line.target] if isinstance(line, ast.AnnAssign) else getattr(line, "targets", [])
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def found(names: Iterator[tuple[str, str]], old: set[str]) -> list[str]:
    """`module: name` for each name that is an old one, with or without an underscore before it."""
    places = {f"{module}: {name.lstrip('_')}" for module, name in names if name.lstrip("_") in old}
    return sorted(places - EXEMPT.keys())


def test_no_module_has_an_old_name() -> None:
    assert found(((name, name.rsplit(".", 1)[-1].removeprefix("test_")) for name in trees()), MODULES) == []


def test_no_class_has_an_old_name() -> None:
    classes = (
        (module, node.name)
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert found(classes, CLASSES) == []


def test_no_function_has_an_old_name() -> None:
    functions = (
        (module, node.name)
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert found(functions, OTHERS) == []


def test_no_attribute_or_configuration_key_has_an_old_name() -> None:
    assert found(((module, name) for module, tree in trees().items() for name in attributes(tree)), OTHERS) == []


def test_no_metric_has_an_old_name() -> None:
    assert [name for name in METRICS if set(name.split("_")) & OTHERS] == []


def test_every_exemption_is_used() -> None:
    names = {f"{module}: {word}" for module, tree in trees().items() for node in ast.walk(tree) for word in words(node)}
    assert set(EXEMPT) <= names


def words(node: ast.AST) -> list[str]:
    """The name or the text that stands at one place of a module."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
