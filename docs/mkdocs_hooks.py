"""Hooks of mkdocs: pages of the repository's root in the site, and links from pages to files outside docs/.

README.md is the first page; CONTRIBUTING.md and CHANGELOG.md are pages too. Any other file outside docs/ that a page
links to is copied into `repository/` of the site: a strict build finds every link, and the site works without GitHub.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root and every linked file."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
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
    return ROOT_PAGES.get(path, f"repository/{path}")
