"""Hooks of mkdocs: pages of the repository's root in the site, and links from pages to files outside docs/.

README.md is the first page; CONTRIBUTING.md and CHANGELOG.md are pages too. Any other file outside docs/ that a page
links to is copied into `repository/` of the site: a strict build finds every link, and the site works without GitHub.
The page of recorded answers, which `make page` builds, is part of the site, and the first page links to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
PLAYGROUND = "build/playground.html"  # code in the repository, where it is not kept, and a link in the site
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root and every linked file."""
    for name, page in ROOT_PAGES.items():
        content = (ROOT / name).read_text(encoding="utf-8")
        linked = content.replace(f"`{PLAYGROUND}`", f"[the page]({PLAYGROUND})")
        files.append(File.generated(config, page, content=linked))
    if not (ROOT / PLAYGROUND).is_file():
        raise PluginError(f"{PLAYGROUND} is missing: run `make page`, as `make docs` does")
    for file in list(files.documentation_pages()):
        for link in _LINK.findall(file.content_string):
            path = _in_repository(link, file)
            if path not in ROOT_PAGES and (place := _in_site(path)) not in files.src_uris and (ROOT / path).is_file():
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the site has their files."""
    return _LINK.sub(lambda match: _in_site(_in_repository(match.group(1), page.file)), markdown)


def _in_repository(link: str, file: File) -> str:
    """The path in the repository that a page's relative link names."""
    folder = "" if file.src_uri in ROOT_PAGES.values() else "docs"
    return posixpath.normpath(posixpath.join(folder, link))


def _in_site(path: str) -> str:
    """Path in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == PLAYGROUND:
        return "playground.html"
    return ROOT_PAGES.get(path, f"repository/{path}")
