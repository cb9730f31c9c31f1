"""Builds the page: the playground's own files, with recordings in place of a service, inside one HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.page.bundle import BundleError, bundle
from cluster.page.recording import read_recordings

PLAYGROUND = Path(__file__).parents[2] / "router" / "playground"
BROWSER = Path(__file__).parent / "browser"  # a script here takes the place of the playground's script of that name
ENTRY = "recorded.js"
_REFERENCE = re.compile(r'\b(?:src|href)="(?!#|data:)[^"]*"')


def build(recordings: Sequence[dict[str, Any]] | None = None) -> str:
    """The whole page. recordings: default: those of the repository. Raises BundleError and RecordingError."""
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(PLAYGROUND.iterdir()) if path.is_file()}
    modules = {name: text for name, text in files.items() if name.endswith(".js")}
    modules |= {path.name: path.read_text(encoding="utf-8") for path in sorted(BROWSER.glob("*.js"))}
    style = files["style.css"] + (BROWSER / "recorded.css").read_text(encoding="utf-8")
    theme, app = files["theme.js"], bundle(modules, ENTRY)
    icon = f"data:image/svg+xml;base64,{base64.b64encode(files['icon.svg'].encode()).decode()}"
    data = json.dumps(
        read_recordings() if recordings is None else recordings, ensure_ascii=False, separators=(",", ":")
    )
    data = data.replace("<", "\\u003c")  # so that no recorded text ends its element
    return _with(
        files["index.html"],
        {
            '<meta charset="utf-8">': f'<meta charset="utf-8">\n  {_policy((theme, app), style)}',
            '<link rel="icon" href="playground/icon.svg" type="image/svg+xml">': f'<link rel="icon" href="{icon}">',
            '<img src="playground/icon.svg"': f'<img src="{icon}"',
            '<link rel="stylesheet" href="playground/style.css">': f"<style>{_inline(style)}</style>",
            '<script src="playground/theme.js"></script>': f"<script>{_inline(theme)}</script>",
            '<script type="module" src="playground/app.js"></script>': f'<script type="module">{_inline(app)}</script>',
            "</body>": f'<script type="application/json" id="recordings">{data}</script>\n</body>',
        },
    )


def _policy(scripts: Sequence[str], style: str) -> str:
    """The content policy: these scripts and this style, and no request at all."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; script-src {allowed}; '
        f"style-src {_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'\">"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inline(text: str) -> str:
    """A script or style as the content of its element, unchanged, as its hash is of these bytes."""
    if (end := re.search(r"</(?:script|style)|<!--", text, re.IGNORECASE)) is not None:
        raise BundleError(f"a script or style of the page holds {end.group()!r}, which would end its element")
    return text


def _with(page: str, replacements: dict[str, str]) -> str:
    """The page with each text replaced, of which it must hold exactly one, and with no reference to a file left."""
    for text in replacements:
        if page.count(text) != 1:
            raise BundleError(f"index.html must hold {text} once, and holds it {page.count(text)} times: mend html.py")
    either = re.compile("|".join(map(re.escape, replacements)))
    if (left := _REFERENCE.search(either.sub("", page))) is not None:
        raise BundleError(f"index.html refers to a file that the build does not put into the page: {left.group()}")
    return either.sub(lambda match: replacements[match.group()], page)
