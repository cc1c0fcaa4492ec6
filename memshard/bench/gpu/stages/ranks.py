"""Several processes: two on one device over gloo, and with several GPUs one on each over NCCL."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from memshard.bench.gpu.bench import Bench, Result
from memshard.bench.gpu.stages.twins import tiny_recipe
from memshard.trainer.config.load import load_recipe
from memshard.trainer.resume import save
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

LAYOUTS = {
    "columns": ("parallel.layout=columns",),
    "rows": ("parallel.layout=rows",),
    "replicas": ("parallel.memory=1",),
    "host": ("parallel.layout=rows", "tables.place=host"),
}
_FP32 = ("train.precision=fp32",)
TOLERANCE = 1e-4
"""Largest relative difference of a loss from one process's."""
_STEPS = 3


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield, for every layout, how far the losses are from those of one process."""
    recipe = tiny_recipe(bench)
    alone = set_up(load_recipe(recipe, _FP32), bench.scratch / "alone", bench.device)
    losses = [train_step(alone).loss for _ in range(_STEPS)]
    yield from _compared(bench, recipe, losses, "gloo", 2)
    gpus = torch.cuda.device_count() if bench.cuda else 0
    if gpus < 2:
        yield "NCCL", {"skipped": "needs 2 GPUs"}
        return
    # The tiny batch has 8 sequences.
    yield from _compared(
        bench, recipe, losses, "cpu:gloo,cuda:nccl", 2 ** min(3, gpus.bit_length() - 1)
    )


def _compared(
    bench: Bench, recipe: Path, losses: list[float], backend: str, ranks: int
) -> Iterator[tuple[str, Result]]:
    folder = bench.scratch / f"ranks, {backend.replace(':', ' ')}"
    folder.mkdir()
    # All layouts in one start: it costs as much as they do.
    mp.spawn(_rank, (ranks, backend, recipe, folder, bench.on), nprocs=ranks)
    for layout in LAYOUTS:
        ours = json.loads((folder / f"{layout}.json").read_text(encoding="utf-8"))
        difference = max(abs(a - b) / b for a, b in zip(ours, losses, strict=True))
        yield (
            f"{layout}, {ranks} ranks, {backend}",
            {"losses": difference, "ok": difference <= TOLERANCE},
        )


def _rank(rank: int, ranks: int, backend: str, recipe: Path, folder: Path, device: str) -> None:
    number = rank if "nccl" in backend else 0
    here = torch.device(device, number) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks
    )
    for layout, overrides in LAYOUTS.items():
        run = set_up(load_recipe(recipe, (*_FP32, *overrides)), folder / layout, here)
        losses = [train_step(run).loss for _ in range(_STEPS)]
        save(run)
        if rank == 0:
            (folder / f"{layout}.json").write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
