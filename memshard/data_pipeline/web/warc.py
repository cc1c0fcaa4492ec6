"""HTML pages of WARC files (ISO 28500), also of damaged ones: whatever is skipped is counted.

FastWARC parses records and HTTP. Cutting the file into records is done here, because no library
notices a truncated file or continues after a damaged member.
"""

import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecordType

from memshard.data_pipeline.web.gzip_members import PIECE_BYTES, Event, read_members

MAX_HEADER = 1 << 16
MAX_RECORD = 1 << 26  # bytes; larger ones are videos and archives, which contain no article
LENGTH = re.compile(rb"^content-length:[ \t]*(\d+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
CONVERSION = re.compile(rb"^warc-type:[ \t]*conversion", re.IGNORECASE | re.MULTILINE)
NEWLINES = re.compile(rb"[\r\n]*")
HEADER = re.compile(rb"WARC/[01]\.\d")
RECORD = re.compile(rb"\nWARC/[01]\.\d")
HTML_TYPES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class Page:
    """A page. number: of the response record in its file, from 0. body: as sent, with transfer and
    content encoding undone.
    """

    number: int
    url: str
    body: bytes


def read_pages(path: Path, counts: Counter[str]) -> Iterator[Page]:
    """Yield the successful HTML responses of a .warc or .warc.gz, in order.

    Counts records, responses, `status` (not 200), `not_html`, `empty_body`, `too_large`; faults:
    `fault_empty` (no byte in the file), `fault_truncated`, `fault_corrupt`, `fault_garbage`,
    `fault_bad_header`, `fault_wrong_length` (the payload is used as far as it goes), `fault_http`;
    and `skipped_bytes`. ValueError for a file of text that others extracted from pages.
    """
    pages, converted = counts["responses"], False
    with path.open("rb") as stream:
        for record in read_records(stream, counts):
            counts["records"] += 1
            converted |= CONVERSION.search(record, 0, record.find(b"\r\n\r\n")) is not None
            try:
                yield from _page(record, counts)
            except (ValueError, OSError, EOFError, RuntimeError, zlib.error):
                counts["fault_http"] += 1
    if converted and counts["responses"] == pages:
        raise ValueError(
            f"{path} holds conversion records (WET), text that others extracted, and no web page, "
            "and is not read: name the WARC files of the crawl"
        )


def _page(record: bytes, counts: Counter[str]) -> Iterator[Page]:
    reader = ArchiveIterator(
        io.BytesIO(record + b"\r\n\r\n"),
        record_types=WarcRecordType.response,
        parse_http=False,
        auto_decode="all",
        quirks_mode=True,
    )
    for response in reader:
        number = counts["responses"]
        counts["responses"] += 1
        if not (
            response.is_http
            or (response.headers.get("Content-Type") or "").startswith("application/http")
        ):
            counts["not_html"] += 1
            continue
        response.parse_http(auto_decode="all")
        headers = response.http_headers
        if headers is None or headers.status_code is None:
            counts["fault_http"] += 1
        elif headers.status_code != 200:
            counts["status"] += 1
        elif (response.http_content_type or "").strip().lower() not in HTML_TYPES:
            counts["not_html"] += 1
        elif not (body := response.reader.read()):
            counts["empty_body"] += 1
        else:
            yield Page(number, (response.headers.get("WARC-Target-URI") or "").strip("<>"), body)


def read_records(stream: BinaryIO, counts: Counter[str]) -> Iterator[bytes]:
    """Yield WARC records, header and payload, each with the Content-Length that it really has.
    stream: seekable.
    """
    start = stream.read(2)
    stream.seek(0)
    if not start:
        counts["fault_empty"] += 1
    elif start == b"\x1f\x8b":
        # A member that is whole has the whole payload, whatever the header says.
        framer = _Framer(counts, "fault_wrong_length")
        for event, data in read_members(stream, counts, b"WARC/"):
            if data.startswith(b"WARC/") or event is Event.BROKEN:
                yield from framer.end_short_record()
            if event is Event.DATA:
                yield from framer.feed(data)
            elif event is Event.END:
                yield from framer.close(last=False)
            elif event is Event.BROKEN:
                framer.drop()
        yield from framer.close()
    else:
        framer = _Framer(counts, "fault_truncated")
        while data := stream.read(PIECE_BYTES):
            yield from framer.feed(data)
        yield from framer.close()


class _Framer:
    """Cuts a byte stream into records; yields a record once what follows it is as it should be."""

    def __init__(self, counts: Counter[str], cut: str) -> None:
        self._counts = counts
        self._cut = cut  # the fault of a last record that is shorter than its Content-Length
        self._buffer = bytearray()
        self._skip = 0  # bytes of an oversized record still to pass over
        self._short = False  # the buffer's record has more Content-Length than its member has bytes
        self._lost = False  # no header where one should be, and none since

    def feed(self, data: bytes, ended: bool = False) -> Iterator[bytes]:
        """Add bytes, and yield the records that they complete."""
        passed = min(self._skip, len(data))
        self._skip -= passed
        self._buffer += data[passed:]
        while self._buffer:
            record, used = self._split(ended)
            if record is not None:
                yield record
            if not used:
                break
            del self._buffer[:used]

    def close(self, last: bool = True) -> Iterator[bytes]:
        """End the member, or with `last` the file, and yield the record that ends with it. A short
        one waits, because the next member may continue it.
        """
        self._short = not last and self._is_short()
        if not self._short:
            yield from self.feed(b"", ended=True)
            self._counts[self._cut] += self._skip > 0
            self.drop()

    def end_short_record(self) -> Iterator[bytes]:
        """Yield what there is of a record that waits: what comes next does not continue it."""
        if self._short:
            yield from self.close()

    def _is_short(self) -> bool:
        head = self._buffer.find(b"\r\n\r\n", 0, MAX_HEADER)
        length = (
            LENGTH.search(self._buffer, 0, head + 2)
            if head >= 0 and HEADER.match(self._buffer)
            else None
        )
        return length is not None and len(self._buffer) < head + 4 + int(length[1])

    def drop(self) -> None:
        """Drop what is left of a broken member, which cannot be trusted."""
        self._counts["skipped_bytes"] += len(self._buffer.strip(b"\r\n"))
        self._buffer.clear()
        self._skip, self._short, self._lost = 0, False, False

    def _split(self, ended: bool) -> tuple[bytes | None, int]:
        """Return the record at the start of the buffer, if any, and the number of bytes to remove;
        0 if more are needed first.
        """
        buffer = self._buffer
        known = len(buffer)
        newlines = NEWLINES.match(buffer)
        start = newlines.end() if newlines else 0
        if not HEADER.match(buffer, start):
            if start == known or (known - start < 8 and not ended):
                return None, known if ended else 0
            return None, self._resync(start, ended)
        head = buffer.find(b"\r\n\r\n", start, start + MAX_HEADER)
        if head < 0 and known - start < MAX_HEADER and not ended:
            return None, 0
        length = LENGTH.search(buffer, start, head + 2) if head >= 0 else None
        if length is None:
            return None, self._resync(start, ended)
        self._lost = False
        begin, end = head + 4, head + 4 + int(length[1])
        if end - begin > MAX_RECORD:
            self._counts["too_large"] += 1
            self._skip = max(end - known, 0)
            return None, min(end, known)
        # 16 bytes beyond the payload show whether the next header is where the length says.
        if known < end + 16 and not ended:
            return None, 0
        rest = buffer[end : end + 16].lstrip(b"\r\n")
        if end <= known and (not rest or rest.startswith(b"WARC/")):
            with memoryview(buffer) as view:
                return bytes(view[start:end]), end
        # The length is wrong: the record goes as far as the next header, and is given that length.
        following = RECORD.search(buffer, begin)
        if following is None and not ended and known - start <= MAX_RECORD:
            return None, 0
        stop = following.start() + 1 if following else known
        if following is None and known < end and self._cut == "fault_truncated":
            self._counts["fault_truncated"] += 1
            self._counts["skipped_bytes"] += known - start
            return None, known
        self._counts["fault_wrong_length"] += 1
        payload = bytes(buffer[begin:stop]).removesuffix(b"\r\n").removesuffix(b"\r\n")
        return LENGTH.sub(
            b"Content-Length: %d\r" % len(payload), bytes(buffer[start:head])
        ) + b"\r\n\r\n" + payload, stop

    def _resync(self, start: int, ended: bool) -> int:
        """Return the bytes to skip up to the next header; a lost stretch is counted once."""
        following = RECORD.search(self._buffer, start + 1)
        end = (
            following.start() + 1
            if following
            else len(self._buffer)
            if ended
            # The last 8 bytes may be the beginning of a header that the next block completes.
            else max(len(self._buffer) - 8, start)
        )
        self._counts["fault_bad_header"] += not self._lost
        self._lost = following is None
        self._counts["skipped_bytes"] += end - start
        return end
