"""Ranks whose copies of a tensor have drifted apart say so soon, and write no checkpoint."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memshard.models.memory.table import find_tables
from memshard.parallel.checksum import check_copies
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.engine.deepspeed import DeepSpeedEngine
from memshard.trainer.resume import resume, save
from memshard.trainer.run import Run
from memshard.trainer.step import train_step
from tests.distributed import run_distributed
from tests.trainer.tiny_run import prepare

NORM = "blocks.0.mixer_residual.norm.weight"
SETTINGS = {
    "tensor": ("parallel.tensor=2", "model.memory.layers=[]"),
    "data": (),
    "ZeRO-1 tensor": ("parallel.tensor=2", "train.zero=1", "model.memory.layers=[]"),
    "copies of a table": ("parallel.memory=1",),
    "DeepSpeed": (
        "parallel.tensor=2",
        "train.engine=deepspeed",
        "train.zero=1",
        "train.precision=bf16",
        "model.memory.layers=[]",
    ),
}


def _weight(run: Run) -> Tensor:
    return run.model.get_parameter(NORM).data


def _moment(run: Run) -> Tensor:
    moment: Tensor = run.engine.optimizer.state[run.model.get_parameter(NORM)]["exp_avg_sq"]
    return moment


def _table_moment(run: Run) -> Tensor:
    assert run.table_optimizer is not None
    (_, table), *_ = find_tables(run.model)
    moment: Tensor = run.table_optimizer.state[table.anchor]["exp_avg"]
    return moment


def _master_moment(run: Run) -> Tensor:
    assert isinstance(run.engine, DeepSpeedEngine)
    zero = run.engine.zero
    # Its last partition is that of vectors, which are copies.
    moment: Tensor = zero.state[zero.single_partition_of_fp32_groups[-1]]["exp_avg"]
    return moment


DRIFTS: list[tuple[str, Callable[[Run], Tensor], str]] = [
    ("tensor", _weight, NORM),
    ("data", _moment, f"exp_avg_sq.{NORM}"),
    ("ZeRO-1 tensor", _moment, f"exp_avg_sq.{NORM}"),
    ("copies of a table", _table_moment, "exp_avg.blocks.0.memory.values.weight"),
    ("DeepSpeed", _master_moment, "exp_avg.norm.bias"),
]


def _message(call: Callable[..., object], *arguments: object) -> str:
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


def _drift(rank: int, world: int, recipe: Path, folder: Path) -> dict[str, list[str]]:
    """Return what this rank says when it is told to save after rank 1's copy has changed, and at
    the end of the next step, for the first, second and tenth step after a start; check that nothing
    was written.
    """
    said: dict[str, list[str]] = {}
    for name, copy, _ in DRIFTS:
        said[name] = []
        for steps in (1, 2, 10) if name == "data" else (1,):
            run = prepare(recipe, folder / name, *SETTINGS[name], "optimizer.lr=0", "tables.lr=0")
            while run.steps_here < steps - 1:
                train_step(run)
            if rank == 1:
                copy(run).view(-1)[-1] += 1e-3
            said[name] += [_message(save, run), _message(train_step, run)]
            assert not committed(run.folder / "checkpoints")
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    return said


def test_a_copy_that_drifts_is_named(recipe: Path, tmp_path: Path) -> None:
    """Weights, moments of dense parameters and of rows, masters."""
    pytest.importorskip("deepspeed")
    first, second = run_distributed(_drift, 2, recipe, tmp_path, timeout=300)
    assert first == second
    for name, _, tensor in DRIFTS:
        assert len(first[name]) == (6 if name == "data" else 2)
        for message in first[name]:
            assert message.startswith(tensor), (name, message)
            assert "on rank 1 is not the copy of rank 0's" in message
            assert "no checkpoint is written" in message


def _resumed(rank: int, world: int, recipe: Path, folder: Path) -> str:
    """Return what is said two steps after a resume."""
    run = prepare(recipe, folder)
    for _ in range(3):
        train_step(run)
    save(run)
    resume(run)
    train_step(run)
    if rank == 1:
        _weight(run)[0] += 1e-3
    return _message(train_step, run)


def test_the_first_steps_after_a_resume_are_checked(recipe: Path, tmp_path: Path) -> None:
    """Which gives all ranks the same copy again."""
    assert all(NORM in said for said in run_distributed(_resumed, 2, recipe, tmp_path))


def _compare(rank: int, world: int) -> list[str]:
    """Return what is said of tensors of all sizes, of which one bit differs on the last rank."""
    said = []
    for size in (1, 3, 4, 9):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.bool):
            whole = torch.ones(size + 1).to(dtype)
            tensors = {"same": whole, "part": whole[1:]}
            if rank == 0:
                tensors["on one rank"] = whole
            check_copies(tensors)
            if rank == world - 1:
                whole[-1] = 0
            said.append(_message(check_copies, tensors))
    return said


def test_one_element_of_any_dtype_is_enough() -> None:
    for said in run_distributed(_compare, 3):
        assert [message.split(" is not")[0] for message in said] == ["same on rank 2"] * 16
