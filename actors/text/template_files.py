"""Finds a checkpoint's chat templates in the files that may hold them.

1. `chat_template.jinja`, with named ones in `additional_chat_templates`, as transformers saves them.
2. The key `chat_template` of `tokenizer_config.json`: a text, or several with names.
3. `chat_template.json`, where older processors keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from actors.text.chat_template import ChatTemplateError

MAIN, FOLDER, OLDER = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
FILES = (MAIN, f"{FOLDER}/*.jinja", OLDER)
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


class Templates(NamedTuple):
    """The template of conversations, and another one of conversations with tools if there is one."""

    default: str | None
    with_tools: str | None = None


def find_templates(folder: Path, settings: Mapping[str, Any], older: Mapping[str, Any]) -> Templates:
    """The templates of a checkpoint. Raises ChatTemplateError.

    settings, older: the contents of tokenizer_config.json and chat_template.json.
    """
    files = {file.stem: file for file in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / MAIN).is_file():
        files[_DEFAULT] = folder / MAIN
    named = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    declared = named or settings.get("chat_template") or older.get("chat_template")
    return choose_templates(declared) if declared else Templates(None)


def choose_templates(declared: Any) -> Templates:
    """The template called "default" among those declared, or the only one, and that called "tool_use".

    declared: a text; texts by name; or a list of texts or of `{"name", "template"}`. Raises ChatTemplateError.
    """
    if isinstance(declared, str):
        return Templates(declared)
    if isinstance(declared, Mapping) and "template" not in declared:
        declared = [{"name": name, "template": template} for name, template in declared.items()]
    entries = [_entry(item) for item in (declared if isinstance(declared, list) else [declared])]
    defaults = [template for name, template in entries if name == _DEFAULT]
    if not defaults and len(entries) != 1:
        names = ", ".join(str(name) for name, _ in entries if name is not None) or "no names"
        raise ChatTemplateError(
            f"chat_template holds {len(entries)} templates ({names}), and none is called {_DEFAULT}: "
            f"name the one to use {_DEFAULT}, or leave it alone"
        )
    with_tools = [template for name, template in entries if name == _WITH_TOOLS]
    return Templates((defaults or [entries[0][1]])[0], with_tools[0] if with_tools else None)


def _entry(item: Any) -> tuple[str | None, str]:
    """The name and the text of one of several templates."""
    template = item.get("template") if isinstance(item, Mapping) else item
    if not isinstance(template, str):
        raise ChatTemplateError(
            "chat_template must be a text, texts by name, or a list of objects with name and template; "
            f"one of its entries is of type {type(template).__name__}"
        )
    return (item.get("name") if isinstance(item, Mapping) else None), template
