"""However a model is spread, it trains as on one process: losses, norms, every gradient, and the
weights after three steps.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

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
from memshard.models.recompute.checkpointing import Checkpointing
from memshard.parallel.apply import Share, apply, losses_on
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.layouts import LAYOUTS, LayoutName
from memshard.parallel.tensor_placement import split_matrices
from memshard.trainer.checkpoint.global_tensors import model_tensors
from memshard.trainer.config.optimizers import OptimizerConfig, TableOptimizerConfig
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.training import build_for_training, training_step
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens

TABLES: dict[str, tuple[LayoutName, int | None]] = {
    **{name: (name, None) for name in LAYOUTS},
    "rows, two copies": ("rows", 2),
}
"""Layout, and ranks that split a table (None: all)."""
MODELS: dict[str, dict[str, Any]] = {
    "tied head, batch statistics": {"memory": {"share": True}},
    "SwiGLU, own head, Memory+": {
        "memory": {"gate": True, "value_dim": 12, "mode": "add", "query_norm": "layer"},
        "activation": "swiglu",
        "tie_head": False,
        "norm": "rms",
        "position": "rotary",
    },
    "delta rule, LSH, local window": {
        "memory": {"query_norm": "rms", "mode": "add"},
        "mixer": {
            "pattern": ("delta", "lsh", "local"),
            "chunk": 2,
            "buckets": 2,
            "window": 3,
            "heads_at_once": 1,
        },
    },
    "Primer": {
        "memory": {"query_norm": "layer"},
        "mixer": {
            "pattern": ("softmax", "lsh", "linear"),
            "chunk": 2,
            "buckets": 2,
            "convolution": 3,
            "share_qk": True,
        },
        "activation": "squared_relu",
        "norm_after": True,
        "norm": "primer",
    },
    "PEER, post-norm": {
        "memory": {"kind": "peer", "query_norm": "lagged"},
        "residual": "post",
        "position": "sinusoidal",
    },
}
FAST_WEIGHTS: dict[str, dict[str, Any]] = {
    "fast weights": {
        "memory": {"query_norm": "batch", "mode": "add"},
        "mixer": {
            "pattern": ("delta", "linear"),
            "convolution": 4,
            "share_qk": True,
            "features": "dpfp",
        },
        "activation": "squared_relu",
    },
    "normalised fast weights": {
        "memory": {"query_norm": "layer"},
        "mixer": {"kind": "delta", "attention_norm": True, "convolution": 2},
        "position": "rotary",
    },
}
RESIDUALS = ("standard", "checkpointed", "reversible")
ENGINES: dict[str, tuple[Literal["torch", "deepspeed"], Literal[0, 1, 2]]] = {
    "torch": ("torch", 0),
    "torch, ZeRO-1": ("torch", 1),
    "DeepSpeed, ZeRO-1": ("deepspeed", 1),
    "DeepSpeed, ZeRO-2": ("deepspeed", 2),
}
STEPS, BATCH = 3, 8
EPS = 1e-3
"""Of Adam; with a smaller one it makes steps of fp32 gradients that are nothing but rounding."""


@dataclass(frozen=True)
class Point:
    """One way to train. tensor: ranks that share matrices, or sequences alone. accumulation:
    micro-batches a step. wide: fp64.
    """

    model: str
    tensor: int
    tables: str
    residual: str
    accumulation: int
    engine: str = "torch"
    wide: bool = True
    share: Share = "heads"


def train(point: Point) -> dict[str, Any]:
    """Train for three steps on the ranks that are there; return losses, norms and whole tensors."""
    settings = dict((MODELS | FAST_WEIGHTS)[point.model])
    mixer = MixerConfig(heads=4, **settings.pop("mixer", {}))
    if point.residual == "reversible":
        settings["residual"] = "reversible"
    config = tiny_config(max_length=9, dropout=0.1, **settings)
    feedforward = replace(config.feedforward, hidden=24)
    # The streams of a reversible model must stay on their grid.
    model = tiny_model(replace(config, mixer=mixer, feedforward=feedforward), spread=0.1)
    model.to(torch.float64 if point.wide else torch.float32)
    layout, memory = TABLES[point.tables]
    mesh = _mesh(memory, point.tensor)
    ranks, rank = (
        (1, 0) if mesh is None else (mesh.size() // point.tensor, mesh.get_rank() // point.tensor)
    )
    engine, zero = ENGINES[point.engine]
    checkpointing: Checkpointing = "none"
    if point.residual == "checkpointed":
        checkpointing = "full" if point.accumulation == 1 else "selective"
    training = build_for_training(
        model,
        OptimizerConfig(lr=0.01, eps=EPS, schedule="constant", warmup=0),
        TableOptimizerConfig(lr=0.01, betas=(0.9, 0.999), eps=EPS),
        TrainConfig(
            steps=STEPS,
            batch=BATCH,
            micro_batch=BATCH // ranks // point.accumulation,
            precision="fp32",
            clip=0.5,
            engine=engine,
            zero=zero,
            checkpointing=checkpointing,
        ),
        mesh=mesh,
        layout=layout,
        share=point.share,
    )
    losses = losses_on(mesh, point.share)
    result: dict[str, Any] = {"losses": [], "norms": []}

    def loss(model: Any, samples: Tensor) -> Tensor:
        return _loss(model, losses, tokens, samples.chunk(ranks)[rank], step) / tokens.numel()

    def keep_gradients(_: float) -> bool:
        if "gradients" not in result:
            result["gradients"] = _whole(model, training.placement, mesh, _gradients(model))
        return True

    for step in range(STEPS):
        # Nine tokens do not divide by the ranks of a tensor group.
        tokens = tiny_tokens(BATCH, 9 if step % 2 else 10, seed=step)
        batches = torch.arange(BATCH).chunk(point.accumulation)
        outcome = training_step(training, batches, loss, step, accept=keep_gradients)
        assert not outcome.skipped
        result["losses"].append(outcome.loss)
        result["norms"].append(outcome.norm)
    training.check_copies()
    result["weights"] = _whole(model, training.placement, mesh)
    return result


@cache
def _mesh(memory: int | None, tensor: int) -> DeviceMesh | None:
    return build_mesh("cpu", memory, tensor)


def _loss(model: Any, losses: Any, tokens: Tensor, samples: Tensor, step: int) -> Tensor:
    """Return the sum of the losses of some samples, the third of which ends early."""
    inputs, targets = tokens[samples, :-1], tokens[samples, 1:].clone()
    targets[samples == 2, 5:] = IGNORE
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    ctx = Context(
        positions,
        documents=(positions > 3).long(),
        padding=targets != IGNORE,
        random=RandomKey(7, step, samples),
    )
    return losses(model(inputs, ctx)[0], targets).sum()


def _gradients(model: Any) -> dict[str, Tensor]:
    """Return this rank's gradients, those of tables dense."""
    held = {}
    for name, p in model.named_parameters():
        # DeepSpeed keeps them where only it finds them.
        held[f"model.{name}"] = p.get_full_hp_grad() if hasattr(p, "get_full_hp_grad") else p.grad
    for name, table in find_tables(model):
        held[f"model.{name}.weight"] = dense = torch.zeros_like(table.weight)
        for part in table.gradients(table.gradient_scale):
            dense[part.rows] = part.sums(0, len(part.rows)).to(dense.dtype)
    return held


def _whole(
    model: Any, placement: Any, mesh: Any, held: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return all weights, or what this rank holds for them, put together."""
    whole = {}
    for name, tensor in model_tensors(model, placement, mesh).items():
        if held is not None and name not in held:
            continue
        local = tensor if held is None else held[name]
        assert local is not None, name
        if isinstance(tensor, DTensor) and held is not None:
            local = DTensor.from_local(
                local,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        whole[name] = (local.full_tensor() if isinstance(local, DTensor) else local).clone()
    return whole


GRID = [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1)]
"""(tensor, data) ranks."""


def points(tensor: int, data: int) -> list[Point]:
    """Return every combination that makes sense on these ranks."""
    grid = []
    for number, (tables, residual, accumulation, engine) in enumerate(
        product(TABLES, RESIDUALS, (1, 2), ENGINES)
    ):
        layout, memory = TABLES[tables]
        name, zero = ENGINES[engine]
        copies = memory is None or (tensor * data > memory and memory % tensor == 0)
        if (
            copies
            and (tensor > 1 or not LAYOUTS[layout].within_tensor_group)
            and (data > 1 or name == "deepspeed" or not zero)
        ):
            # Each in turn, but for post-norm, which cannot be reversible.
            model = list(MODELS)[number % (len(MODELS) - (residual == "reversible"))]
            grid.append(
                Point(model, tensor, tables, residual, accumulation, engine, wide=name == "torch")
            )
    return grid


def sample(world: int) -> list[Point]:
    """Return a few of the points: every value of every choice is in one of them."""
    everything = [
        point for ranks in GRID if ranks[0] * ranks[1] == world for point in points(*ranks)
    ]
    return everything[world::17]


def _train_all(rank: int, world: int, grid: list[Point]) -> dict[Point, dict[str, Any]]:
    results = {point: train(point) for point in grid}
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    return results


@cache
def alone(model: str, residual: str, accumulation: int, wide: bool) -> dict[str, Any]:
    """Train in one process, with the torch engine."""
    return train(Point(model, 1, "rows", residual, accumulation, wide=wide))


def check(world: int, grid: list[Point]) -> None:
    """Compare every point on every rank with one process, which keeps all activations; a reversible
    model is another function.
    """
    for rank, results in enumerate(run_distributed(_train_all, world, grid, timeout=900)):
        for point, result in results.items():
            residual = "reversible" if point.residual == "reversible" else "standard"
            expected = alone(point.model, residual, point.accumulation, point.wide)
            assert expected["losses"][2] < expected["losses"][0]
            # In fp32 the order of a sum turns some roundings to the reversible grid, of 2^-14, and
            # some of the reads behind them.
            near = 1e-9 if point.wide else 1e-5 if residual == "standard" else 5e-3
            for key in ("losses", "norms"):
                assert result[key] == pytest.approx(expected[key], rel=near), (point, rank, key)
            tolerance = (
                {"rtol": 1e-7, "atol": 1e-10} if point.wide else {"rtol": near, "atol": near}
            )
            for key in ("gradients", "weights"):
                assert result[key].keys() == expected[key].keys(), (point, rank, key)
                for name, tensor in expected[key].items():
                    torch.testing.assert_close(
                        result[key][name],
                        tensor,
                        **tolerance,
                        msg=f"{key} {name}, rank {rank}, {point}",
                    )


@pytest.mark.parametrize("world", [2, 4])
def test_a_sample_of_the_grid(world: int) -> None:
    check(world, sample(world))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", GRID)
def test_the_whole_grid(ranks: tuple[int, int]) -> None:
    check(ranks[0] * ranks[1], points(*ranks))


SEQUENCES = [
    Point("fast weights", 2, "rows", "standard", 2, share="sequence"),
    Point(
        "normalised fast weights",
        2,
        "columns",
        "checkpointed",
        1,
        "torch, ZeRO-1",
        share="sequence",
    ),
    Point(
        "fast weights",
        2,
        "rows-unique",
        "reversible",
        1,
        "DeepSpeed, ZeRO-1",
        wide=False,
        share="sequence",
    ),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sequences_over_ranks(world: int) -> None:
    """Fast weights pass states between the ranks; with four ranks, segments are also shorter than
    the convolutions.
    """
    check(
        world,
        SEQUENCES
        if world == 2
        else [*SEQUENCES, replace(SEQUENCES[0], tensor=4), replace(SEQUENCES[1], tensor=4)],
    )


def _logits(rank: int, world: int, mixer: MixerConfig) -> Tensor:
    """Return logits of 16 tokens."""
    config = tiny_config(dim=24, memory={"layers": ()})
    model = tiny_model(replace(config, mixer=mixer, feedforward=FeedForwardConfig(hidden=24)))
    apply(model, build_mesh("cpu", tensor=world))
    with torch.no_grad():
        logits = model(tiny_tokens(2, 16))[0]
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    return logits


@pytest.mark.parametrize(
    ("ranks", "mixer"),
    [
        # Three ranks fill 16 tokens up to 18.
        (3, MixerConfig(kind="lsh", heads=3, chunk=2)),
        (2, MixerConfig(heads=4, kv_heads=2, convolution=3, share_qk=True)),
    ],
)
def test_logits(ranks: int, mixer: MixerConfig) -> None:
    parts = run_distributed(_logits, ranks, mixer)
    torch.testing.assert_close(
        torch.cat(parts, -1)[..., : tiny_config().vocab_size], _logits(0, 1, mixer)
    )


def test_heads_of_keys_are_shared_evenly() -> None:
    model = tiny_model(tiny_config(mixer={"kv_heads": 1}))
    with pytest.raises(
        ValueError, match=r"model.mixer.kv_heads is 1, which parallel.tensor, 2, does not divide"
    ):
        split_matrices(model, 2)
