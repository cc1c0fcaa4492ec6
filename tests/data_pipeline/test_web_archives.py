"""Web archives as they are: bodies, headers and records that are not what the standards say."""

import base64
import gzip
import hashlib
import time
import zlib
from pathlib import Path

import pytest

pytest.importorskip("fastwarc", reason="pip install 'memshard[data]'")

from memshard.data_pipeline.web.charset import decode
from memshard.data_pipeline.web.warc import KINDS, OUTCOMES
from tests.data_pipeline.web_archive import (
    HTML,
    OK,
    arc_head,
    arc_record,
    pages_of,
    record,
)

ZIPPED = gzip.compress(HTML, mtime=0)


HALVES = gzip.compress(HTML[:99]) + gzip.compress(HTML[99:])


def raw_deflate(content: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(content) + stream.flush()


def chunked(
    content: bytes, size: int = 500, head: bytes = b"%x\r\n", end: bytes = b"\r\n"
) -> bytes:
    parts = [content[place : place + size] for place in range(0, len(content), size)]
    return b"".join(head % len(part) + part + end for part in [*parts, b""])


# CE and TE: Content-Encoding and Transfer-Encoding.
BODIES = {
    # As the headers say.
    "gzip": ("CE: gzip", ZIPPED, True),
    "x-gzip": ("CE: x-gzip", ZIPPED, True),
    "upper case": ("content-encoding: GZIP", ZIPPED, True),
    "gzip of two members": ("CE: gzip", HALVES, True),
    "gzip twice": ("CE: gzip, gzip", gzip.compress(ZIPPED), True),
    "NULs behind gzip": ("CE: gzip", ZIPPED + bytes(20), True),
    "deflate": ("CE: deflate", zlib.compress(HTML), True),
    "raw deflate": ("CE: deflate", raw_deflate(HTML), True),
    "chunks": ("TE: chunked", chunked(HTML), True),
    "chunks with extensions": ("TE: chunked", chunked(HTML, head=b'%x;a="b"\r\n'), True),
    "chunks with padded sizes": ("TE: Chunked", chunked(HTML, head=b"%04X  \r\n"), True),
    "chunks with LF": ("TE: chunked", chunked(HTML, head=b"%x\n", end=b"\n"), True),
    "chunks with a trailer": ("TE: chunked", chunked(HTML)[:-2] + b"Expires: 0\r\n\r\n", True),
    "gzip in chunks": ("CE: gzip\r\nTE: chunked", chunked(ZIPPED), True),
    "gzip as a transfer encoding": ("TE: gzip, chunked", chunked(ZIPPED), True),
    "none": ("CE: none", HTML, True),
    "utf-8": ("CE: utf-8", HTML, True),
    "empty name": ("CE:", HTML, True),
    "unknown name": ("CE: 7bit\r\nTE: binary", HTML, True),
    "length that is too small": ("Content-Length: 7", HTML, True),
    # Not as they say.
    "undone: all": ("CE: gzip\r\nTE: chunked", HTML, False),
    "undone: chunks": ("CE: gzip\r\nTE: chunked", ZIPPED, False),
    "undone: gzip": ("CE: gzip\r\nTE: chunked", chunked(HTML), False),
    "undone: deflate": ("CE: deflate", HTML, False),
    "undone: br": ("CE: br", HTML, False),
    "undone: zstd": ("CE: zstd", HTML, False),
    "said twice": ("CE: gzip\r\nCE: gzip", ZIPPED, False),
    "gzip called deflate": ("CE: deflate", ZIPPED, True),
    "deflate called gzip": ("CE: gzip", zlib.compress(HTML), True),
    "gzip unsaid": ("Server: x", ZIPPED, False),
    "chunks unsaid": ("Server: x", chunked(HTML), False),
    "gzip in chunks unsaid": ("Server: x", chunked(ZIPPED), False),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_read_whatever_their_headers_say(tmp_path: Path, name: str) -> None:
    headers, body, as_said = BODIES[name]
    headers = headers.replace("CE:", "Content-Encoding:").replace("TE:", "Transfer-Encoding:")
    block = OK + headers.encode() + b"\r\n\r\n" + body
    pages, counts = pages_of(record(block), tmp_path / "a.warc")
    assert [page.body for page in pages] == [HTML]
    assert counts["fault_encoding"] == (not as_said)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("Transfer-Encoding: chunked", chunked(HTML)[:-300]),
        ("Transfer-Encoding: chunked", chunked(HTML, size=5000)[:-300]),
        ("Content-Encoding: gzip", ZIPPED[:-30]),
        ("Content-Encoding: gzip", ZIPPED[:200] + bytes(40) + ZIPPED[200:]),
        ("Content-Encoding: deflate", zlib.compress(HTML)[:-30]),
        ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked", chunked(ZIPPED)[:-40]),
    ],
    ids=["chunks", "a chunk", "gzip", "damaged gzip", "deflate", "gzip in chunks"],
)
def test_bodies_that_were_cut_are_used_as_far_as_they_go(
    tmp_path: Path, headers: str, body: bytes
) -> None:
    block = OK + headers.encode() + b"\r\n\r\n" + body
    pages, counts = pages_of(record(block), tmp_path / "a.warc")
    assert counts["fault_encoding"] == 1
    # Nothing tells the first bytes of damage from content.
    assert pages[0].body[:60] == HTML[:60] and len(pages[0].body) < 2 * len(HTML)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [("gzip", bytes(range(256)) * 9), ("br", ZIPPED[12:]), ("zstd", bytes(99)), ("deflate", b"\0")],
    ids=["gzip", "br", "zstd", "deflate"],
)
def test_binary_bodies_are_faults(tmp_path: Path, encoding: str, body: bytes) -> None:
    block = OK + f"Content-Encoding: {encoding}\r\n\r\n".encode() + body
    pages, counts = pages_of(record(block), tmp_path / "a.warc")
    assert not pages and counts["fault_http"] == 1 and not counts["fault_encoding"]


def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(gzip.compress(bytes(300 << 20)))
    block = OK + b"Content-Encoding: gzip, gzip\r\n\r\n" + bomb
    pages, _ = pages_of(record(block), tmp_path / "a.warc")
    assert len(pages[0].body) == 1 << 26


# Small files that took hours, or gigabytes, before they were bounded.
BOMBS = {
    "a head without an end": b"HTTP/1.1 200 OK\n" + b"a:b\n" * (1 << 20),
    "a folded field without an end": b"HTTP/1.1 200 OK\na:b\n" + b" bcd\n" * (1 << 20),
    "thousands of responses": b"HTTP/1.1 100\n\n" * (1 << 19),
    "thousands of encodings": OK + b"Content-Encoding: " + b"br," * 9999 + b"\r\n\r\n" + HTML * 99,
    "chunks of a byte": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * (1 << 20),
    "members of nothing": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"") * (1 << 19),
    "a charset behind spaces": OK + b"\r\n<meta charset=" + b" " * 16_000 + HTML,
}


@pytest.mark.parametrize("name", BOMBS)
def test_pages_that_are_small_and_take_hours_are_bounded(tmp_path: Path, name: str) -> None:
    """Seconds of CPU time, of which each took 10 to thousands before."""
    content = gzip.compress(record(BOMBS[name]) + record(OK + b"\r\n" + HTML), 1)
    began = time.process_time()
    pages, counts = pages_of(content, tmp_path / "a.warc.gz")
    for page in pages:
        decode(page.body, page.content_type)
    assert time.process_time() - began < 5
    assert bytes(pages[-1].body) == HTML
    assert counts["responses"] == 2


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 18, str(1 << 30)])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_length_that_no_file_has_costs_its_record_alone(
    tmp_path: Path, length: str, zipped: bool
) -> None:
    """5,000 digits ended the build; others took the rest of the file with them."""
    good, bad = record(OK + b"\r\n" + HTML), record(OK + b"\r\n" + HTML, length=123456)
    bad = bad.replace(b"123456", length.encode())
    parts = [good, bad, good]
    content = b"".join(map(gzip.compress, parts)) if zipped else b"".join(parts)
    pages, counts = pages_of(content, tmp_path / "a.warc")
    assert [bytes(page.body) for page in pages] == [HTML, HTML]
    assert counts["fault_bad_header"] + counts["fault_wrong_length"] == 1


@pytest.mark.parametrize(
    ("head", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", None),
        (b"http/1.1 200 ok\r\ncontent-type: text/html\r\n\r\n", None),
        (b"HTTP/2 200\r\nContent-Type: text/html\r\n\r\n", None),
        (b"HTTPX/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", None),
        (b"HTTP/1.0  200\r\nContent-Type: text/html\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\nContent-Type: text/html\nServer: x\n\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nServer: x\n\n", None),
        (b"\r\nHTTP/1.1 200 OK\r\nContent-Type : text/html\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type:\r\n text/html\r\n\r\n", None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", None),
        (b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" * 2 + OK + b"\r\n", None),
        (b"HTTP/1.0 200 Connection established\r\n\r\n" + OK + b"\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html, text/html\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Type: TEXT/HTML;a=b\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/xhtml+xml\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", "not_html"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html, a/b\r\n\r\n", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\nnot", "not_html"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n", "status"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "status"),
        (b"HTTP/1.1 OK\r\nContent-Type: text/html\r\n\r\n", "fault_http"),
        (b"", "fault_http"),
    ],
)  # fmt: skip
def test_heads_of_responses(tmp_path: Path, head: bytes, outcome: str | None) -> None:
    pages, counts = pages_of(record(head + HTML), tmp_path / "a.warc")
    assert [page.body for page in pages] == ([] if outcome else [HTML])
    assert {name for name in OUTCOMES if counts[name]} == ({outcome} if outcome else set())


def mixed_records(line_end: bytes) -> list[bytes]:
    """Return records of every kind; those that are pages or texts have URLs that say so."""
    text, ok = "text/plain", OK.replace(b"\r\n", line_end) + line_end
    return [
        record(b"Software: x\r\n", "warcinfo", "application/warc-fields", line_end=line_end),
        record(
            b"GET / HTTP/1.1\r\n\r\n",
            "request",
            "application/http; msgtype=request",
            line_end=line_end,
        ),
        record(ok + HTML, url="http://page/0", line_end=line_end),
        record(ok + HTML, "revisit", line_end=line_end),
        record(ok, url="http://empty/", line_end=line_end),
        record(ok + HTML, url="<http://page/1>", length=9_999, line_end=line_end),
        record(b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", line_end=line_end),
        record(b"%PDF", "response", "application/pdf", line_end=line_end),
        record(HTML, "response", "text/html", url="http://page/2", line_end=line_end),
        record(
            b"a.example. 1 IN A 1.2.3.4",
            "response",
            "text/dns",
            url="dns:a.example",
            line_end=line_end,
        ),
        record(HTML, "resource", "text/html; charset=utf-8", url="file:page/3", line_end=line_end),
        record(HTML, "resource", None, url="http://page/4", line_end=line_end),
        record(b"{}", "resource", "application/json", line_end=line_end),
        record(b"Some text.", "conversion", text, url="http://page/5", line_end=line_end),
        record(HTML, "conversion", "text/html", url="http://page/6", line_end=line_end),
        record(b"\x89PNG", "conversion", "image/png", line_end=line_end),
        record(b"no http at all", "response", line_end=line_end),
        record(b"{}", "metadata", "application/json", line_end=line_end),
    ]


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("zipped", ["plain", "members", "whole"])
def test_every_record_ends_in_exactly_one_counter(
    tmp_path: Path, line_end: bytes, zipped: str
) -> None:
    records = mixed_records(line_end)
    if zipped == "members":
        records = [gzip.compress(part) for part in records]
    content = b"".join(records)
    pages, counts = pages_of(
        gzip.compress(content) if zipped == "whole" else content, tmp_path / "a.warc"
    )
    assert [page.url[-6:] for page in pages] == [f"page/{number}" for number in range(7)]
    assert [page.html for page in pages] == [True] * 5 + [False, True]
    assert counts["records"] == len(records)
    assert [counts[name] for name in KINDS.values()] == [8, 3, 3]
    assert sum(counts[name] for name in KINDS.values()) == len(pages) + sum(
        counts[name] for name in OUTCOMES
    )
    assert {name: counts[name] for name in OUTCOMES} == {
        "status": 1,
        "not_html": 4,
        "empty_body": 1,
        "too_large": 0,
        "fault_http": 1,
    }
    assert counts["fault_wrong_length"] == counts["fault_bad_header"] + 1 == 1


def test_damage_among_records_with_line_feeds_costs_one(tmp_path: Path) -> None:
    parts = [record(OK + b"\r\n" + HTML, url=f"http://{n}/", line_end=b"\n") for n in range(9)]
    parts[4] = parts[4].replace(b"WARC/1.0", b"WORC/1.0")
    pages, counts = pages_of(b"".join(parts), tmp_path / "a.warc")
    assert len(pages) == 8 and counts["fault_bad_header"] == 1


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["a.arc", "a.arc.gz", "part-0"])
def test_arc_files_are_read(tmp_path: Path, version: int, name: str) -> None:
    parts = [
        arc_head(version),
        arc_record(b"a.example. 1 IN A 1.2.3.4", "dns:a.example", "text/dns", version),
        *(
            arc_record(OK + b"\r\n" + HTML + b"%d" % number, f"http://{number}/", version=version)
            for number in range(5)
        ),
        arc_record(b"HTTP/1.1 404 No\r\n\r\n", "http://gone/", version=version),
        arc_record(b"HTTP/1.1 200 OK\nContent-type: image/gif\n\nGIF", "http://g/", "image/gif"),
    ]
    if name.endswith(".gz"):
        parts = [gzip.compress(part) for part in parts]
    pages, counts = pages_of(b"".join(parts), tmp_path / name)
    assert [page.url for page in pages] == [f"http://{number}/" for number in range(5)]
    assert [page.body[-1:] for page in pages] == [b"0", b"1", b"2", b"3", b"4"]
    assert counts == {
        "records": 9, "responses": 7, "resources": 1, "status": 1, "not_html": 2,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_damage_in_arc_files_costs_one_record(tmp_path: Path, zipped: bool) -> None:
    parts = [arc_head()]
    parts += [arc_record(OK + b"\r\n" + HTML, f"http://{number}/") for number in range(9)]
    parts[3] = parts[3].replace(b"1.2.3.4 20050101000000 ", b"")
    parts[6] = parts[6].replace(b"%d\nHTTP" % len(OK + b"\r\n" + HTML), b"300\nHTTP")
    if zipped:
        parts = [gzip.compress(part) for part in parts]
        parts[8] = parts[8][:60] + bytes(30) + parts[8][90:]
    pages, counts = pages_of(b"".join(parts), tmp_path / "a.arc")
    lost = {"http://2/", "http://7/"} if zipped else {"http://2/"}
    assert {f"http://{number}/" for number in range(9)} - {page.url for page in pages} == lost
    assert counts["fault_bad_header"] == counts["fault_wrong_length"] == 1
    assert counts["fault_corrupt"] == zipped


def base32(content: bytes) -> str:
    return base64.b32encode(hashlib.sha1(content).digest()).decode()


PACKED = OK + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(ZIPPED)


@pytest.mark.parametrize(
    ("digest", "wrong"),
    [
        (f"sha1:{base32(chunked(ZIPPED))}", 0),
        (f"sha1:{base32(ZIPPED)}", 0),  # writers differ in what they take the digest of
        (f"sha1:{base32(HTML)}", 0),
        (f"sha-1:{base32(ZIPPED).lower()}", 0),
        (f"SHA256:{hashlib.sha256(HTML).hexdigest()}", 0),
        (f"md5:{hashlib.md5(ZIPPED).hexdigest().upper()}", 0),
        (f"sha1:{base32(HTML[1:])}", 1),
        ("sha256:0123", 1),
        ("blake9:0123", 0),
        ("nonsense", 0),
    ],
)
def test_digests_of_payloads_are_checked(tmp_path: Path, digest: str, wrong: int) -> None:
    content = record(PACKED, fields={"WARC-Payload-Digest": digest})
    pages, counts = pages_of(content, tmp_path / "a.warc")
    assert [page.body for page in pages] == [HTML] and counts["fault_digest"] == wrong


def test_a_changed_bit_is_noticed_by_either_digest(tmp_path: Path) -> None:
    block = OK + b"\r\n" + HTML
    digests = {"WARC-Payload-Digest": HTML, "WARC-Block-Digest": block}
    for name, content in digests.items():
        whole = record(block, fields={name: f"sha1:{base32(content)}"})
        changed = whole.replace(b"a page", b"a paga", 1)
        for part, wrong in ((whole, 0), (changed, 1)):
            pages, counts = pages_of(part, tmp_path / "a.warc")
            assert len(pages) == 1 and counts["fault_digest"] == wrong, name
