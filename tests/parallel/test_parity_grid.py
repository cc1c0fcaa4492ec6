"""However a model is spread, it trains as on one process: losses, norms, every gradient, and the weights after three steps."""

import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from memshard.models.config import FeedForwardConfig, MixerConfig
from memshard.models.context import Context
from memshard.models.loss import IGNORE
from memshard.models.memory.table import find_tables
from memshard.models.random import RandomKey
from memshard.parallel.apply import apply, losses_on
from memshard.parallel.checksum import check_copies
from memshard.parallel.collectives import all_sum
from memshard.parallel.mesh import build_mesh
from memshard.trainer.checkpoint.tensors import model_tensors
from memshard.trainer.config.recipe import OptimizerConfig
from memshard.trainer.engine.native import NativeEngine
from memshard.trainer.optim.row_adam import RowAdam
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens

LAYOUTS: dict[str, tuple[Any, Any, int | None]] = {
    "rows, pooled": ("rows", "pooled", None),
    "rows, unique": ("rows", "unique", None),
    "columns": ("columns", "pooled", None),
    "tensor": ("tensor", "pooled", None),
    "rows, two copies": ("rows", "pooled", 2),
}
MODELS: dict[str, dict[str, Any]] = {
    "tied head, batch statistics": {"memory": {"share": True}},
    "SwiGLU, own head, Memory+": {
        "memory": {"gate": True, "value_dim": 12, "mode": "add", "query_norm": "layer"},
        "activation": "swiglu",
        "tie_head": False,
        "norm": "rms",
        "position": "rotary",
    },
    "PEER, post-norm": {"memory": {"kind": "peer", "query_norm": "lagged"}, "residual": "post", "position": "sinusoidal"},
}
STEPS, BATCH = 3, 8


@dataclass(frozen=True)
class Point:
    """One way to train. tensor: ranks that share matrices. accumulation: micro-batches a step. zero: whether moments are split."""

    model: str
    tensor: int
    layout: str
    accumulation: int
    zero: bool = False


def train(point: Point) -> dict[str, Any]:
    """What three steps on the ranks that are there give, whole tensors."""
    settings = dict(MODELS[point.model])
    feedforward = FeedForwardConfig(activation=settings.pop("activation", "gelu"), hidden=24)
    config = tiny_config(max_length=9, dropout=0.1, **settings)
    model = tiny_model(replace(config, mixer=MixerConfig(heads=4), feedforward=feedforward))
    layout, exchange, memory = LAYOUTS[point.layout]
    mesh = _mesh(memory, point.tensor)
    placement = apply(model, mesh, layout, exchange)
    engine = NativeEngine(model, OptimizerConfig(lr=0.01, schedule="constant", warmup=0), mesh, placement, point.zero)
    rows = RowAdam([table for _, table in find_tables(model)], lr=0.01)
    ranks, rank = (1, 0) if mesh is None else (mesh.size() // point.tensor, mesh.get_rank() // point.tensor)
    losses = losses_on(mesh)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        # Nine tokens do not divide by the ranks of a tensor group.
        tokens = tiny_tokens(BATCH, 9 if step % 2 else 10, seed=step)
        total = torch.zeros((), dtype=torch.float64)
        for number, samples in enumerate(torch.arange(BATCH).chunk(point.accumulation), 1):
            with engine.forward_context(last=number == point.accumulation):
                loss = _loss(engine.model, losses, tokens, samples.chunk(ranks)[rank], step) / tokens.numel()
                engine.backward(loss, 1.0)
            total += loss.detach()
        found["losses"].append(float(all_sum(total)) / point.tensor)
        found["norms"].append(float(engine.gradient_norm(1.0)))
        if step == 0:
            found["gradients"] = _whole(model, placement, mesh, gradients=True)
        engine.step(step, STEPS, torch.tensor(found["norms"][-1]), 0.5, 1.0)
        rows.step()
        for _, layer in model.memories():
            layer.query_norm.commit()
    check_copies(dict(model.named_parameters()) | dict(model.named_buffers()), placement, mesh)
    found["weights"] = _whole(model, placement, mesh)
    return found


@cache
def _mesh(memory: int | None, tensor: int) -> DeviceMesh | None:
    return build_mesh("cpu", memory, tensor)


def _loss(model: Any, losses: Any, tokens: Tensor, samples: Tensor, step: int) -> Tensor:
    """Sum of the losses of some samples, the third of which ends early."""
    inputs, targets = tokens[samples, :-1], tokens[samples, 1:].clone()
    targets[samples == 2, 5:] = IGNORE
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    ctx = Context(positions, documents=(positions > 3).long(), padding=targets != IGNORE, random=RandomKey(7, step, samples))
    return losses(model(inputs, ctx)[0], targets).sum()


def _whole(model: Any, placement: Any, mesh: Any, gradients: bool = False) -> dict[str, Tensor]:
    """All weights, or their gradients, put together."""
    tensors = model_tensors(model, placement, mesh)
    if gradients:
        tensors = {}
        held = {f"model.{name}": p.grad for name, p in model.named_parameters()}
        for name, table in find_tables(model):
            held[f"model.{name}.weight"] = dense = torch.zeros_like(table.weight)
            for part in table.gradients(table.gradient_scale):
                dense[part.rows] = part.sums(0, len(part.rows)).to(dense.dtype)
        for name, like in model_tensors(model, placement, mesh).items():
            if name not in held:
                continue
            own = held[name]
            assert own is not None, name
            if isinstance(like, DTensor):
                own = DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
            tensors[name] = own
    return {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in tensors.items()}


GRID = [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1)]
"""(tensor, data) ranks."""


def points(tensor: int, data: int) -> list[Point]:
    """All that makes sense on these ranks."""
    layouts = [
        layout
        for layout, (form, _, memory) in LAYOUTS.items()
        if (tensor > 1 or form != "tensor") and (memory is None or (tensor * data > memory and memory % tensor == 0))
    ]
    combinations = product(MODELS, layouts, (1, 2), (False, True) if data > 1 else (False,))
    return [Point(model, tensor, layout, accumulation, zero) for model, layout, accumulation, zero in combinations]


def sample(tensor: int, data: int) -> list[Point]:
    """A few of them: every layout, model and accumulation once somewhere."""
    everything = points(tensor, data)
    return everything[data % 3 :: 11 if data > 1 else 5]


def _train_all(rank: int, world: int, grid: list[Point]) -> dict[Point, dict[str, Any]]:
    found = {point: train(point) for point in grid}
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    return found


@cache
def alone(model: str, accumulation: int) -> dict[str, Any]:
    """One process."""
    return train(Point(model, 1, "rows, pooled", accumulation))


def check(world: int, grid: list[Point]) -> None:
    """Every point on every rank against one process."""
    for rank, found in enumerate(run_distributed(_train_all, world, grid, timeout=600)):
        for point, result in found.items():
            expected = alone(point.model, point.accumulation)
            assert expected["losses"][2] < expected["losses"][0]
            for key in ("losses", "norms"):
                assert result[key] == pytest.approx(expected[key], rel=1e-9), (point, rank, key)
            for key in ("gradients", "weights"):
                assert result[key].keys() == expected[key].keys(), (point, rank, key)
                for name, tensor in expected[key].items():
                    torch.testing.assert_close(result[key][name], tensor, rtol=1e-7, atol=1e-10, msg=f"{key} {name}, rank {rank}, {point}")


@pytest.mark.parametrize("world", [2, 4])
def test_a_sample_of_the_grid(world: int) -> None:
    check(world, [point for ranks in GRID if ranks[0] * ranks[1] == world for point in sample(*ranks)])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_whole_grid(world: int) -> None:
    check(world, [point for ranks in GRID if ranks[0] * ranks[1] == world for point in points(*ranks)])
