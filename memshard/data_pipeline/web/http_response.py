"""HTTP responses as archives hold them: their bodies are often not what the headers say.

CC-News until 16 May 2019, recordings of browsers and others keep the headers of the transfer and
the content without it (commoncrawl/news-crawl issue 30); servers call an encoding "none" or
"utf-8"; transfers break off. What browsers read is read, as far as it goes.
"""

import io
import re
import zlib
from dataclasses import dataclass

from fastwarc.stream_io import BrotliReader, WarcReader, ZstdReader

from memshard.data_pipeline.web.records import Content

MAX_HEADER = 1 << 16
MAX_BODY = 1 << 26  # bytes; 1 MB of gzip can be 1 GB, and no page is as large as this
STATUS = re.compile(rb"\s*HTTP[\w./]*[ \t]+(\d{3})(?!\d)", re.IGNORECASE)
HEAD_END = re.compile(rb"\n\r?\n")
CHUNK = re.compile(rb"(?:\r?\n)?[ \t]*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\n]*)?\r?\n")
GZIP = b"\x1f\x8b\x08"
CONTROLS = bytes(set(range(32)) - set(b"\t\n\f\r\x1b"))
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
READ_BYTES = 1 << 16
# More than any server sends; the time that they take is not limited as that of an article is.
MOST_RESPONSES = 100
MOST_ENCODINGS = 8
MOST_CHUNKS = 1 << 17
MOST_MEMBERS = 100
SMALL_STEP = 64  # bytes read at a time to get what stands before damage


@dataclass(frozen=True)
class Response:
    """A response. status: its code. fields: headers by lower-case name. body: as it was stored."""

    status: int
    fields: dict[str, str]
    body: Content


@dataclass(frozen=True)
class Decoded:
    """The content of a body. as_said: False if it was not encoded as the headers say, or was cut.
    stages: the body as stored, then with each encoding undone: whichever the writer of an archive
    took the digest of.
    """

    content: Content
    as_said: bool
    stages: tuple[Content, ...]


def parse_fields(lines: bytes) -> dict[str, str]:
    """Return header fields by lower-case name; the values of a repeated one with commas between."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines.decode("utf-8", "replace").split("\n"):
        if line[:1] in (" ", "\t") and name in fields:
            fields[name] += f" {line.strip()}"
            continue
        name, colon, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if colon:
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def parse_response(block: Content) -> Response | None:
    """Return the response in a record's payload, the last one where there are several, as after
    `100 Continue` or a proxy's `200 Connection established`; None if it begins with no status line,
    or has more than MOST_RESPONSES. Of headers without an end, the first MAX_HEADER bytes count.
    """
    status = STATUS.match(block)
    for _ in range(MOST_RESPONSES):
        if status is None:
            break
        most = status.end() + MAX_HEADER
        end = HEAD_END.search(block, status.end(), most)
        lines = bytes(block[status.end() : end.start() if end else most])
        fields = parse_fields(lines.partition(b"\n")[2])
        behind = end.end() if end else len(block)
        code, following = int(status[1]), STATUS.match(block, behind)
        if following is None or (code >= 200 and "content-type" in fields):
            return Response(code, fields, block[behind:])
        status = following
    return None


def decode_body(response: Response) -> Decoded:
    """Return the body with its encodings undone. ValueError if what is left is binary, or more than
    MOST_ENCODINGS are named.
    """
    named = (
        name.strip().lower()
        for field in ("content-encoding", "transfer-encoding")
        for name in response.fields.get(field, "").split(",")
    )
    encodings = [name for name in named if name == "chunked" or name in _DECODERS]
    if len(encodings) > MOST_ENCODINGS:
        raise ValueError(f"the body is said to be encoded {len(encodings)} times")
    content, as_said = response.body, True
    stages: list[Content] = [response.body]
    for encoding in reversed(encodings):
        if encoding == "chunked":
            content, whole = _dechunk(content)
        elif content:
            content, whole = _decompress(content, encoding)
        else:
            continue
        as_said &= whole
        stages.append(content)
    # Encoded although no header says so (any more).
    if CHUNK.match(content):
        chunks, whole = _dechunk(content)
        if whole:
            content, as_said = chunks, False
            stages.append(content)
    if content[: len(GZIP)] == GZIP:
        content, as_said = _decompress(content, "gzip")[0], False
    return Decoded(content, as_said, tuple(stages))


def _dechunk(body: Content) -> tuple[Content, bool]:
    """Return the content of the chunks, and whether they end as they should. A body that is not, or
    no longer, in chunks is content as it is.
    """
    parts: list[Content] = []
    place = 0
    while len(parts) < MOST_CHUNKS and (chunk := CHUNK.match(body, place)):
        size = int(chunk[1], 16)
        if not size:
            return b"".join(parts), True
        place = chunk.end() + size
        parts.append(body[chunk.end() : place])
    return b"".join([*parts, body[place:]]), False


def _decompress(body: Content, encoding: str) -> tuple[Content, bool]:
    """Return the content of a compressed body, and whether it is whole; else what there is of it.

    A body that is text is content as it is. ValueError if neither gives anything.
    """
    content = b""
    for decode in _DECODERS["gzip" if body[: len(GZIP)] == GZIP else encoding]:
        part, whole = decode(body)
        if whole:
            return part, True
        content = max(content, part, key=len)
    if _is_text(body):
        return body, False
    if not content:
        raise ValueError(f"the body is no {encoding}, and no text")
    return content, False


def _is_text(body: Content) -> bool:
    start = bytes(body[:1024])
    # Of compressed bytes 1 in 10 is one of these; texts have none, or those of UTF-16.
    controls = len(start) - len(start.translate(None, CONTROLS))
    return start.startswith(BYTE_ORDER_MARKS) or controls <= len(start) // 50


def _inflate(body: Content, wbits: int) -> tuple[bytes, bool]:
    """Return the content of gzip members, or of a deflate stream, and whether it is whole. What
    follows the end is not content.
    """
    parts: list[bytes] = []
    room, rest = MAX_BODY, body
    while rest and room > 0 and (not parts or rest[: len(GZIP)] == GZIP):
        # Each copies what follows it: empty ones of 20 bytes would take hours.
        if len(parts) == MOST_MEMBERS:
            return b"".join(parts), False
        stream = zlib.decompressobj(wbits)
        try:
            parts.append(stream.decompress(rest, room))
        except zlib.error:
            return b"".join([*parts, _before_damage(rest, wbits)]), False
        room -= len(parts[-1])
        if not stream.eof and room > 0:
            return b"".join(parts), False
        rest = stream.unused_data
    return b"".join(parts), bool(body)


def _before_damage(body: Content, wbits: int) -> bytes:
    """Return what stands before the damage; zlib keeps nothing of the call that meets it."""
    parts: list[bytes] = []
    stream = zlib.decompressobj(wbits)
    try:
        for place in range(0, len(body), SMALL_STEP):
            parts.append(stream.decompress(body[place : place + SMALL_STEP]))
    except zlib.error:
        pass
    return b"".join(parts)


def _read(reader: WarcReader) -> tuple[bytes, bool]:
    parts: list[bytes] = []
    try:
        while len(parts) < MAX_BODY // READ_BYTES and (part := reader.read(READ_BYTES)):
            parts.append(part)
    except OSError:
        return b"".join(parts), False
    return b"".join(parts), True


_GZIP = (lambda body: _inflate(body, 31), lambda body: _inflate(body, 15))
# The names of encodings, each with the decoders to try in turn. "deflate" is zlib's format, but
# some servers send the stream without its header; and some call zlib's format "gzip".
_DECODERS = {
    "gzip": _GZIP,
    "x-gzip": _GZIP,
    "deflate": (lambda body: _inflate(body, 15), lambda body: _inflate(body, -15)),
    "br": (lambda body: _read(BrotliReader(io.BytesIO(body))),),
    "zstd": (lambda body: _read(ZstdReader(io.BytesIO(body))),),
}
