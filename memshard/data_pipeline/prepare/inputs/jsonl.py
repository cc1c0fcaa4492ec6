"""jsonl: an object a line, with the text under one of its keys."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from memshard.data_pipeline.prepare.inputs.files import open_text
from memshard.data_pipeline.prepare.inputs.text import documents
from memshard.data_pipeline.prepare.workers import Watch


def read(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the text of every line, cut where it is long. ValueError names the file and line that
    has none.
    """
    (file,) = files
    with open_text(file) as stream:
        texts = _texts(file, stream, options["text_key"])
        yield from documents(map(io.StringIO, texts), counts)


def _texts(file: Path, stream: TextIO, key: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is not JSON ({error}): correct the line or leave the file "
                "out"
            ) from error
        if not isinstance(record, dict) or key not in record:
            keys = (
                ", ".join(map(str, record))
                if isinstance(record, dict)
                else f"a {type(record).__name__} instead of an object"
            )
            raise ValueError(
                f"{file}, line {number} has no key {key!r} (it has: {keys}): name the text's key "
                "with --text-key"
            )
        if not isinstance(record[key], str):
            kind = type(record[key]).__name__
            raise ValueError(
                f"{file}, line {number}: {key!r} is no text but {kind}: name the text's key with "
                "--text-key"
            )
        yield record[key]
