"""Real torchrun processes, restarted at random with other ranks and workers, read the global
batches of one process.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memshard.data_pipeline.stream import TrainStream
from tests.data_pipeline.conftest import ORDERS

REPOSITORY = Path(__file__).parents[2]
LENGTH, LANES = 24, 24
READER = """
import os, sys, warnings
import torch
from memshard.data_pipeline.stream import TrainStream
from memshard.data_pipeline.stream.prefetch import Prefetched
warnings.simplefilter("ignore")
data, out, first, last, micro_batch, workers = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for order in ("contiguous", "shuffled", "best-fit"):
    stream = TrainStream(data, 24, 24, 0, order=order)
    steps = Prefetched(stream, first, last, 24, rank, ranks, micro_batch, workers)
    rows = [[tuple(batch) for batch in batches] for batches in steps]
    torch.save(rows, f"{out}/{order}-{first}-{rank}.pt")
"""


@pytest.mark.slow
def test_random_restarts_on_other_ranks_and_workers(data: Path, tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(READER)
    streams = {order: TrainStream(data, LENGTH, LANES, 0, order=order) for order in ORDERS}
    draw = random.Random(7)
    # The fifth restart is past the epoch's end, in other orders the fourth or sixth.
    step = streams["contiguous"].samples_per_epoch // LANES - 9
    for ranks in (1, 8, 3, 4, 6, 2):
        count, micro_batch, workers = (
            draw.randrange(1, 5),
            draw.choice([1, 2, 5]),
            draw.randrange(4),
        )
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(tmp_path / "reader.py"),
        ]
        arguments = [
            str(data),
            str(tmp_path),
            str(step),
            str(step + count),
            str(micro_batch),
            str(workers),
        ]
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        }
        subprocess.run(
            [*command, *arguments], check=True, capture_output=True, env=environment, timeout=300
        )
        for order, stream in streams.items():
            shares = [torch.load(tmp_path / f"{order}-{step}-{rank}.pt") for rank in range(ranks)]
            for number in range(count):
                passes = zip(*(share[number] for share in shares), strict=True)
                rows = [
                    torch.cat(fields)
                    for fields in zip(*(batch for parts in passes for batch in parts), strict=True)
                ]
                expected = stream.batch((step + number) * LANES, LANES)
                assert all(
                    torch.equal(got, wanted) for got, wanted in zip(rows, expected, strict=True)
                )
        step += count
