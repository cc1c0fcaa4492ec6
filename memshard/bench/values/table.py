"""A training step of the value table alone, against what others offer for the same reads.

A step is the weighted sums of all tokens' reads, their backward pass (to the weights and the table)
and the update, on log-uniform row numbers. All competitors take turns, round by round; figures are
medians of the rounds, ratios are taken within a round. Processor time, of all threads, is robust
where others use the machine, too.
"""

import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.bench.common.peak_memory import peak_memory
from memshard.models.kernels.backend import SWITCH, chosen
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.adam import RowAdam

OURS, PLAIN, SPARSE, DENSE = (
    "memshard",
    "memshard, plain torch",
    "EmbeddingBag sparse + SparseAdam",
    "EmbeddingBag dense + fused Adam",
)
FBGEMM = "FBGEMM, row-wise Adagrad"
PARTS = ("forward", "backward", "update", "total")
_CPU = torch.device("cpu")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Reads = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor], dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """slots x dim: the table; reads: of a token; tokens: of a step, each size in turn; dtype: of
    our table, the others are fp32; clip: RowAdam's.
    """

    slots: int = 262_144
    dim: int = 1024
    reads: int = 128
    tokens: tuple[int, ...] = (2048, 256)
    rounds: int = 7
    dtype: str = "fp32"
    clip: float = 0.0


def measure(sizes: Sizes, names: list[str]) -> dict[str, Any]:
    """Steps of the named competitors in turn: medians, ratios to ours with their range, bytes over
    time, peak memory of each alone.
    """
    bandwidth = read_bandwidth()
    steps = {name: _BUILDERS[name](sizes) for name in names}
    result: dict[str, Any] = {
        "sizes": asdict(sizes),
        "kernels": chosen(_CPU)[1],
        "read_bandwidth": bandwidth,
        "tokens": {},
    }
    for tokens in sizes.tokens:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(sizes.rounds + 1):
            reads = draw(sizes, tokens, seed=number)
            rows = float(len(torch.unique(reads[0])))
            for name, step in steps.items():
                begun, used = time.perf_counter(), time.process_time()
                parts = step(*reads)
                parts |= {
                    "total": time.perf_counter() - begun,
                    "cpu": time.process_time() - used,
                    "rows": rows,
                }
                if number:  # the first is a warm-up
                    rounds[name].append(parts)
        result["tokens"][tokens] = {
            name: _summary(sizes, tokens, times, rounds[names[0]]) for name, times in rounds.items()
        }
    steps.clear()
    result["peak_memory"] = {name: peak_memory(take_steps, sizes, name) for name in names}
    return result


def take_steps(sizes: Sizes, name: str) -> None:
    """Three steps of one competitor, for its memory."""
    step = _BUILDERS[name](sizes)
    for seed in range(3):
        step(*draw(sizes, max(sizes.tokens), seed))


def _summary(
    sizes: Sizes, tokens: int, times: list[dict[str, float]], ours: list[dict[str, float]]
) -> dict[str, float]:
    """Medians in seconds, how many times ours is faster, and the bytes that a step cannot avoid
    over its time.
    """
    found = {
        part: statistics.median(time.get(part, 0.0) for time in times)
        for part in (*PARTS, "cpu", "rows")
    }
    ratios = [time["total"] / own["total"] for time, own in zip(times, ours, strict=True)]
    found |= {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
    ratios = [time["cpu"] / own["cpu"] for time, own in zip(times, ours, strict=True)]
    found |= {
        "cpu_ratio": statistics.median(ratios),
        "cpu_ratio_low": min(ratios),
        "cpu_ratio_high": max(ratios),
    }
    # Rows are read forward and, for the weights' gradients, backward; the update reads and writes
    # distinct ones and two moments.
    size = _DTYPES[sizes.dtype].itemsize
    read = tokens * sizes.reads * sizes.dim * size
    written = found["rows"] * sizes.dim * 2 * (size + 8)
    return found | {
        "forward_bytes_per_s": read / found["forward"],
        "bytes_per_s": (2 * read + written) / found["total"],
    }


def draw(sizes: Sizes, tokens: int, seed: int) -> Reads:
    """Log-uniform rows in a random order of slots, weights that sum to 1 a token, and an upstream
    gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, sizes.reads, generator=generator, dtype=torch.float64)
    ranks = (sizes.slots**uniform).long().clamp(max=sizes.slots) - 1
    # An odd multiplier permutes a power of two of slots: hot rows are spread over the table.
    rows = ranks * 0x9E3779B1 % sizes.slots
    weights = torch.rand(tokens, sizes.reads, generator=generator).softmax(-1)
    return rows, weights, torch.randn(tokens, sizes.dim, generator=generator) / tokens


def _ours(sizes: Sizes, plain: bool = False) -> Step:
    """A hidden table and RowAdam."""
    with torch.device("meta"):
        table = ValueTable(sizes.slots, sizes.dim)
    table.hide()
    table.to(_DTYPES[sizes.dtype]).to_empty(device="cpu")
    table.weight.fill_(0.01)
    optimizer = RowAdam([table], rounding="stochastic", clip=sizes.clip)

    def step(rows: Tensor, weights: Tensor, upstream: Tensor) -> dict[str, float]:
        take_path(plain)
        return _timed(
            lambda weights: table.weighted_sum(rows, weights), weights, upstream, optimizer
        )

    return step


def _torchs(sizes: Sizes, sparse: bool) -> Step:
    """An EmbeddingBag's table and the optimizer that goes with its gradient."""
    bag = nn.EmbeddingBag(
        sizes.slots,
        sizes.dim,
        mode="sum",
        sparse=sparse,
        _weight=torch.full((sizes.slots, sizes.dim), 0.01),
    )
    optimizer = (
        torch.optim.SparseAdam(list(bag.parameters()))
        if sparse
        else torch.optim.Adam(bag.parameters(), fused=True)
    )

    def step(rows: Tensor, weights: Tensor, upstream: Tensor) -> dict[str, float]:
        def read(weights: Tensor) -> Tensor:
            return F.embedding_bag(
                rows, bag.weight, mode="sum", per_sample_weights=weights, sparse=sparse
            )

        parts = _timed(read, weights, upstream, optimizer)
        bag.zero_grad()
        return parts

    return step


def _fbgemm(sizes: Sizes) -> Step:
    """FBGEMM's table on CPU, whose backward pass updates it; it has no Adam there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        table = SplitTableBatchedEmbeddingBagsCodegen(
            [(sizes.slots, sizes.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            pooling_mode=PoolingMode.SUM,
            learning_rate=1e-3,
        )

    def step(rows: Tensor, weights: Tensor, upstream: Tensor) -> dict[str, float]:
        offsets = torch.arange(len(rows) + 1) * rows.shape[1]
        return _timed(
            lambda weights: table(rows.flatten(), offsets, per_sample_weights=weights.flatten()),
            weights,
            upstream,
            None,
        )

    return step


_BUILDERS: dict[str, Callable[[Sizes], Step]] = {
    OURS: _ours,
    PLAIN: lambda sizes: _ours(sizes, plain=True),
    SPARSE: lambda sizes: _torchs(sizes, sparse=True),
    DENSE: lambda sizes: _torchs(sizes, sparse=False),
    FBGEMM: _fbgemm,
}


def competitors() -> Iterator[tuple[str, str | None]]:
    """(name, what to install for it) of all competitors; None where nothing is missing."""
    for name in _BUILDERS:
        missing = name == FBGEMM and importlib.util.find_spec("fbgemm_gpu") is None
        yield name, "pip install fbgemm-gpu-cpu==1.8.0" if missing else None


def _timed(
    read: Callable[[Tensor], Tensor],
    weights: Tensor,
    upstream: Tensor,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, float]:
    """Seconds of forward, backward and update; without an optimizer backward does both."""
    weights = weights.clone().requires_grad_()
    times = [time.perf_counter()]
    y = read(weights)
    times.append(time.perf_counter())
    y.backward(upstream)
    times.append(time.perf_counter())
    if optimizer is not None:
        optimizer.step()
    times.append(time.perf_counter())
    return {name: end - start for name, start, end in zip(PARTS, times, times[1:], strict=False)}


def take_path(plain: bool) -> None:
    """Take the plain path or the fastest; building and testing kernels happens outside of what is
    timed.
    """
    if plain != (os.environ.get(SWITCH) == "plain"):
        os.environ[SWITCH] = "plain" if plain else ""
        chosen.cache_clear()
        chosen(_CPU)


def read_bandwidth() -> float:
    """Bytes a second of summing 1 GiB of fp32, the best of 5."""
    x = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - begun)
    return x.numel() * 4 / min(times)
