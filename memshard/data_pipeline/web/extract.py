"""The main text of an HTML page, without navigation, advertisements and comments."""

import re
from typing import Literal

from resiliparse.extract.html2text import extract_plain_text

Extractor = Literal["trafilatura", "resiliparse"]

PAGES_BETWEEN_RESETS = 500  # trafilatura's caches grow without bound
# trafilatura's fast mode sometimes takes a caption for the article. Where it gives less than this
# share of resiliparse's text, its slow mode, which tries several extractors, is worth its time.
SUSPICIOUS_SHARE = 1 / 3
_pages = 0


def main_text(page: str, extractor: Extractor, quick: str | None = None) -> str:
    """Return the paragraphs of the article, one a line; "" if there is none.

    quick: resiliparse's text, if it is known. docs/data.md has the quality and time of both.
    """
    if quick is None:
        quick = tidy(
            extract_plain_text(
                page, main_content=True, list_bullets=False, alt_texts=False, post_meta=False
            )
        )
    if extractor == "resiliparse":
        return quick
    text = _trafilatura(page, fast=True)
    if len(text) < SUSPICIOUS_SHARE * len(quick):
        text = _trafilatura(page, fast=False)
    return text


def tidy(text: str) -> str:
    """Return the lines that are not empty, without white space around them or in rows."""
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.replace("\r", "\n").split("\n"))
    return "\n".join(line for line in lines if line)


def _trafilatura(page: str, fast: bool) -> str:
    global _pages
    import trafilatura
    from trafilatura.meta import reset_caches

    _pages += 1
    if _pages % PAGES_BETWEEN_RESETS == 0:
        reset_caches()
    # deduplicate=True would make the text of a page depend on the pages before it.
    text = trafilatura.extract(page, fast=fast, deduplicate=False, include_comments=False)
    return tidy(text or "")
