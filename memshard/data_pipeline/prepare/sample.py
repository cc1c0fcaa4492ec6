"""A uniform sample of lines, to train a tokenizer on."""

import random
from collections.abc import Iterable

from memshard.data_pipeline.tokenizer import training_lines

SAMPLE_LINES = 200_000
SAMPLE_BYTES = 1 << 27  # UTF-8; training on as much takes 0.7 GB of memory


def sample_lines(texts: Iterable[str], seed: int) -> list[str]:
    """Return SAMPLE_LINES lines of the texts, or all if they are fewer, or fewer if they are longer
    than SAMPLE_BYTES together (reservoir sampling, Vitter 1985, algorithm R): line n replaces a
    kept one with probability room / n.
    """
    draw = random.Random(seed)
    lines: list[str] = []
    seen = size = 0
    room = SAMPLE_LINES
    for text in texts:
        for line in training_lines(text):
            seen += 1
            if len(lines) < room:
                lines.append(line)
                size += len(line.encode())
            # random() * seen instead of randrange: Python promises the sequence of random() only.
            elif (place := int(draw.random() * seen)) < room:
                size += len(line.encode()) - len(lines[place].encode())
                lines[place] = line
            while size > SAMPLE_BYTES:
                # Any line goes, and later ones come in as rarely as into a smaller sample.
                place = int(draw.random() * len(lines))
                size -= len(lines[place].encode())
                lines[place] = lines[-1]
                lines.pop()
                room = len(lines)
    return lines
