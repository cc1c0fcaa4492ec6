"""Records of web archives, made byte by byte."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from memshard.data_pipeline.web.warc import Page, read_pages

SENTENCES = b"".join(b"Sentence %d of a page that was sent. " % number for number in range(90))
HTML = b"<!DOCTYPE html><html><body><p>" + SENTENCES + b"</p></body></html>"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


def record(
    block: bytes,
    kind: str = "response",
    content_type: str | None = "application/http; msgtype=response",
    url: str = "http://a/",
    fields: Mapping[str, str] | None = None,
    line_end: bytes = b"\r\n",
    length: int | None = None,
) -> bytes:
    """Return a WARC record."""
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Target-URI: {url}"]
    lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    lines += [f"Content-Length: {len(block) if length is None else length}", ""]
    return b"".join(line.encode() + line_end for line in lines) + block + 2 * line_end


def arc_record(block: bytes, url: str, kind: str = "text/html", version: int = 1) -> bytes:
    """Return an ARC record, of version 1 or 2."""
    more = "200 - - 0 a.arc " if version == 2 else ""
    return f"{url} 1.2.3.4 20050101000000 {kind} {more}{len(block)}\n".encode() + block + b"\n"


def arc_head(version: int = 1) -> bytes:
    """Return the version block that an ARC file begins with."""
    names = {
        1: b"URL IP-address Archive-date Content-type Archive-length\n",
        2: b"URL IP-address Archive-date Content-type Result-code Checksum Location Offset "
        b"Filename Archive-length\n",
    }[version]
    return arc_record(
        b"%d 0 test\n" % version + names + b"\n", "filedesc://a.arc", "text/plain", version
    )


def pages_of(content: bytes, file: Path) -> tuple[list[Page], Counter[str]]:
    """Return the pages of an archive, and what was counted."""
    file.write_bytes(content)
    counts: Counter[str] = Counter()
    return list(read_pages(file, counts)), +counts
