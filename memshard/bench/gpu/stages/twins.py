"""Twins: every configuration trained on the device, and on the CPU in fp32, from the same weights
and data, and compared; checkpoints and greedy text that go from one to the other.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshard.bench.gpu.bench import Bench, Result, tried_each
from memshard.bench.gpu.configurations import CONFIGURATIONS, MAIN, RECIPE
from memshard.bench.gpu.data import random_shards
from memshard.models.decode.generate import generate
from memshard.models.memory.table import find_tables
from memshard.trainer.config.load import load_recipe
from memshard.trainer.loop import evaluate_run
from memshard.trainer.resume import save
from memshard.trainer.run import Run
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

STEPS = 3
TOLERANCES = {
    "fp32": {"losses": 1e-4, "gradients": 1e-3, "tables": 1e-3},
    "bf16": {"losses": 1e-2, "gradients": 0.5, "tables": 0.5},
    "fp16": {"losses": 5e-3, "gradients": 0.2, "tables": 0.3},
}
"""Largest differences by precision. losses: of a step, relative. gradients: norm of the difference
of all dense gradients of the first step over their norm; tables: the same of the tables' gradients,
whose rows are others where rounding changes a search. On a CPU, bf16 gives two thirds of
these at most (PEER, whose queries are normalised over a small batch).
"""
MOVED = ("plain", "stochastic", "host", "lsh")
"""Configurations whose checkpoints go from the device to the CPU and back."""


@dataclass
class Trained:
    """Losses of the steps, and the gradients of the first, in host memory."""

    run: Run
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield the differences of every configuration by precision, and of checkpoints and text."""
    recipe = tiny_recipe(bench)
    yield from tried_each(bench, CONFIGURATIONS, partial(_twins, bench, recipe))


def _twins(bench: Bench, recipe: Path, name: str) -> Result:
    fp32 = (*CONFIGURATIONS[name], "train.precision=fp32")
    twin = trained(recipe, bench.scratch / f"{name}, twin", fp32, "cpu")
    result: Result = {}
    for precision in ("fp32", "bf16", "fp16") if bench.cuda else ("fp32", "bf16"):
        folder = bench.scratch / f"{name}, {precision}"
        overrides = (
            *CONFIGURATIONS[name],
            f"train.precision={precision}",
            # The default 65,536 skips the first steps of some: those have no gradients.
            "train.loss_scale.initial=256",
        )
        ours = trained(recipe, folder, overrides, bench.device)
        result[precision] = compared(ours, twin, TOLERANCES[precision])
        if precision == "fp32" and name in MAIN:
            result["greedy text"] = _same_text(ours.run, twin.run)
        if precision == "fp32" and name in MOVED:
            result["device to CPU"] = _moved(ours.run, recipe, fp32, "cpu")
            result["CPU to device"] = _moved(twin.run, recipe, fp32, bench.device)
    return {**result, "ok": all(part["ok"] for part in result.values())}


def tiny_recipe(bench: Bench) -> Path:
    """Write the tiny recipe and its data, if they are not there; return the recipe's path."""
    path = bench.scratch / "tiny.yaml"
    if not path.exists():
        data = random_shards(bench.scratch / "tiny", 300, 4000)
        path.write_text(RECIPE.format(data=data), encoding="utf-8")
    return path


def trained(
    recipe: Path, folder: Path, overrides: tuple[str, ...], device: torch.device | str
) -> Trained:
    """Train some steps in a new run."""
    run = set_up(load_recipe(recipe, overrides), folder, device)
    result = Trained(run)

    def keep_dense(*_: Any) -> None:
        for name, p in run.engine.model.named_parameters():
            if p.grad is not None:
                result.gradients.setdefault(name, p.grad.detach().float().cpu().clone())

    def keep_tables(*_: Any) -> None:
        for name, table in find_tables(run.model):
            for part in table.gradients(1 / run.loss_scale.value) if table.reads else ():
                whole = torch.zeros(table.weight.shape)
                sums = part.sums(0, len(part.rows)).float().cpu()
                whole.index_add_(0, part.rows.cpu(), sums)
                result.tables.setdefault(name, whole)

    hooks = [run.engine.optimizer.register_step_pre_hook(keep_dense)]
    if run.table_optimizer is not None:
        hooks.append(run.table_optimizer.register_step_pre_hook(keep_tables))
    for _ in range(STEPS):
        result.losses.append(train_step(run).loss)
        for hook in hooks:
            hook.remove()
    return result


def compared(ours: Trained, twin: Trained, tolerances: dict[str, float]) -> Result:
    """Return the differences, and whether they are within the tolerances."""
    differences = {
        "losses": max(abs(a - b) / abs(b) for a, b in zip(ours.losses, twin.losses, strict=True)),
        "gradients": distance(ours.gradients, twin.gradients),
        "tables": distance(ours.tables, twin.tables),
    }
    # NaN is within no tolerance.
    ok = all(differences[kind] <= most for kind, most in tolerances.items())
    return {**differences, "ok": ok}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all tensors over theirs; infinity if names differ."""
    if ours.keys() != theirs.keys():
        return float("inf")
    difference = sum(float((ours[name] - x).double().square().sum()) for name, x in theirs.items())
    size = sum(float(x.double().square().sum()) for x in theirs.values())
    return (difference / size) ** 0.5 if size else difference**0.5


def _same_text(ours: Run, twin: Run) -> Result:
    """Continue two prompts on both, with the twin's weights, by the best token."""
    ours.model.load_state_dict(twin.model.state_dict())
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    texts = [generate(run.model.eval(), prompt, 8, temperature=0.0).cpu() for run in (ours, twin)]
    return {"ok": torch.equal(*texts)}


def _moved(
    run: Run, recipe: Path, overrides: tuple[str, ...], device: torch.device | str
) -> Result:
    """Save the run, load a copy of its folder on another device, evaluate both and take a step."""
    save(run)
    folder = run.folder.with_name(f"{run.folder.name}, moved")
    shutil.copytree(run.folder, folder)
    other = set_up(load_recipe(recipe, overrides), folder, device)
    losses = [[evaluate_run(here).loss, train_step(here).loss] for here in (run, other)]
    difference = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    return {"losses": difference, "ok": difference <= TOLERANCES["fp32"]["losses"]}
