"""Real runs, as small as they get: what the tests of the trainer and of its commands share."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memshard.bench.gpu.configurations import RECIPE as RECIPE
from memshard.models.memory.table import find_tables
from memshard.trainer.checkpoint.folders import find_checkpoints
from memshard.trainer.checkpoint.index import read_index
from memshard.trainer.checkpoint.save_load import load_state, load_tensors
from memshard.trainer.config.load import load_recipe
from memshard.trainer.loop import train
from memshard.trainer.resume import checkpoint_tensors
from memshard.trainer.run import Run
from memshard.trainer.set_up import set_up
from memshard.trainer.watch.metrics import METRICS_FILE, read_metrics

ORDINARY_USER = 65534

TABLE = "blocks.0.memory.values"


def prepare(recipe: Path, folder: Path, *overrides: str) -> Run:
    """Return the run, ready to train, on the ranks that are there."""
    # Names do as well as a Path and a torch.device.
    return set_up(load_recipe(recipe, overrides), str(folder), "cpu")


def train_run(
    recipe: Path, folder: Path, *overrides: str, stop_at: int | None = None
) -> dict[str, Any]:
    """Train or resume in this process, with the ranks that are there; return the result."""
    return train(prepare(recipe, folder, *overrides), stop_at)


def checkpoint_state(path: Path) -> dict[str, Any]:
    """Return everything in a run folder's newest checkpoint (or in a checkpoint): whole tensors,
    step counts, progress.
    """
    folder = find_checkpoints(path)[0]
    tensors: dict[str, Tensor] = {}
    for name, entry in read_index(folder).items():
        tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
    load_tensors(folder, tensors, alone=True)
    return {**tensors, **load_state(folder)}


def snapshot(run: Run) -> dict[str, Any]:
    """Return copies of all that a step may change on this rank, but for what counts steps."""
    tensors = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in checkpoint_tensors(run).items()
    }
    steps = (
        {
            name: run.table_optimizer.state[table.anchor]["step"]
            for name, table in find_tables(run.model)
        }
        if run.table_optimizer
        else {}
    )
    return {name: tensor.clone() for name, tensor in tensors.items()} | steps


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Check that two states are equal to the last bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = (
            torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        )
        assert same, f"{name} differs"


def numbers(folder: Path, key: str) -> dict[int, float]:
    """Return step -> value of one metric of a run."""
    return {line["step"]: line[key] for line in read_metrics(folder / METRICS_FILE) if key in line}


def rewrite_config(folder: Path, change: Callable[[str], str]) -> None:
    """Change config.yaml of a checkpoint or an export, and its hash, as a stranger can."""
    config = folder / "config.yaml"
    config.write_text(change(config.read_text()))
    rehash(folder, "config.yaml")


def rehash(folder: Path, file: str) -> None:
    """Store the hash of what a file is now."""
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    for name, place in (("COMMITTED", ()), ("config.json", ("memshard", "files"))):
        if (folder / name).exists():
            content = hashes = json.loads((folder / name).read_text())
            for key in place:
                hashes = hashes[key]
            hashes[file] = digest
            (folder / name).write_text(json.dumps(content))


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Be an ordinary user, also where root runs the tests."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(ORDINARY_USER)
    try:
        yield
    finally:
        os.seteuid(user)
