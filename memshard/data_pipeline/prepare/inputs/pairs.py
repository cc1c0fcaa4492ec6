"""Sentence pairs: line n of a file and of its translation."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from memshard.data_pipeline.prepare.inputs.encodings import (
    LONGEST_LINE,
    is_too_long,
    open_known,
    whole_lines,
)
from memshard.data_pipeline.prepare.inputs.kinds import PAIR
from memshard.data_pipeline.prepare.workers import Watch


def read(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield line n of both files with PAIR between. ValueError if one has more lines.

    Counts `empty` pairs, those with an empty side, which are left out.
    """
    source, target = files
    with open_known(source, options) as left, open_known(target, options) as right:
        for number, (one, other) in enumerate(
            zip_longest(whole_lines(left), whole_lines(right)), 1
        ):
            if one is None or other is None:
                short, long = (source, target) if one is None else (target, source)
                raise ValueError(
                    f"{short} ends at line {number - 1} and {long} goes on: pairs need as many "
                    "lines in both files"
                )
            for file, line in ((source, one), (target, other)):
                if is_too_long(line):
                    raise ValueError(
                        f"{file}, line {number} has more than {LONGEST_LINE:,} characters, and is "
                        "no sentence: cut it"
                    )
            sides = [line.strip().replace(PAIR, " ") for line in (one, other)]
            if all(sides):
                yield PAIR.join(sides)
            else:
                counts["empty"] += 1
