"""For mkdocs: links are written for the repository's own pages, and are made to lead somewhere on the site too.

A page in docs/ links to `../recipes/README.md`, the README to `docs/data.md`. On the site the files of `MOUNTED` stand
beside those of docs/, and each relative link is rewritten from where its page lies in the repository to where it lies
on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOUNTED = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
    "LICENSE": "LICENSE.txt",
}
"""File of the repository -> page or file of the site (index.md is the front page)."""
FOLDERS = ("recipes", "examples")
"""All of them keeps its place."""
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.*")) if path.suffix != ".pyc"]
    kept = {name: name for name in (path.relative_to(ROOT).as_posix() for path in inside)}
    for source, place in {**MOUNTED, **kept}.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite the relative links of a page."""
    place = page.file.src_uri
    names = {place: source for source, place in MOUNTED.items()}
    source = names.get(place, place if place.startswith(FOLDERS) else f"docs/{place}")

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        there = MOUNTED.get(target, target.removeprefix("docs/"))
        return f"{link[1]}{posixpath.relpath(there, posixpath.dirname(place) or '.')}{link[3] or ''})"

    return LINK.sub(rewritten, markdown)
