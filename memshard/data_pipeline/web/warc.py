"""Web pages of WARC and ARC files, and the texts of WET files: whatever is left out is counted."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memshard.data_pipeline.web.digest import is_wrong
from memshard.data_pipeline.web.http_response import (
    Decoded,
    decode_body,
    parse_fields,
    parse_response,
)
from memshard.data_pipeline.web.records import ARC, Content, Format, layout_of, read_records

HTML_TYPES = ("text/html", "application/xhtml+xml")
# How pages begin whose type no header says, as browsers tell it.
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body|title|meta)[\s>]", re.I)
NOT_SPACE = re.compile(rb"\S")
ARC_LINE = re.compile(r"(?P<url>.+?) \S+ \d+ (?P<type>\S+) .*")
KINDS = {"response": "responses", "resource": "resources", "conversion": "conversions"}
"""The types of records with content, and what counts them."""
OUTCOMES = ("status", "not_html", "empty_body", "too_large", "fault_http")
"""Every record of KINDS is yielded as a page or counted under exactly one of these."""


@dataclass(frozen=True)
class Page:
    """A page, or a text that others extracted from one (html False). number: of the record in its
    file, among those with content, from 0. body: with transfer and content encoding undone.
    content_type: as the header says, which may name the charset.
    """

    number: int
    url: str
    body: Content
    content_type: str = ""
    html: bool = True


@dataclass(frozen=True)
class _Record:
    """A record. kind: as in WARC-Type, "" if the header does not say. fields: its headers by
    lower-case name. block: None if it is too large.
    """

    kind: str
    url: str
    fields: dict[str, str]
    block: Content | None


def read_pages(path: Path, counts: Counter[str]) -> Iterator[Page]:
    """Yield the pages of a web archive, each also .gz, in order: successful HTML responses and HTML
    resources of WARC or ARC, and texts of conversion records (WET).

    Counts `records`; `responses`, `resources`, `conversions`, and why one is no page: OUTCOMES;
    faults as `read_records` does, and of pages, which are used as far as they go, `fault_encoding`
    (not encoded as the headers say) and `fault_digest` (the payload is not what was archived).
    ValueError for a file of what crawlers noted about pages.
    """
    number, notes = 0, 0
    with path.open("rb") as stream:
        layout = ARC if path.name.lower().removesuffix(".gz").endswith(".arc") else None
        layout = layout or layout_of(stream.read(1 << 16))
        stream.seek(0)
        for head, block in read_records(stream, counts, layout):
            counts["records"] += 1
            record = _record(head, block, layout)
            if record.kind in KINDS:
                counts[KINDS[record.kind]] += 1
                outcome = _page(record, number, counts)
                number += 1
                if isinstance(outcome, Page):
                    yield outcome
                else:
                    counts[outcome] += 1
            # Its length was right, so it is passed over whole.
            counts["fault_bad_header"] += not record.kind
            notes += record.kind == "metadata" and "json" in record.fields.get("content-type", "")
    if notes and not number:
        raise ValueError(
            f"{path} holds metadata records (WAT), what others noted about pages, and no page, and "
            "is not read: name the WARC or WET files of the crawl"
        )


def _record(head: bytes, block: Content | None, layout: Format) -> _Record:
    if layout is not ARC:
        # Behind the line with the version.
        fields = parse_fields(head.partition(b"\n")[2])
        url = fields.get("warc-target-uri", "").strip("<>")
        return _Record(fields.get("warc-type", "").lower(), url, fields, block)
    line = ARC_LINE.match(head.decode("utf-8", "replace"))
    if line is None:
        return _Record("", "", {}, block)
    if line["url"].startswith("filedesc:"):
        return _Record("warcinfo", "", {}, block)
    kind = "response" if line["url"].startswith(("http:", "https:")) else "resource"
    return _Record(kind, line["url"], {"content-type": line["type"]}, block)


def _page(record: _Record, number: int, counts: Counter[str]) -> Page | str:
    """Return the page of a record, or why there is none: one of OUTCOMES."""
    block, content_type = record.block, record.fields.get("content-type", "")
    if block is None:
        return "too_large"
    decoded = None
    if record.kind == "response" and (
        (response := parse_response(block)) or content_type.startswith("application/http")
    ):
        if response is None:
            return "fault_http"
        if response.status != 200:
            return "status"
        content_type = response.fields.get("content-type", "")
        if content_type and not _is_html(content_type):
            return "not_html"
        try:
            decoded = decode_body(response)
        except ValueError:
            return "fault_http"
    decoded = decoded or Decoded(block, True, (block,))
    body = decoded.content
    if not NOT_SPACE.search(body):
        return "empty_body"
    html = _is_html(content_type) if content_type else HTML.match(body) is not None
    if not html and not (record.kind == "conversion" and content_type.startswith("text/")):
        return "not_html"
    counts["fault_encoding"] += not decoded.as_said
    if digest := record.fields.get("warc-payload-digest"):
        counts["fault_digest"] += is_wrong(digest, decoded.stages)
    elif digest := record.fields.get("warc-block-digest"):
        counts["fault_digest"] += is_wrong(digest, (block,))
    return Page(number, record.url, body, content_type, html)


def _is_html(content_type: str) -> bool:
    """Return whether a Content-Type, of several values the last, is that of a page."""
    types = [value.partition(";")[0].strip().lower() for value in content_type.split(",")]
    return next((name for name in reversed(types) if "/" in name), "") in HTML_TYPES
