"""Web archives (WARC): from pages to the text of their articles, each under a time limit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memshard.data_pipeline.prepare.workers import ItemTimeout, Watch
from memshard.data_pipeline.web.extract import Extractor, decode, main_text
from memshard.data_pipeline.web.language import may_be
from memshard.data_pipeline.web.warc import read_pages

MAX_PAGE = 10_000_000  # bytes of HTML; larger ones are lists and data
MAX_TEXT = 1_000_000  # characters; no article is longer, and all later stages take time by length


def read(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the articles of a WARC file's HTML pages, in order.

    A page whose text is in another language at first glance is not extracted. Counts
    documents and bytes of all `pages`, and of those without a text: `page_large`, `page_timeout`,
    `page_failed`, `page_language`, `page_empty`.
    """
    (file,) = files
    extractor, language = options["extractor"], options["language"]
    for page in read_pages(file, counts):
        reason, text = "", ""
        try:
            with watch.item(page.number):
                if page.number in watch.skip:
                    reason = "page_timeout"
                elif len(page.body) > MAX_PAGE:
                    reason = "page_large"
                else:
                    reason, text = _article(page.body, extractor, language)
        except ItemTimeout:
            reason = "page_timeout"
        # Parsers meet every kind of broken HTML; one page must not end a build of millions.
        except (
            ValueError,
            RuntimeError,
            MemoryError,
            RecursionError,
            LookupError,
            TypeError,
            AttributeError,
        ):
            reason = "page_failed"
        for name in ("pages", reason) if reason else ("pages",):
            counts[f"{name}.documents"] += 1
            counts[f"{name}.bytes"] += len(page.body)
        if not reason:
            yield text


def _article(body: bytes, extractor: Extractor, language: str | None) -> tuple[str, str]:
    """Return (why there is no text, or "", and the text)."""
    html = decode(body)
    # A seventh of the slow extractor's time; for pages in other languages, often most of them, it
    # is all that is spent.
    quick = main_text(html, "resiliparse")
    if language is not None and quick and not may_be(quick, language):
        return "page_language", ""
    text = quick if extractor == "resiliparse" else main_text(html, "trafilatura")
    return ("", text[:MAX_TEXT] + "\n") if text.strip() else ("page_empty", "")
