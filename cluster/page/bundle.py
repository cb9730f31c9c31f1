"""Joins ES modules into one script, since browsers load no modules from a file.

It relies on a rule about how the modules are written:

- Imports are lines `import { a, b } from "./name.js";` or `import "./name.js";`, without new names.
- Exports are `export` before a `const`, `class`, `function` or `async function` at the beginning of a line.
- No module imports itself, directly or through others.

Each module becomes a function of its own that returns its exports, so names of different modules cannot clash. Anything
else that looks like an import or an export is a BundleError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

_IMPORT = re.compile(r'^import (?:\{ (\w+(?:, \w+)*) \} from )?"\./([\w-]+\.js)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:const|class|(?:async )?function\*?) (\w+))", re.MULTILINE)
_LEFT_OVER = re.compile(r"^\s*(?:import|export)\b.*|\bimport\s*[(.].*", re.MULTILINE)


class BundleError(RuntimeError):
    """The page's files break a rule that its build relies on. The message names the file and the line or tag."""


def bundle(modules: Mapping[str, str], entry: str) -> str:
    """The modules that `entry` needs as one script; importers come after what they import.

    modules: source by file name. Raises BundleError.
    """
    graph: dict[str, list[str]] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name not in graph:
            graph[name] = [needed for _, needed in _IMPORT.findall(_source(modules, name))]
            waiting += graph[name]
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        raise BundleError(f"modules import each other: {' -> '.join(error.args[1])}") from None
    return "\n".join(_as_function(name, modules) for name in order)


def _source(modules: Mapping[str, str], name: str) -> str:
    if name not in modules:
        raise BundleError(f"a module imports {name}, which is not among {', '.join(sorted(modules))}")
    return modules[name]


def _as_function(name: str, modules: Mapping[str, str]) -> str:
    """A module as a constant with its exports."""

    def imported(match: re.Match[str]) -> str:
        names, needed = match.groups()
        if names is None:
            return ""  # it runs before, and nothing of it is used
        missing = {*names.split(", ")} - {*_EXPORT.findall(modules[needed])}
        if missing:
            raise BundleError(f"{name} imports {', '.join(sorted(missing))}, which {needed} does not export")
        return f"const {{ {names} }} = {_constant(needed)};"

    body = _EXPORT.sub("", _IMPORT.sub(imported, modules[name]))
    if (left := _LEFT_OVER.search(body)) is not None:
        raise BundleError(
            f"{name}: the build does not read {left.group().strip()!r}; cluster/page/bundle.py has the rule"
        )
    exports = ", ".join(_EXPORT.findall(modules[name]))
    return f"const {_constant(name)} = (() => {{\n{body}\nreturn {{ {exports} }};\n}})();"


def _constant(name: str) -> str:
    """The constant that holds a module's exports."""
    return "$" + re.sub(r"\W", "_", name.removesuffix(".js"))
