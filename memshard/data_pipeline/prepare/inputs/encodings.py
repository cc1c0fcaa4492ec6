"""Text files opened in the encoding that they are in."""

import argparse
import codecs
import gzip
import io
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO, cast

GZIP = b"\x1f\x8b"
READ_CHARACTERS = 1 << 20
LONGEST_LINE = 1 << 26  # characters; 64 KB of gzip can be one line of as many
UTF8 = "utf-8-sig"  # drops a byte order mark
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MOST_BAD = 1e-4  # share of characters; beyond it a file is in another encoding
MOST_ZEROS = 0.1  # share of characters; UTF-16 without its mark is UTF-8 with as many NULs
log = logging.getLogger(__name__)


def known_encoding(name: str) -> str:
    """Return the name of an encoding of text, for argparse. ArgumentTypeError if it is none."""
    try:
        # bytes.decode refuses codecs that do not make text of bytes, such as hex.
        bytes(4).decode(name)
    except (LookupError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{name} is no encoding of text; write e.g. latin-1 or utf-16-le"
        ) from error
    return name


def open_text(file: Path, encoding: str = UTF8, errors: str = "strict") -> io.TextIOWrapper:
    """Open a text file, also one with gzip, whatever its name. Line ends stay as they are."""
    # "\n" alone ends a line: by default a lone "\r" would, and both would be changed into "\n".
    return io.TextIOWrapper(_open(file), encoding, errors, newline="\n")


def open_known(file: Path, options: Mapping[str, Any]) -> io.TextIOWrapper:
    """Open a text file whose encoding a source's options know; of another, UTF-8 is expected."""
    if encoding := options.get("encodings", {}).get(file):
        # Bad characters are few and counted: other files are left out before they are read.
        return open_text(file, encoding, "replace")
    return open_text(file)


def parts_of_lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a text; of one with more than LONGEST_LINE characters, parts."""
    return iter(lambda: stream.readline(LONGEST_LINE), "")


def whole_lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a text, of each no more than LONGEST_LINE characters: `is_too_long` tells
    which have more.
    """
    for line in parts_of_lines(stream):
        yield line
        while is_too_long(line):
            line = stream.readline(LONGEST_LINE)


def is_too_long(line: str) -> bool:
    """Tell whether a line of `whole_lines` has more characters than that yields."""
    return len(line) == LONGEST_LINE and not line.endswith("\n")


def text_encoding(file: Path, other: str | None, counts: Counter[str]) -> str | None:
    """Return the encoding of a text file: what its byte order mark says, else UTF-8, or `other` if
    it is not UTF-8. None if it is in neither.

    Some characters that cannot be decoded, at most MOST_BAD of all, are counted as
    `fault_bad_character`. ValueError for a damaged gzip file.
    """
    try:
        with _open(file) as stream:
            begin = stream.read(4)
        encoding = next((name for mark, name in MARKS.items() if begin.startswith(mark)), UTF8)
        bad = _share_bad(file, encoding)
        if bad[0] and other is not None and encoding == UTF8:
            encoding, bad = other, _share_bad(file, other)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} is a damaged gzip file ({error}): fetch it again or leave it out"
        ) from error
    number, characters = bad
    if number > MOST_BAD * characters:
        return None
    if number:
        counts["fault_bad_character"] += number
        log.warning(
            "%s: %d characters that are not %s become U+FFFD; if the file is in another encoding, "
            "name it with --encoding",
            file,
            number,
            "UTF-8" if encoding == UTF8 else encoding,
        )
    return encoding


def _share_bad(file: Path, encoding: str) -> tuple[int, int]:
    """Return how many characters of a file cannot be those of a text, and how many it has."""
    for errors in ("strict", "replace"):
        characters = zeros = replaced = 0
        try:
            with open_text(file, encoding, errors) as stream:
                while text := stream.read(READ_CHARACTERS):
                    characters += len(text)
                    zeros += text.count("\0")
                    # Also those of the file itself, which only a file that is damaged counts.
                    replaced += text.count("\ufffd") if errors == "replace" else 0
        except UnicodeDecodeError:
            continue
        break
    return replaced + (zeros if zeros > MOST_ZEROS * characters else 0), characters


def _open(file: Path) -> IO[bytes]:
    with file.open("rb") as stream:
        zipped = stream.read(len(GZIP)) == GZIP or file.name.lower().endswith(".gz")
    return cast(IO[bytes], gzip.open(file, "rb")) if zipped else file.open("rb")
