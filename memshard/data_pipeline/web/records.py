"""Records of web archives, WARC (ISO 28500) and ARC, also of damaged files: what is skipped is
counted.

Cutting a file into records is done here, because no library notices a truncated file or continues
after a damaged member.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from memshard.data_pipeline.web.gzip_members import READ_BYTES, Event, read_members

MAX_HEADER = 1 << 16
MAX_RECORD = 1 << 26  # bytes; larger ones are videos and archives, which contain no article
LONGEST_LINE = 4096  # of an ARC header, beyond which a stretch without line end is no header
NEWLINES = re.compile(rb"[\r\n]*")
GZIP = b"\x1f\x8b"
Content = memoryview | bytes
"""Bytes of an archive. A copy of a page costs as much as its digest, so they are views, if need be.
"""
Record = tuple[bytes, Content | None]
"""Header and payload; None for a payload of more than MAX_RECORD bytes."""


@dataclass(frozen=True)
class Format:
    """How the records of an archive begin. begins: told from the first 16 bytes. after: the 16
    bytes behind a payload whose length is right. following: the next record, after damage.
    head_end: behind a header. length: of the payload, in the header.
    """

    begins: re.Pattern[bytes]
    after: re.Pattern[bytes]
    following: re.Pattern[bytes]
    head_end: re.Pattern[bytes]
    length: re.Pattern[bytes]


WARC = Format(
    begins=re.compile(rb"WARC/[01]\.\d"),
    # Two line ends, also where the header behind them is damaged.
    after=re.compile(rb"\r?\n\r?\n|[\r\n]*(?:WARC/|\Z)"),
    following=re.compile(rb"\nWARC/[01]\.\d"),
    # Some writers end lines with a line feed alone.
    head_end=re.compile(rb"\n\r?\n"),
    length=re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE),
)
# A line: URL, IP address, date, type, in version 2 more, and last the length.
ARC = Format(
    begins=re.compile(rb"[a-zA-Z][a-zA-Z0-9+.-]{1,12}:"),
    after=re.compile(rb"[\r\n]*(?:[a-zA-Z][a-zA-Z0-9+.-]{1,12}:|\Z)"),
    following=re.compile(
        rb"\n[a-zA-Z][a-zA-Z0-9+.-]{1,12}:[^\n]{1,4000} \d{14} [^\n]{0,999}\d\r?\n"
    ),
    head_end=re.compile(rb"\n"),
    length=re.compile(rb" (\d{1,18})[ \t]*\r?\n"),
)


def read_records(
    stream: BinaryIO, counts: Counter[str], layout: Format | None = None
) -> Iterator[Record]:
    """Yield every record.

    A wrong Content-Length is mended by where the next record begins. stream: seekable. layout: by
    default what the file begins like. Counts the faults of `gzip_members`, `fault_empty` (no byte
    in the file), `fault_bad_header`, `fault_wrong_length` (the payload is used as far as it goes),
    and `skipped_bytes`.
    """
    start = stream.read(READ_BYTES)
    stream.seek(0)
    zipped = start.startswith(GZIP)
    layout = layout or layout_of(start)
    if not start:
        counts["fault_empty"] += 1
    elif zipped:
        # A member that is whole has the whole payload, whatever the header says.
        framer = _Framer(counts, "fault_wrong_length", layout)
        for event, data in read_members(stream, counts, layout.begins):
            if layout.begins.match(data) or event is Event.BROKEN:
                yield from framer.end_short_record()
            if event is Event.DATA:
                yield from framer.feed(data)
            elif event is Event.END:
                yield from framer.close(last=False)
            elif event is Event.BROKEN:
                framer.drop()
        yield from framer.close()
    else:
        framer = _Framer(counts, "fault_truncated", layout, stream.seek(0, 2))
        stream.seek(0)
        while data := stream.read(READ_BYTES):
            yield from framer.feed(data)
        yield from framer.close()


def layout_of(start: bytes) -> Format:
    """Return ARC for a file that begins as its version block does, else WARC."""
    if start.startswith(GZIP):
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, 16)
        except zlib.error:
            return WARC
    return ARC if start.startswith(b"filedesc:") else WARC


class _Framer:
    """Cuts a byte stream into records; yields a record once what follows it is as it should be."""

    def __init__(
        self, counts: Counter[str], cut: str, layout: Format, size: float = math.inf
    ) -> None:
        self._counts = counts
        self._layout = layout
        self._cut = cut  # the fault of a last record that is shorter than its Content-Length
        self._buffer: bytes | bytearray = b""
        self._place = 0  # in the buffer, where what is not cut yet begins
        self._searched = 0  # bytes behind the place in which no next header begins
        self._ahead = size  # bytes of the file that are still to come
        self._skip = 0  # bytes of an oversized record still to pass over
        self._short = False  # the buffer's record has more Content-Length than its member has bytes
        self._lost = False  # no header where one should be, and none since

    def feed(self, data: bytes, ended: bool = False) -> Iterator[Record]:
        """Add bytes, and yield the records that they complete."""
        self._ahead -= len(data)
        passed = min(self._skip, len(data))
        self._skip -= passed
        data = data[passed:] if passed else data
        if self._place == len(self._buffer):
            # No copy: a member of gzip is most often one record.
            self._buffer, self._place = data, 0
        elif data:
            # A new buffer, unless nothing was cut from this one: records are views of it.
            if self._place or isinstance(self._buffer, bytes):
                self._buffer, self._place = bytearray(self._buffer[self._place :]), 0
            self._buffer.extend(data)
        while self._place < len(self._buffer):
            record, place = self._split(ended)
            moved, self._place = place > self._place, place
            if record is not None:
                yield record
            if not moved:
                break
            self._searched = 0

    def close(self, last: bool = True) -> Iterator[Record]:
        """End the member, or with `last` the file, and yield the record that ends with it. A short
        one waits, because the next member may continue it.
        """
        self._short = not last and self._is_short()
        if not self._short:
            yield from self.feed(b"", ended=True)
            self._counts[self._cut] += self._skip > 0
            self.drop()

    def end_short_record(self) -> Iterator[Record]:
        """Yield what there is of a record that waits: what comes next does not continue it."""
        if self._short:
            yield from self.close()

    def _is_short(self) -> bool:
        place = self._place
        end = self._layout.head_end.search(self._buffer, place, place + MAX_HEADER)
        length = (
            self._layout.length.search(self._buffer, place, end.end())
            if end and self._layout.begins.match(self._buffer, place)
            else None
        )
        return (
            end is not None
            and length is not None
            and (len(self._buffer) < end.end() + int(length[1]))
        )

    def drop(self) -> None:
        """Drop what is left of a broken member, which cannot be trusted."""
        self._counts["skipped_bytes"] += len(self._buffer[self._place :].strip(b"\r\n"))
        self._buffer, self._place, self._searched = b"", 0, 0
        self._skip, self._short, self._lost = 0, False, False

    def _split(self, ended: bool) -> tuple[Record | None, int]:
        """Return the next record of the buffer, if any, and the place behind it; that where it
        stands now if more bytes are needed first.
        """
        buffer, layout, place = self._buffer, self._layout, self._place
        known = len(buffer)
        newlines = NEWLINES.match(buffer, place)
        start = newlines.end() if newlines else place
        if start == known or (known - start < 16 and not ended):
            return None, known if ended else place
        if not layout.begins.match(buffer, start):
            return None, self._resync(start, ended)
        head = layout.head_end.search(buffer, start, start + MAX_HEADER)
        if head is None and known - start < MAX_HEADER and not ended:
            return None, place
        length = layout.length.search(buffer, start, head.end()) if head else None
        if head is None or length is None:
            return None, self._resync(start, ended)
        self._lost = False
        header, begin = bytes(buffer[start : head.start()]), head.end()
        end = begin + int(length[1])
        if end - known > self._ahead and end - begin > MAX_RECORD:
            # More than the file has: the rest of the file is not passed over for it.
            self._counts["fault_wrong_length"] += 1
            self._lost = True
            return (header, None), begin
        if end - begin > MAX_RECORD:
            self._skip = max(end - known, 0)
            return (header, None), min(end, known)
        # 16 bytes beyond the payload show whether the next header is where the length says.
        if known < end + 16 and not ended:
            return None, place
        if end <= known and layout.after.match(buffer[end : end + 16]):
            return (header, memoryview(buffer)[begin:end]), end
        # The length is wrong: the record goes as far as the next header.
        following = layout.following.search(buffer, max(begin - 1, place + self._searched))
        if following is None and not ended and known - start <= MAX_RECORD:
            self._searched = known - place - 2 * LONGEST_LINE
            return None, place
        stop = following.start() + 1 if following else known
        if following is None and known < end and self._cut == "fault_truncated":
            self._counts["fault_truncated"] += 1
            self._counts["skipped_bytes"] += known - start
            return None, known
        self._counts["fault_wrong_length"] += 1
        payload = bytes(buffer[begin:stop])
        for line_end in (b"\n", b"\r", b"\n", b"\r"):
            payload = payload.removesuffix(line_end)
        return (header, payload), stop

    def _resync(self, start: int, ended: bool) -> int:
        """Return the place of the next header, or where it stands now if more bytes are needed to
        know; a lost stretch is counted once.
        """
        buffer = self._buffer
        following = self._layout.following.search(buffer, start + 1)
        if following:
            end = following.start() + 1
        elif ended:
            end = len(buffer)
        else:
            # The last line may be the beginning of a header that the next block completes.
            end = buffer.rfind(b"\n", max(len(buffer) - LONGEST_LINE, start + 1))
            if end < 0:
                end = len(buffer) if len(buffer) - start > LONGEST_LINE else self._place
        self._counts["fault_bad_header"] += not self._lost
        self._lost = following is None
        self._counts["skipped_bytes"] += max(end - start, 0)
        return end
