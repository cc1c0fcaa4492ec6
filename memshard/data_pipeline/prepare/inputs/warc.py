"""Web archives (WARC, ARC, WET): from pages to the text of their articles, each under a time
limit.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from memshard.data_pipeline.prepare.inputs.text import documents
from memshard.data_pipeline.prepare.workers import Apart, ItemTimeout, Watch
from memshard.data_pipeline.web.charset import decode
from memshard.data_pipeline.web.extract import Extractor, main_text, tidy
from memshard.data_pipeline.web.language import may_be
from memshard.data_pipeline.web.warc import Page, read_pages

MAX_PAGE = 10_000_000  # bytes of HTML; larger ones are lists and data
# Characters, and tags, of pages that parsers in C may take hours or all memory for, where no signal
# gets through: 260,000 nested <div>, or 10,000 <b> that are left open. Of news pages 1 in 50.
LONG_PAGE = 400_000
MANY_TAGS = 4_000
# Characters. "Skip to content" is all that the quick look finds in some layouts, and any language.
LEAST_FOR_LANGUAGE = 200


def read(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the articles of an archive's HTML pages and the texts of its conversion records, in
    order, cut where they are long.

    A page whose text is in another language at first glance is not extracted. Counts
    documents and bytes of all `pages`, and of those without a text: `page_large`, `page_timeout`,
    `page_failed`, `page_language`, `page_empty`.
    """
    (file,) = files
    articles = _articles(file, options["extractor"], options["language"], counts, watch)
    yield from documents(map(io.StringIO, articles), counts, options["longest"])


def _articles(
    file: Path, extractor: Extractor, language: str | None, counts: Counter[str], watch: Watch
) -> Iterator[str]:
    extract = partial(_main_text, extractor=extractor, language=language)
    with closing(Apart(extract, watch.seconds)) if watch.seconds else nullcontext() as apart:
        yield from _texts(file, extract, apart, counts, watch)


def _texts(
    file: Path,
    extract: Callable[[str], tuple[str, str]],
    apart: Apart | None,
    counts: Counter[str],
    watch: Watch,
) -> Iterator[str]:
    for page in read_pages(file, counts):
        reason, text = "", ""
        try:
            with watch.item(page.number):
                if page.number in watch.skip:
                    reason = "page_timeout"
                elif len(page.body) > MAX_PAGE:
                    reason = "page_large"
                else:
                    reason, text = _article(page, extract, apart)
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


def _article(
    page: Page, extract: Callable[[str], tuple[str, str]], apart: Apart | None
) -> tuple[str, str]:
    """Return (why there is no text, or "", and the text). extract: from HTML; apart: the same for
    pages that may take hours.
    """
    content = decode(page.body, page.content_type)
    if not page.html:
        text = tidy(content)
        return ("", text + "\n") if text else ("page_empty", "")
    if apart and (len(content) > LONG_PAGE or content.count("<") > MANY_TAGS):
        reason, text = apart(content)
        return reason, text
    return extract(content)


def _main_text(content: str, extractor: Extractor, language: str | None) -> tuple[str, str]:
    # A seventh of the slow extractor's time; for pages in other languages, often most of them, it
    # is all that is spent.
    quick = main_text(content, "resiliparse")
    if language is not None and len(quick) >= LEAST_FOR_LANGUAGE and not may_be(quick, language):
        return "page_language", ""
    text = main_text(content, extractor, quick)
    return ("", text + "\n") if text else ("page_empty", "")
