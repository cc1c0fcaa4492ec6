"""The pages of every archive in the data folder beside those of an independent reader, warcio,
record by record. docs/data.md explains the differences.
"""

import hashlib
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("fastwarc", reason="pip install 'memshard[data]'")
warcio = pytest.importorskip("warcio.archiveiterator", reason="pip install warcio")

from memshard.data_pipeline.web.warc import HTML_TYPES, read_pages  # noqa: E402

SAMPLES = Path(__file__).parents[3] / "shared" / "data"
ARCHIVES = sorted(
    file
    for kind in ("*.warc", "*.warc.gz", "*.arc.gz", "*.bad")
    for file in SAMPLES.glob(f"*/{kind}")
)
ONE_MEMBER = "one gzip member for all records, at which warcio stops"
DIFFERENCES = {
    ("http-bodies.warc.gz", "http://h/continue"): "the response behind `100 Continue`",
    ("http-bodies.warc.gz", "http://h/ct-missing"): "no Content-Type, but `<!DOCTYPE html>`",
    ("http-bodies.warc.gz", "http://h/ct-list"): "Content-Type `text/html, text/html`",
    ("http-bodies.warc.gz", "http://h/x-gzip"): "decompressed here alone",
    ("warcio-example-bad-non-chunked.warc.gz", "http://example.com/"): ONE_MEMBER,
    ("warcio-example-bad.warc.gz.bad", "http://example.com?example=1"): ONE_MEMBER,
    ("warcio-example-wrong-chunks.warc.gz", "http://example.com/"): "a record over several members",
}
"""(file, URL) of pages that memshard alone reads, or reads otherwise."""


def pages_of_warcio(file: Path) -> list[tuple[str, str]]:
    """Return URL and hash of the body of every page, up to where warcio gives up."""
    pages = []
    with file.open("rb") as stream:
        try:
            for record in warcio.ArchiveIterator(stream, arc2warc=True):
                if record.rec_type not in ("response", "resource"):
                    continue
                fields = record.http_headers or record.rec_headers
                body = record.content_stream().read()
                kind = (fields.get_header("Content-Type") or "").partition(";")[0].strip().lower()
                status = record.http_headers.get_statuscode() if record.http_headers else "200"
                if status == "200" and kind in HTML_TYPES and body.strip():
                    url = record.rec_headers.get_header("WARC-Target-URI").strip("<>")
                    pages.append((url, hashlib.sha1(body).hexdigest()))
        except warcio.ArchiveLoadFailed:
            pass
    return pages


@pytest.mark.skipif(not ARCHIVES, reason="the sample data are not here")
def test_pages_are_those_of_warcio_but_for_the_differences_in_the_table() -> None:
    different = set()
    for file in ARCHIVES:
        ours = [
            (page.url, hashlib.sha1(page.body).hexdigest())
            for page in read_pages(file, Counter())
            if page.html
        ]
        theirs = pages_of_warcio(file)
        assert {url for url, _ in theirs} <= {url for url, _ in ours}, file
        different |= {(file.name, url) for url, _ in set(ours) ^ set(theirs)}
        assert len(ours) >= len(theirs), file
    assert different == set(DIFFERENCES)
