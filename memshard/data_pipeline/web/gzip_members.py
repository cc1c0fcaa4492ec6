"""Reading a gzip file of many members, continuing at the next intact one after damage.

zlib and the WARC libraries stop at the first damaged member, and do not notice that a file was cut.
"""

import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from enum import Enum
from typing import BinaryIO

MAGIC = b"\x1f\x8b\x08"
READ_BYTES = 1 << 16
PIECE_BYTES = 1 << 20  # decompressed at a time, whatever the ratio
# Of damaged members, decompressed bytes for each byte of the file (archives have 3 to 10), and for
# a small file. Beyond it they lie in each other: 1 MB of those took an hour.
MOST_DAMAGED_RATIO = 64
MOST_DAMAGED_BYTES = 1 << 26


class Event(Enum):
    """START: a member begins. DATA: some of its content. END: it ended with the right checksum.
    BROKEN: it did not.
    """

    START = 1
    DATA = 2
    END = 3
    BROKEN = 4


def read_members(
    stream: BinaryIO, counts: Counter[str], begins: re.Pattern[bytes]
) -> Iterator[tuple[Event, bytes]]:
    """Yield the events of a seekable gzip stream, with data. begins: how an intact member's content
    begins, told from 16 bytes, to find one after damage.

    Counts `fault_truncated` (the file ends inside a member), `fault_corrupt` (damaged members) and
    `fault_garbage` (bytes between members), and compressed bytes skipped in `skipped_bytes`.
    """
    place = 0
    room = MOST_DAMAGED_RATIO * stream.seek(0, 2) + MOST_DAMAGED_BYTES
    while start := _at(stream, place, len(MAGIC)):
        broken: str | None = None
        search = place + 1
        if start != MAGIC:
            counts["fault_garbage"] += 1
        else:
            yield Event.START, b""
            end, broken, size = yield from _read_member(stream, place)
            yield (Event.END if broken is None else Event.BROKEN), b""
            if broken is None:
                place = end
                continue
            room -= size
            # The next member may begin anywhere behind the beginning of a damaged one.
            if room < 0:
                search = end
        following = _next_member(stream, search, begins)
        if broken is not None:
            counts[
                "fault_truncated" if broken == "cut" and following is None else "fault_corrupt"
            ] += 1
        end = stream.seek(0, 2) if following is None else following
        counts["skipped_bytes"] += end - place
        place = end


def _read_member(
    stream: BinaryIO, place: int
) -> Generator[tuple[Event, bytes], None, tuple[int, str | None, int]]:
    """Yield the data of the member at `place`; return its end, or as far as it was read, what is
    wrong with it, and the bytes of its data.
    """
    stream.seek(place)
    member = zlib.decompressobj(wbits=31)
    size = 0
    try:
        while not member.eof:
            # Output is limited, so that 1 MB of zeros in 1 KB cannot fill the memory; input that
            # was not consumed comes first.
            raw = member.unconsumed_tail or stream.read(READ_BYTES)
            if not raw:
                return stream.tell(), "cut", size
            data = member.decompress(raw, PIECE_BYTES)
            size += len(data)
            yield Event.DATA, data
    except zlib.error:
        return stream.tell(), "corrupt", size
    return stream.tell() - len(member.unused_data), None, size


def _next_member(stream: BinaryIO, place: int, begins: re.Pattern[bytes]) -> int | None:
    """Return where the next member after `place` begins, or None. Its content must match
    `begins`: MAGIC also occurs by chance.
    """
    while block := _at(stream, place, READ_BYTES):
        offset = block.find(MAGIC)
        while offset >= 0:
            try:
                member = zlib.decompressobj(wbits=31)
                if begins.match(member.decompress(_at(stream, place + offset, 4096), 16)):
                    return place + offset
            except zlib.error:
                pass
            offset = block.find(MAGIC, offset + 1)
        # Blocks overlap by two bytes, in case a MAGIC of three is cut.
        place += max(len(block) - len(MAGIC) + 1, 1) if len(block) == READ_BYTES else len(block)
    return None


def _at(stream: BinaryIO, place: int, size: int) -> bytes:
    stream.seek(place)
    return stream.read(size)
