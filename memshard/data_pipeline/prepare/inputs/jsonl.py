"""jsonl: an object a line, with the text under one of its keys."""

import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from memshard.data_pipeline.prepare.inputs.files import open_text
from memshard.data_pipeline.prepare.inputs.text import documents
from memshard.data_pipeline.prepare.workers import Watch
from memshard.io import parse_json

BAD_LINES, BAD_SHARE = 10, 0.01
"""A file with more bad lines than this number and this share of its lines together is refused:
something else is wrong than a line.
"""
log = logging.getLogger(__name__)


def read(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the text of every line, cut where it is long; null is an empty one.

    Lines without a text are left out, counted as `fault_bad_line`, and the first of a file is
    logged. ValueError names it if too many lines have none: half of them, or BAD_LINES.
    """
    (file,) = files
    with open_text(file) as stream:
        texts = _texts(file, stream, options["text_key"], counts)
        yield from documents(map(io.StringIO, texts), counts, options["longest"])


def _texts(file: Path, stream: TextIO, key: str, counts: Counter[str]) -> Iterator[str]:
    number = good = bad = 0
    first = ""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = _text(line, key)
        except ValueError as error:
            bad += 1
            first = first or f"{file}, line {number} {error}"
            if bad > BAD_LINES + BAD_SHARE * number:
                raise ValueError(f"{first}; {bad} of {number:,} lines are like this") from error
            continue
        good += 1
        yield text
    if bad and bad >= good:
        raise ValueError(first)
    counts["fault_bad_line"] += bad
    if bad:
        log.warning("%s; it is left out, as are %d more lines of the file", first, bad - 1)


def _text(line: str, key: str) -> str:
    """Return the text of a line. ValueError says what the line is instead, and what to do."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(
            f"is not JSON ({error}): correct the line or leave the file out; of an array, or of "
            "objects over several lines, `jq -c` makes an object a line"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"is a {type(record).__name__} instead of an object with the key {key!r}: write an "
            "object a line, of an array with `jq -c '.[]'`"
        )
    if key not in record:
        raise ValueError(
            f"has no key {key!r} (it has: {', '.join(map(str, record))}): name the text's key with "
            "--text-key"
        )
    text = record[key]
    if not isinstance(text, str | None):
        raise ValueError(
            f"has under {key!r} no text but {type(text).__name__}: name the text's key with "
            "--text-key"
        )
    return text or ""
