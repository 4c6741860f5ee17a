"""Collect what the documentation site shows: ``make docs`` builds it of the repository's own pages.

The pages link to one another, and to sources, by their places in the repository. So MkDocs gets a tree with
the same places: every page, and every file that a page links to or shows. A link to a folder becomes plain
text: a site has no page for it::

    python docs/stage.py OUT

MkDocs reads this file too, for what it is to do with a page's HTML.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "docs/*.css", "patches/*.md", "examples/*.md")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
LIST = re.compile(r"^([^\s*|>#<-].*)\n(?=(?:[-*]|1\.) )", re.MULTILINE)
"""A paragraph that a list follows at once, which is a list to GitHub only."""
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(<code>)~?")


def on_page_content(html: str, **_: object) -> str:
    """Take from the names in docstrings, ``:mod:`packed```, what only Sphinx reads. Called by MkDocs."""
    return ROLE.sub(r"\1", html)


def stage(out: Path) -> None:
    """Make the directory ``out`` anew.

    Raises:
        FileNotFoundError: a page links to what is not there.
    """
    shutil.rmtree(out, ignore_errors=True)
    for page in sorted({page for pattern in PAGES for page in ROOT.glob(pattern)}):
        copy = out / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(_with_files(page, out))


def _with_files(page: Path, out: Path) -> str:
    """The text of a page as MkDocs reads it; the files that it links to are copied, too."""

    def link(match: re.Match[str]) -> str:
        text, target = match[2], match[3]
        if re.match(r"[a-z]+:", target):
            return match[0]
        linked = (page.parent / target).resolve()
        if linked.is_dir():
            return text
        if linked.suffix != ".md":
            copy = out / linked.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(linked, copy)
        return match[0]

    parts = re.split(r"(^```.*?^```$)", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else LIST.sub(r"\1\n\n", LINK.sub(link, part)) for part in parts
    )


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
