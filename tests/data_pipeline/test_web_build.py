"""Builds from web archives of every kind: what goes through which filter, and what the report
counts.
"""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("fastwarc", reason="pip install 'memshard[data]'")

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.prepare import documents
from memshard.data_pipeline.prepare.documents import Filters, plan_units
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.launch.cli.main import main
from tests.data_pipeline.conftest import WORDS
from tests.data_pipeline.test_build import texts_of
from tests.data_pipeline.test_remote import Server, server  # noqa: F401
from tests.data_pipeline.web_archive import OK, arc_head, arc_record, record

SUBJECTS = "the farmer|a teacher|our neighbour|the young doctor|a sailor|the old painter".split("|")
VERBS = "has carried|was looking for|wanted to sell|could not find|will repair|lost".split("|")
OBJECTS = "a basket of apples|the letter|an engine|two wooden chairs|the map|a boat".split("|")
PLACES = "near the river|in the village|at the market|behind that house|with a friend".split("|")


def story(seed: int, sentences: int = 20) -> str:
    """Return English prose, a sentence a line."""
    draw = random.Random(seed)

    def name() -> str:
        return (draw.choice(WORDS) + draw.choice(WORDS)).title()

    lines = (
        f"On day {draw.randrange(999)} {draw.choice(SUBJECTS)} {name()} {draw.choice(VERBS)} "
        f"{draw.choice(OBJECTS)} {draw.choice(PLACES)} of {name()}, and that was to be the end."
        for _ in range(sentences)
    )
    return "\n".join(lines)


GERMAN = "\n".join(
    f"Am Tag {number} suchte der alte Maler am Ufer des Flusses nach dem Brief, den ihm ein "
    "Nachbar geschrieben hatte, und er fand ihn nicht."
    for number in range(30)
)


def web_page(text: str) -> bytes:
    paragraphs = "".join(f"<p>{line}</p>" for line in text.split("\n"))
    return (
        "<!DOCTYPE html><html><head><meta charset=utf-8><title>A story</title></head><body>"
        f"<article><h1>A story</h1>{paragraphs}</article></body></html>"
    ).encode()


def wet(texts: Sequence[str]) -> bytes:
    """Return a WET file as Common Crawl has them."""
    records = [record(b"Software-Info: x\r\n", "warcinfo", "application/warc-fields")]
    records += [
        record(text.encode(), "conversion", "text/plain", f"http://{number}/")
        for number, text in enumerate(texts)
    ]
    return b"".join(map(gzip.compress, records))


def built(out: Path, *arguments: str | Path) -> dict:
    """Return the report of a build with the defaults of the command line."""
    words = ["data", "build", *map(str, arguments), "--out", str(out), "--vocab", "320"]
    assert main([*words, "--workers", "1"]) == 0
    report: dict = json.loads((out / "report.json").read_text())
    return report


def kept(out: Path) -> set[str]:
    return {text for split in load_index(out).splits for text in texts_of(out, split)}


TEXTS = [story(seed) for seed in range(60)]


def test_texts_of_wet_files_go_through_language_quality_and_duplicates(tmp_path: Path) -> None:
    more = [GERMAN, TEXTS[7].split("\n")[0], TEXTS[5], TEXTS[6] + "\nMore."]
    (tmp_path / "a.warc.wet.gz").write_bytes(wet(TEXTS + more))
    report = built(tmp_path / "data", tmp_path / "a.warc.wet.gz")
    assert report["archive"] == {"records": 65, "conversions": 64}
    stages = {name: stage["documents"] for name, stage in report["stages"].items()}
    assert (stages["language"], stages["quality.words"]) == (1, 1)
    assert (stages["exact_duplicate"], stages["near_duplicate"]) == (1, 1)
    assert kept(tmp_path / "data") == {f"{text}\n" for text in TEXTS}


@pytest.mark.parametrize(
    "name", ["a.warc.gz?sig=1", "a.warc.wet.gz?sig=1", "wet.paths", "a.arc.gz?sig=1", "download"]
)
def test_archives_behind_urls(server: Server, tmp_path: Path, name: str) -> None:  # noqa: F811
    arc = [arc_head()]
    for number, text in enumerate(TEXTS):
        arc.append(arc_record(OK + b"\r\n" + web_page(text), f"http://{number}/"))
    (server.folder / "a.warc.wet.gz").write_bytes(wet(TEXTS))
    warc = [record(OK + b"\r\n" + web_page(text)) for text in TEXTS]
    (server.folder / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, warc)))
    (server.folder / "wet.paths").write_text("a.warc.wet.gz?sig=1\n")
    for file in ("a.arc.gz", "download"):
        (server.folder / file).write_bytes(b"".join(map(gzip.compress, arc)))
    prefix = ["--prefix", f"{server.url}/"] if name == "wet.paths" else []
    report = built(tmp_path / "data", f"{server.url}/{name}", *prefix, "--extractor", "resiliparse")
    assert report["documents"] == len(TEXTS) and report["stages"]["pages"]["documents"] == 60


def test_a_list_behind_a_url_fetches_from_other_hosts_only_with_leave(
    server: Server,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (server.folder / "wet.paths").write_text("http://127.0.0.1:1/a.warc.wet.gz\n")
    words = ["data", "build", f"{server.url}/wet.paths", "--out", str(tmp_path / "data")]
    assert main(words) == 2
    assert "--allow connections" in capsys.readouterr().err


def test_an_archive_among_text_files_filters_its_own_pages_only(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"short{number}.txt").write_text(f"Zeile {number}.\n{GERMAN}\n")
        (tmp_path / f"same{number}.txt").write_text(TEXTS[0] + "\n")
    content = [record(OK + b"\r\n" + web_page(text)) for text in [*TEXTS[:30], TEXTS[9], GERMAN]]
    (tmp_path / "a.warc").write_bytes(b"".join(content))
    files = [tmp_path / "*.txt", tmp_path / "a.warc", "--extractor", "resiliparse"]
    report = built(tmp_path / "data", *files)
    assert report["stages"]["page_language"]["documents"] == 1
    # The first page is a text file, too, but for its title; the last but one an earlier page.
    assert report["stages"]["near_duplicate"]["documents"] == 1
    assert report["stages"]["exact_duplicate"]["documents"] == 1
    assert report["documents"] == 40 + 29
    # What is asked for holds for all.
    report = built(tmp_path / "asked", *files, "--language", "en", "--dedup", "exact")
    assert report["stages"]["language"]["documents"] == 20
    assert report["stages"]["exact_duplicate"]["documents"] == 19 + 1


def test_long_articles_are_cut_like_other_documents_and_nothing_is_lost(tmp_path: Path) -> None:
    text = story(1000, 11_000)
    assert len(text) > 1_000_000
    content = [record(OK + b"\r\n" + web_page(part)) for part in [*TEXTS[:30], text]]
    (tmp_path / "a.warc").write_bytes(b"".join(content))
    out = tmp_path / "data"
    report = built(out, tmp_path / "a.warc", "--extractor", "resiliparse", "--dedup", "none")
    assert report["documents_cut"] == 1 and len(report["stages"]) == 2
    texts = kept(out)
    assert max(map(len, texts)) <= 65_536
    assert set(text.split("\n")) <= {line for part in texts for line in part.split("\n")}
    assert sum(map(len, texts)) >= len(text)


def test_a_short_quick_text_is_no_verdict_on_a_language(tmp_path: Path) -> None:
    """Layouts of which the quick look finds "Skip to content" were taken for Pidgin."""
    from memshard.data_pipeline.web.extract import main_text

    pages = [
        web_page(text)
        .replace(b"<article>", b"<a href=#main>Skip to content</a><article><div class=modal>")
        .replace(b"</article>", b"</div></article>")
        for text in TEXTS[:20]
    ]
    assert len(main_text(pages[0].decode(), "resiliparse")) < 200
    content = [record(OK + b"\r\n" + page) for page in pages]
    (tmp_path / "a.warc").write_bytes(b"".join(content))
    report = built(tmp_path / "data", tmp_path / "a.warc")
    assert report["documents"] == 20 and "page_language" not in report["stages"]


def test_a_caption_is_not_taken_for_the_article() -> None:
    """trafilatura's fast mode did it where an article was in a <div class=caption>, say."""
    from memshard.data_pipeline.web.extract import main_text

    paragraphs = "".join(f"<p>{line}</p>" for line in TEXTS[0].split("\n"))
    page = (
        "<!DOCTYPE html><html><head><title>t</title></head><body><article><p>The farmer near the "
        "river, in a photograph that was taken in the spring of that year by a friend.</p>"
        f"</article><div class=caption>{paragraphs}</div></body></html>"
    )
    assert TEXTS[0] in main_text(page, "trafilatura")


def test_an_empty_result_says_what_became_of_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = [
        record(b"HTTP/1.1 404 No\r\n\r\n"),
        record(b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\n\r\nx"),
        record(b"no http"),
        record(OK + b"\r\n"),
        record(OK + b"\r\n" + web_page(GERMAN)),
    ]
    (tmp_path / "a.warc").write_bytes(b"".join(content))
    assert main(["data", "build", str(tmp_path / "a.warc"), "--out", str(tmp_path / "d")]) == 2
    said = capsys.readouterr().err
    for count in ("5 responses", "1 status", "1 not_html", "1 fault_http", "1 empty_body"):
        assert count in said
    assert "1 page_language" in said


def test_another_extractor_or_version_reads_units_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.warc").write_bytes(record(OK + b"\r\n" + web_page(TEXTS[0])))
    (tmp_path / "a.txt").write_text("text")

    def keys(name: str, extractor: str = "trafilatura") -> str:
        sources = Sources(find_files([tmp_path / name]), options={"extractor": extractor})
        (unit,) = plan_units(sources, Filters(), tmp_path)
        return unit.folder.name

    before, text = keys("a.warc"), keys("a.txt")
    assert keys("a.warc", "resiliparse") != before == keys("a.warc")
    monkeypatch.setattr(documents, "version", lambda name: "99.9")
    assert keys("a.warc") != before and keys("a.txt") == text
