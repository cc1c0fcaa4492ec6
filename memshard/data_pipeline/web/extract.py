"""The main text of an HTML page, without navigation, advertisements and comments."""

import re
from typing import Literal

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

Extractor = Literal["trafilatura", "resiliparse"]

PAGES_BETWEEN_RESETS = 500  # trafilatura's caches grow without bound
_pages = 0


def decode(body: bytes) -> str:
    """Return an HTML body as text, in the encoding it declares or that statistics suggest."""
    return bytes_to_str(
        body,
        detect_encoding(body, from_html_meta=True, html5_compatible=True) or "utf-8",
        errors="replace",
    )


def main_text(page: str, extractor: Extractor) -> str:
    """Return the paragraphs of the article, one a line; "" if there is none.

    trafilatura (fast mode) is better, F1 .953 on 181 news pages; resiliparse is 7 times as fast, F1
    .929.
    """
    text = _trafilatura(page) if extractor == "trafilatura" else _resiliparse(page)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.replace("\r", "\n").split("\n"))
    return "\n".join(line for line in lines if line)


def _resiliparse(page: str) -> str:
    return extract_plain_text(
        page, main_content=True, list_bullets=False, alt_texts=False, post_meta=False
    )


def _trafilatura(page: str) -> str:
    global _pages
    import trafilatura
    from trafilatura.meta import reset_caches

    _pages += 1
    if _pages % PAGES_BETWEEN_RESETS == 0:
        reset_caches()
    # deduplicate=True would make the text of a page depend on the pages before it.
    return trafilatura.extract(page, fast=True, deduplicate=False, include_comments=False) or ""
