"""WARC files, intact and damaged: real pages come out, and whatever does not is counted."""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[3] / "shared" / "data"
SMALL = SAMPLES / "warc" / "news_pages_small.warc.gz"
pytest.importorskip("fastwarc", reason="pip install 'memshard[data]'")
pytestmark = pytest.mark.skipif(not SMALL.exists(), reason="the sample data are not here")

from memshard.bench.extraction import gold_pages, score  # noqa: E402
from memshard.data_pipeline.web.charset import decode  # noqa: E402
from memshard.data_pipeline.web.extract import main_text  # noqa: E402
from memshard.data_pipeline.web.language import detect_language  # noqa: E402
from memshard.data_pipeline.web.warc import read_pages, read_records  # noqa: E402

FAULTS = (
    "fault_truncated",
    "fault_corrupt",
    "fault_garbage",
    "fault_bad_header",
    "fault_wrong_length",
    "fault_http",
    "fault_empty",
)


def members() -> list[bytes]:
    """Return the gzip members of the small file, each a record."""
    rest, parts = SMALL.read_bytes(), []
    while rest:
        member = zlib.decompressobj(wbits=31)
        member.decompress(rest)
        size = len(rest) - len(member.unused_data)
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


def pages_of(content: bytes, tmp_path: Path) -> tuple[list[str], Counter[str]]:
    """Return URLs of the pages, and what was counted; faults that did not happen are left out."""
    file, counts = tmp_path / "a.warc.gz", Counter[str]()
    file.write_bytes(content)
    return [page.url for page in read_pages(file, counts)], +counts


def faults(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in FAULTS if counts[name]}


def recompressed(member: bytes, change: Callable[[bytes], bytes]) -> bytes:
    return gzip.compress(change(gzip.decompress(member)), mtime=0)


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    return members()


@pytest.fixture(scope="module")
def urls(parts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return pages_of(b"".join(parts), tmp_path_factory.mktemp("whole"))[0]


def test_every_page_of_an_intact_file(parts: list[bytes], urls: list[str], tmp_path: Path) -> None:
    assert len(urls) == 72 and len(set(urls)) == 72
    plain = gzip.decompress(b"".join(parts))
    for content in (plain, gzip.compress(plain)):  # uncompressed, and one member for all
        actual, counts = pages_of(content, tmp_path)
        assert actual == urls and not faults(counts) and counts["records"] == 73


@pytest.mark.parametrize(
    ("damage", "lost", "expected"),
    [
        (lambda m: m[:200] + bytes(40) + m[240:], 1, {"fault_corrupt": 1}),
        (lambda m: m[:-8] + bytes(8), 1, {"fault_corrupt": 1}),
        (lambda m: b"garbage between members" * 9 + m, 0, {"fault_garbage": 1}),
        (lambda m: b"", 1, {}),
        (lambda m: m[: len(m) // 2], 1, {"fault_corrupt": 1}),
        (lambda m: recompressed(m, lambda r: b"WORC/1.0" + r[8:]), 1, {"fault_bad_header": 1}),
        (
            lambda m: recompressed(
                m, lambda r: r.replace(b"Content-Length: ", b"Content-Length: x", 1)
            ),
            1,
            {"fault_bad_header": 1},
        ),
        (
            lambda m: recompressed(
                m, lambda r: r.replace(b"Content-Length: ", b"Content-Length: 1", 1)
            ),
            0,
            {"fault_wrong_length": 1},
        ),
        (
            lambda m: recompressed(
                m, lambda r: r.replace(b"Content-Length: 7", b"Content-Length: ", 1)
            ),
            0,
            {"fault_wrong_length": 1},
        ),
        (
            lambda m: recompressed(m, lambda r: r.replace(b"HTTP/1.1 200", b"HTTP/1.1 404", 1)),
            1,
            {},
        ),
    ],
    ids=[
        "deflate",
        "checksum",
        "garbage",
        "absent",
        "cut",
        "header",
        "length-missing",
        "length-large",
        "length-small",
        "status",
    ],
)
def test_damage_costs_one_page_and_is_counted(
    parts: list[bytes],
    urls: list[str],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    lost: int,
    expected: dict[str, int],
) -> None:
    actual, counts = pages_of(b"".join([*parts[:1], damage(parts[1]), *parts[2:]]), tmp_path)
    assert actual == urls[lost:] and faults(counts) == expected
    assert (counts["skipped_bytes"] > 0) == bool(expected and (lost or "fault_garbage" in expected))


def test_a_cut_file_is_noticed_wherever_it_is_cut(
    parts: list[bytes], urls: list[str], tmp_path: Path
) -> None:
    content = b"".join(parts[:6])
    ends = {sum(map(len, parts[:count])): count - 1 for count in range(1, 7)}
    for size in [*range(0, len(content), 2111), *ends]:
        actual, counts = pages_of(content[:size], tmp_path)
        whole = max((pages for end, pages in ends.items() if end <= size), default=0)
        assert actual == urls[:whole]
        assert faults(counts) == (
            {} if size in ends else {"fault_empty": 1} if not size else {"fault_truncated": 1}
        ), size
    plain = gzip.decompress(content)
    _, counts = pages_of(plain[: len(plain) - 1000], tmp_path)
    assert faults(counts) == {"fault_truncated": 1}


def test_content_encoding_and_chunks_are_undone(parts: list[bytes], tmp_path: Path) -> None:
    body = b"<html><body><p>" + b"a page that was sent compressed " * 50 + b"</p></body></html>"
    packed = gzip.compress(body)
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (packed[:50], packed[50:], b"")
    )
    for headers, payload in ((b"", packed), (b"Transfer-Encoding: chunked\r\n", chunks)):
        http = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Encoding: "
            b"gzip\r\n" + headers + b"\r\n" + payload
        )
        head = (
            b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: "
            b"<http://a/>\r\nContent-Type: application/http; msgtype=response\r\n"
        )
        record = head + b"Content-Length: %d\r\n\r\n" % len(http) + http + b"\r\n\r\n"
        (tmp_path / "a.warc").write_bytes(record)
        pages = list(read_pages(tmp_path / "a.warc", Counter()))
        assert [(page.url, page.body) for page in pages] == [("http://a/", body)]


def test_genuine_broken_files_are_read_as_far_as_they_go() -> None:
    expected = {
        "warcio-example.warc.gz": (6, 1),
        "warcio-example-bad.warc.gz.bad": (6, 1),
        "warcio-example-bad-non-chunked.warc.gz": (6, 1),
        "warcio-example-trunc.warc": (4, 1),
        "warcio-example-wrong-chunks.warc.gz": (2, 1),
        "cc-whirlwind.warc.gz": (4, 1),
        "dolma-sample-0000.warc.gz": (48, 22),
    }
    for name, (records, pages) in expected.items():
        counts = Counter[str]()
        actual = list(read_pages(SAMPLES / "warc" / name, counts))
        assert (counts["records"], len(actual)) == (records, pages), name
        assert all(page.body for page in actual)
    assert counts["skipped_bytes"] == 0
    wet = list(read_pages(SAMPLES / "warc" / "cc-whirlwind.warc.wet.gz", counts))
    assert [page.html for page in wet] == [False] and counts["conversions"] == 1


def test_a_huge_declared_length_does_not_fill_the_memory(
    parts: list[bytes], urls: list[str], tmp_path: Path
) -> None:
    huge = recompressed(
        parts[1], lambda r: r.replace(b"Content-Length: ", b"Content-Length: 9999999", 1)
    )
    actual, counts = pages_of(b"".join([parts[0], huge, *parts[2:]]), tmp_path)
    assert (
        actual == urls[1:]
        and counts["too_large"] == 1
        and faults(counts) == {"fault_wrong_length": 1}
    )
    assert (
        not list(read_records(io.BytesIO(b"no archive at all"), counts))
        and counts["fault_bad_header"] == 1
    )


def test_extraction_reaches_its_score() -> None:
    warcs = sorted((SAMPLES / "warc").glob("news_pages-0000*.warc.gz"))
    gold = SAMPLES / "html" / "article-extraction-benchmark_ground-truth.json.gz"
    pages = gold_pages([SMALL, *warcs[:1]], SAMPLES / "warc" / "news_pages.truth.jsonl", gold)
    assert len(pages) > 40
    assert score((main_text(decode(body), "trafilatura"), text) for body, text in pages)[2] >= 0.95
    assert score((main_text(decode(body), "resiliparse"), text) for body, text in pages)[2] >= 0.88
    assert score([("a b c d e", "a b c d f")]) == pytest.approx((0.5, 0.5, 0.5))


def test_languages_agree_with_the_truth_file() -> None:
    lines = (SAMPLES / "warc" / "news_pages.truth.jsonl").read_text(encoding="utf-8").splitlines()
    truth = {
        record["url"]: {record["lang_resiliparse"], record["lang_py3langid"]}
        for record in map(json.loads, lines)
    }
    pages = read_pages(SAMPLES / "warc" / "news_pages-00000.warc.gz", Counter())
    texts = [(main_text(decode(page.body), "resiliparse"), truth[page.url]) for page in pages]
    detected = [(detect_language(text), accepted) for text, accepted in texts if text]
    assert sum(language in accepted for language, accepted in detected) >= 0.99 * len(detected)
    assert sum(
        ("en" in accepted) == (language == "en") for language, accepted in detected
    ) >= 0.99 * len(detected)


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("ccnews-before-2019-05.warc.gz", 20),
        ("http-bodies.warc.gz", 11),
        ("lf-http-headers.warc.gz", 20),
        ("lf-all.warc", 20),
        ("a.arc.gz", 60),
        ("cc.warc.wet.gz", 60),
        ("longtext.warc.gz", 61),
    ],
)
def test_archives_that_were_lost_are_read(name: str, pages: int) -> None:
    assert len(list(read_pages(SAMPLES / "faults" / name, Counter()))) == pages


def test_charsets_that_only_http_headers_name_are_right() -> None:
    file = SAMPLES / "faults" / "charset-in-http-header.warc.gz"
    korean, russian = (decode(page.body, page.content_type) for page in read_pages(file, Counter()))
    assert "모든 인류 구성원의 천부의 존엄성" in korean
    assert "Принимая во внимание, что признание достоинства" in russian
