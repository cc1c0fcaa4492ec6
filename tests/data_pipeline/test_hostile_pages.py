"""Web archives made to cost a reader hours, or its memory, are bounded."""

import io
import os
import signal
import struct
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from memshard.data_pipeline.prepare.inputs import warc
from memshard.data_pipeline.prepare.workers import Apart, ItemTimeout, Watch
from memshard.data_pipeline.web.records import read_records
from tests.data_pipeline.web_archive import HTML, OK, record

FORMATS = b"".join(b"<p><b a=%d>" % number for number in range(60_000))
PAGES = {
    "nested": b"<div>" * 260_000 + b"x" + b"</div>" * 260_000,
    "ends of links": b"<a href=x><div>" * 60_000 + b"</a>" * 60_000,
    "open formats": FORMATS,
    "attributes": b"<p " + b" ".join(b"a%d" % number for number in range(600_000)) + b">x",
}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_that_parsers_take_hours_for_are_ended_and_counted(kind: str, tmp_path: Path) -> None:
    """Each costs its second of CPU time, not its worker, and is in one counter of the report."""
    pytest.importorskip("resiliparse")
    file = tmp_path / "a.warc"
    bodies = [HTML, b"<html><body>" + PAGES[kind], HTML]
    file.write_bytes(b"".join(record(OK + b"\r\n" + body) for body in bodies))
    counts: Counter[str] = Counter()
    options = {"extractor": "resiliparse", "language": None, "longest": 1_000_000}
    texts = list(warc.read([file], options, counts, Watch(seconds=1)))
    assert [text.startswith("Sentence 0 of a page") for text in texts] == [True, True]
    assert counts["pages.documents"] == 3
    assert counts["page_timeout.documents"] + counts["page_failed.documents"] == 1


def test_a_page_that_is_worked_on_apart_has_the_same_text(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    page = HTML.replace(b"</p>", " ä \U0001f600</p>".encode())
    file = tmp_path / "a.warc"
    file.write_bytes(record(OK + b"\r\n" + page))
    options = {"extractor": "resiliparse", "language": None, "longest": 1_000_000}

    def texts() -> list[str]:
        return list(warc.read([file], options, Counter(), Watch(seconds=20)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warc, "MANY_TAGS", 0)
        apart = texts()
    assert apart == texts() and apart[0].endswith("ä \U0001f600\n")


def test_work_apart_ends_at_its_time_its_memory_and_its_errors() -> None:
    def work(text: str) -> list[str] | None:
        if text == "time":
            sum(iter(int, 1))
        if text == "memory":
            bytearray(1 << 33)
        return [text, str(os.getpid())]

    with closing(Apart(work, 1)) as apart:
        (text, process), (other, same) = apart("ä\ud800"), apart("b")
        assert (text, other, process) == ("ä\ud800", "b", same)
        for name, error in (("time", ItemTimeout), ("memory", RuntimeError)):
            with pytest.raises(error):
                apart(name)
            assert apart("c")[0] == "c", "the next text has another copy"
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_an_interrupted_call_leaves_no_answer_to_the_next_text() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise ItemTimeout

    def work(text: str) -> str:
        time.sleep(float(text))
        return text

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with closing(Apart(work, 5)) as apart:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(ItemTimeout):
                apart("1.5")
            assert apart("0") == "0"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_members_of_gzip_that_lie_in_each_other_take_no_quadratic_time() -> None:
    """Stored blocks hold the headers of all members behind them, until the damage that ends all."""
    start = b"WARC/1.0\r\nContent-Length: 9\r\n\r\n"
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    size, members = len(head) + 5 + len(start), 1400

    def block(length: int) -> bytes:
        return b"\0" + struct.pack("<HH", length, length ^ 0xFFFF)

    one = [
        head + block((members - number) * size - len(head) - 5) + start for number in range(members)
    ]
    group = block(members * size) + b"".join(one)

    def records(groups: int) -> int:
        content = (groups * group)[5:] + b"\xff" * 100
        return sum(1 for _ in read_records(io.BytesIO(content), Counter()))

    assert records(8) < 1.5 * records(4)
