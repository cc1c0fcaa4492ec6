"""A uniform sample of lines, to train a tokenizer on."""

import random
from collections.abc import Iterable

from memshard.data_pipeline.tokenizer import training_lines

SAMPLE_LINES = 200_000


def sample_lines(texts: Iterable[str], seed: int) -> list[str]:
    """Return SAMPLE_LINES lines of the texts, or all if they are fewer (reservoir sampling, Vitter
    1985, algorithm R): line n replaces a kept one with probability SAMPLE_LINES / n.
    """
    draw = random.Random(seed)
    lines: list[str] = []
    seen = 0
    for text in texts:
        for line in training_lines(text):
            seen += 1
            if len(lines) < SAMPLE_LINES:
                lines.append(line)
            # random() * seen instead of randrange: Python promises the sequence of random() only.
            elif (place := int(draw.random() * seen)) < SAMPLE_LINES:
                lines[place] = line
    return lines
