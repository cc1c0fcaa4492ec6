"""MkDocs hooks: the documentation as a site, without the sources around it.

Pages link to files of the repository, which a reader of the repository can open and the site does
not have. On the site such a link, or one to a folder, becomes its text, after a check that it
leads somewhere.
CONTRIBUTING.md and CHANGELOG.md, which belong at the root, become pages.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^):#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.memshard")  # in strict mode a warning here fails the build


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, with links that count from docs/."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = LINK.sub(lambda m: f"[{m[1]}]({os.path.relpath(m[2], 'docs')}{m[3] or ''})", text)
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links that lead out of docs/ or to a folder."""
    folder = Path("docs", page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        path = os.path.normpath(folder / target)
        if path.startswith("docs/") and not (ROOT / path).is_dir():
            return match[0]
        if path in ROOT_PAGES:
            back = os.path.relpath(f"docs/{path.lower()}", folder)
            return f"[{label}]({back}{anchor or ''})"
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        return label

    return LINK.sub(replaced, markdown)
