"""jsonl: an object a line, or an array of objects, with the text under one of its keys."""

import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from memshard.data_pipeline.prepare.inputs.encodings import (
    LONGEST_LINE,
    READ_CHARACTERS,
    is_too_long,
    open_known,
    whole_lines,
)
from memshard.data_pipeline.prepare.inputs.text import documents
from memshard.data_pipeline.prepare.tolerance import too_many
from memshard.data_pipeline.prepare.workers import Watch
from memshard.io import parse_json

log = logging.getLogger(__name__)


def read(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the text of every line, or of every element of an array, cut where it is long; null is
    an empty one.

    Lines without a text are left out, counted as `fault_bad_line`, and the first of a file is
    logged. ValueError names it if too many lines have none: half of them, or `too_many`.
    """
    (file,) = files
    with open_known(file, options) as stream:
        texts = _texts(file, stream, options["text_key"], counts)
        yield from documents(map(io.StringIO, texts), counts, options["longest"])


def _texts(file: Path, stream: TextIO, key: str, counts: Counter[str]) -> Iterator[str]:
    number = good = bad = 0
    first = ""
    is_array = stream.read(READ_CHARACTERS).lstrip().startswith("[")
    stream.seek(0)
    what = "element" if is_array else "line"
    lines = _elements(file, stream) if is_array else whole_lines(stream)
    for number, line in enumerate(lines, 1):
        if not (is_too_long(line) or line.strip()):
            continue
        try:
            text = _text(line, key)
        except ValueError as error:
            bad += 1
            first = first or f"{file}, {what} {number} {error}"
            if too_many(bad, number):
                raise ValueError(f"{first}; {bad} of {number:,} {what}s are like this") from error
            continue
        good += 1
        yield text
    if bad and bad >= good:
        raise ValueError(first)
    counts["fault_bad_line"] += bad
    if bad:
        log.warning("%s; it is left out, as are %d more %ss of the file", first, bad - 1, what)


def _elements(file: Path, stream: TextIO) -> Iterator[str]:
    """Yield the elements of a JSON array, each as JSON, with no more than some of them in memory.
    ValueError if the array does not go on as one, or with an element longer than LONGEST_LINE.
    """
    decoder, rest, number = json.JSONDecoder(), "", 0
    more = stream.read(READ_CHARACTERS)
    separators = " \t\r\n["  # the array begins with "[", each further element with a comma
    while more:
        rest, place = rest + more, 0
        # As much again: an element that is larger than what is read is not parsed for every part.
        more = stream.read(max(READ_CHARACTERS, len(rest)))
        while True:
            begin = place
            while begin < len(rest) and rest[begin] in separators:
                begin += 1
            if rest[begin : begin + 1] == "]":
                if (rest[begin + 1 :] + more).strip():
                    raise ValueError(f"{file} goes on behind the end of its array: cut it there")
                return
            try:
                _, end = decoder.raw_decode(rest, begin)
            except (ValueError, RecursionError):
                break  # cut, or no JSON: that shows when nothing more comes
            if end == len(rest):
                break  # a number may go on
            number += 1
            yield rest[begin:end]
            place, separators = end, " \t\r\n,"
        rest = rest[place:]
        if len(rest) > LONGEST_LINE:
            break
    raise ValueError(
        f"{file} is no JSON behind element {number:,} of its array, or the next one has more than "
        f"{LONGEST_LINE:,} characters: correct it there, or leave the file out"
    )


def _text(line: str, key: str) -> str:
    """Return the text of a line. ValueError says what the line is instead, and what to do."""
    if is_too_long(line):
        raise ValueError(f"has more than {LONGEST_LINE:,} characters: cut it or leave it out")
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(
            f"is not JSON ({error}): correct the line or leave the file out; of "
            "objects over several lines, `jq -c .` makes an object a line"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"is a {type(record).__name__} instead of an object with the key {key!r}: write an "
            "object a line, or an array of objects"
        )
    if key not in record:
        keys = ", ".join(name[:40] for name in islice(record, 20))
        raise ValueError(
            f"has no key {key!r} (it has: {keys}): name the text's key with --text-key"
        )
    text = record[key]
    if not isinstance(text, str | None):
        raise ValueError(
            f"has under {key!r} no text but {type(text).__name__}: name the text's key with "
            "--text-key"
        )
    return text or ""
