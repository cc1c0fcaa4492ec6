"""However a model is spread, it trains as on one process: losses, norms, every gradient, and the
weights after three steps.
"""

import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.config import FeedForwardConfig, MixerConfig
from memshard.parallel.apply import apply
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tensor_placement import split_matrices
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens
from tests.parallel.grid import ENGINES, GRID, Point, Precision, points, train


def sample(world: int) -> list[Point]:
    """Return a few of the points: every value of every choice is in one of them."""
    everything = [
        point for ranks in GRID if ranks[0] * ranks[1] == world for point in points(*ranks)
    ]
    return everything[world::31]


def _train_all(rank: int, world: int, grid: list[Point]) -> dict[Point, dict[str, Any]]:
    results = {point: train(point) for point in grid}
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    return results


@cache
def alone(
    model: str, residual: str, accumulation: int, wide: bool, precision: Precision
) -> dict[str, Any]:
    """Train in one process, with the torch engine."""
    engine = next(name for name, kind in ENGINES.items() if kind == ("torch", 0, precision))
    return train(Point(model, 1, "rows", residual, accumulation, engine, wide))


def check(world: int, grid: list[Point]) -> None:
    """Compare every point on every rank with one process, which keeps all activations; a reversible
    model is another function.
    """
    for rank, results in enumerate(run_distributed(_train_all, world, grid, timeout=7200)):
        for point, result in results.items():
            residual = "reversible" if point.residual == "reversible" else "standard"
            expected = alone(point.model, residual, point.accumulation, point.wide, point.precision)
            assert min(expected["losses"]) < expected["losses"][0]
            compare = _compare if point.precision == "fp32" else _compare_in_16_bits
            compare(result, expected, point, f"rank {rank}, {point}")


def _compare(result: dict[str, Any], expected: dict[str, Any], point: Point, where: str) -> None:
    # In fp32 the order of a sum turns some roundings to the reversible grid, of 2^-14, and some of
    # the reads behind them.
    near = 1e-9 if point.wide else 5e-3 if point.residual == "reversible" else 1e-5
    for key in ("losses", "norms"):
        assert result[key] == pytest.approx(expected[key], rel=near), where
    rtol, atol = (1e-7, 1e-10) if point.wide else (near, near)
    for key in ("gradients", "weights"):
        assert result[key].keys() == expected[key].keys(), where
        for name, tensor in expected[key].items():
            torch.testing.assert_close(
                result[key][name], tensor, rtol=rtol, atol=atol, msg=f"{key} {name}, {where}"
            )


def _compare_in_16_bits(
    result: dict[str, Any], expected: dict[str, Any], point: Point, where: str
) -> None:
    """By the size of what differs: roundings to 16 bits turn the choice of some reads."""
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.02), where
    assert result["norms"] == pytest.approx(expected["norms"], rel=0.1), where
    near = {"fp16": 0.03, "bf16": 0.12}[point.precision]
    for key, begun, most in (("gradients", {}, near), ("weights", expected["begun"], 2 * near)):
        assert result[key].keys() == expected[key].keys(), where
        # Sizes of the difference and of the gradient, or of what a weight has moved.
        sizes = {
            name: (
                (result[key][name].double() - tensor).norm(),
                (tensor.double() - begun.get(name, 0)).norm(),
            )
            for name, tensor in expected[key].items()
        }
        total = torch.stack([size for _, size in sizes.values()]).norm()
        for name, (difference, size) in sizes.items():
            assert difference < most * (size + total), f"{key} {name}, {where}"


@pytest.mark.parametrize("world", [2, 4])
def test_a_sample_of_the_grid(world: int) -> None:
    check(world, sample(world))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", GRID)
def test_the_whole_grid(ranks: tuple[int, int]) -> None:
    check(ranks[0] * ranks[1], points(*ranks))


TWO_KINDS = [
    Point("Engram beside product keys", 1, "by kind", "standard", 2),
    Point("Engram beside product keys", 2, "by kind", "checkpointed", 1),
    Point("bigrams before every mixer", 2, "by kind", "reversible", 1),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tables_of_two_kinds_in_two_layouts(world: int) -> None:
    """With four ranks, there may be two copies of both."""
    copies = replace(TWO_KINDS[0], tables="by kind, two copies")
    check(world, TWO_KINDS if world == 2 else [*TWO_KINDS, copies])


SEQUENCES = [
    Point("fast weights", 2, "rows", "standard", 2, share="sequence"),
    Point("fast weights behind n-grams", 2, "rows-unique", "standard", 2, share="sequence"),
    Point("fast weights behind n-grams", 2, "tensor-columns", "reversible", 1, share="sequence"),
    Point(
        "normalised fast weights",
        2,
        "columns",
        "checkpointed",
        1,
        "torch, ZeRO-1",
        share="sequence",
    ),
    *(
        Point(model, 2, "rows-unique", residual, 1, engine, wide=False, share="sequence")
        for model, residual, engine in (
            ("fast weights", "reversible", "DeepSpeed, ZeRO-1"),
            # Without normalisation the norm triples in a step, and 16 bits say nothing any more.
            ("normalised fast weights", "standard", "DeepSpeed, ZeRO-1, bf16"),
            ("normalised fast weights", "reversible", "DeepSpeed, ZeRO-2, fp16"),
        )
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
        else [*SEQUENCES, *(replace(point, tensor=4) for point in SEQUENCES[:4])],
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
