"""Memory and time of finding the duplicates of many documents, which all of a build's documents go
through together.

  memshard bench duplicates --documents 1000000 4000000

Each number of documents in 100 units with random signatures, a tenth of which are those of another
document, in a process of its own, whose largest memory is taken.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memshard.bench.common.peak_memory import in_new_process, resident
from memshard.data_pipeline.prepare.documents import NEAR_ROW, ROWS_FILE, Filters, Unit
from memshard.data_pipeline.prepare.split import split_documents

UNITS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--documents",
        nargs="+",
        type=int,
        default=[1_000_000, 4_000_000],
        metavar="N",
        help="how many (default 1000000 4000000); each takes 128 bytes of disk",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of documents."""
    return {f"{number:,} documents": measure(number) for number in args.documents}


def show(result: dict[str, Any]) -> None:
    """Print a line for each number of documents."""
    for what, row in result.items():
        print(
            f"{what:>22}  {row['bytes_per_document']:6.1f} bytes a document  {row['seconds']:6.1f} "
            f"s of CPU time  {row['near_duplicates']:,} near duplicates"
        )


def measure(documents: int) -> dict[str, float]:
    """Return memory, time and what was found."""
    with tempfile.TemporaryDirectory() as folder:
        units = list(_units(Path(folder), documents))
        return in_new_process(_split, units, documents)


def _units(folder: Path, documents: int) -> Iterator[Unit]:
    draw = np.random.default_rng(0)
    for number, count in enumerate(np.diff(np.linspace(0, documents, UNITS + 1).astype(int))):
        unit = Unit((), folder / str(number))
        unit.folder.mkdir()
        rows = np.zeros(count, dtype=NEAR_ROW)
        rows["exact"] = draw.integers(2**63, size=count, dtype=np.uint64)
        rows["bands"] = draw.integers(2**63, size=rows["bands"].shape, dtype=np.uint64)
        rows["bands"][::10] = rows["bands"][1::10][: len(rows[::10])]
        rows.tofile(unit.folder / ROWS_FILE)
        yield unit


def _split(units: list[Unit], documents: int) -> dict[str, float]:
    # A few first, so that what is loaded and allocated once does not count.
    split_documents(units[:1], Filters(near=True), True, 0.01, 0.01)
    before, begun = resident("VmRSS"), time.process_time()
    splits = split_documents(units, Filters(near=True), True, 0.01, 0.01)
    seconds, peak = time.process_time() - begun, resident("VmHWM")
    return {
        "bytes_per_document": (peak - before) / documents if peak and before else float("nan"),
        "seconds": seconds,
        "near_duplicates": splits.counts["near_duplicate.documents"],
    }
