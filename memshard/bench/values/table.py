"""A training step of the value table alone, against what others offer for the same reads.

A step is the weighted sums of all tokens' reads, their backward pass (to the weights and the table)
and the update, on log-uniform row numbers. All competitors take turns, round by round; figures are
medians of the rounds, ratios are taken within a round. Processor time, summed over threads, is also
given: it is robust on a machine that others use.
"""

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.bench.common.peak_memory import peak_memory
from memshard.bench.values.report import FBGEMM, OURS, PARTS
from memshard.experiments.common.repeated import ratios
from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import backend_for
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.adam import RowAdam

PLAIN = "memshard, plain torch"
SPARSE = "EmbeddingBag sparse + SparseAdam"
DENSE = "EmbeddingBag dense + fused Adam"
_CPU = torch.device("cpu")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Reads = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor], dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """slots x dim: shape of the table; reads: rows a token reads; tokens: numbers of tokens of a
    step, measured one after the other; dtype: of our table, the others are fp32; clip: RowAdam's.
    """

    slots: int = 262_144
    dim: int = 1024
    reads: int = 128
    tokens: tuple[int, ...] = (2048, 256)
    rounds: int = 7
    dtype: str = "fp32"
    clip: float = 0.0


def measure(sizes: Sizes, names: list[str]) -> dict[str, Any]:
    """Let the named competitors take steps in turn.

    Return medians, ratios to ours with their range, bytes over time, and each one's peak memory in
    a process of its own.
    """
    bandwidth = read_bandwidth()
    steps = {name: _BUILDERS[name](sizes) for name in names}
    result: dict[str, Any] = {
        "sizes": asdict(sizes),
        "kernels": backend_for(_CPU)[1],
        "read_bandwidth": bandwidth,
        "tokens": {},
    }
    for tokens in sizes.tokens:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(sizes.rounds + 1):
            reads = sample_reads(sizes, tokens, seed=number)
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
    # Frees tables of several GB before processes that measure memory start.
    steps.clear()
    result["peak_memory"] = {name: peak_memory(take_steps, sizes, name) for name in names}
    return result


def take_steps(sizes: Sizes, name: str) -> None:
    """Take three steps of one competitor, whose memory is measured."""
    step = _BUILDERS[name](sizes)
    for seed in range(3):
        step(*sample_reads(sizes, max(sizes.tokens), seed))


def _summary(
    sizes: Sizes, tokens: int, times: list[dict[str, float]], ours: list[dict[str, float]]
) -> dict[str, float]:
    """Return medians in seconds, how many times ours is faster, and the bytes that a step cannot
    avoid over its time.
    """
    line = {
        part: statistics.median(time.get(part, 0.0) for time in times)
        for part in (*PARTS, "cpu", "rows")
    }
    for prefix, clock in (("", "total"), ("cpu_", "cpu")):
        faster = ratios([time[clock] for time in times], [time[clock] for time in ours])
        line |= {
            f"{prefix}ratio": statistics.median(faster),
            f"{prefix}ratio_low": min(faster),
            f"{prefix}ratio_high": max(faster),
        }
    # Rows are read forward and, for the weights' gradients, backward; the update reads and writes
    # distinct ones and two moments.
    size = _DTYPES[sizes.dtype].itemsize
    read = tokens * sizes.reads * sizes.dim * size
    written = line["rows"] * sizes.dim * 2 * (size + 8)
    return line | {
        "forward_bytes_per_s": read / line["forward"],
        "bytes_per_s": (2 * read + written) / line["total"],
    }


def sample_reads(sizes: Sizes, tokens: int, seed: int) -> Reads:
    """Return log-uniform rows in a random order of slots and weights that sum to 1 for a token,
    both [tokens, reads], and an upstream gradient [tokens, dim].
    """
    generator = torch.Generator().manual_seed(seed)
    # fp64: fp32 has 2^24 numbers in [0, 1), too few to reach each row of a table of many millions.
    uniform = torch.rand(tokens, sizes.reads, generator=generator, dtype=torch.float64)
    # slots^u is log-uniform: the hottest of 262,144 rows gets 1 read in 18, log 2 / log slots.
    ranks = (sizes.slots**uniform).long().clamp(max=sizes.slots) - 1
    # An odd multiplier permutes a power of two of slots: hot rows are spread over the table.
    rows = ranks * 0x9E3779B1 % sizes.slots
    weights = torch.rand(tokens, sizes.reads, generator=generator).softmax(-1)
    return rows, weights, torch.randn(tokens, sizes.dim, generator=generator) / tokens


def _ours(sizes: Sizes, plainly: bool = False) -> Step:
    """Return a step of a hidden table with RowAdam."""
    with torch.device("meta"):
        table = ValueTable(sizes.slots, sizes.dim)
    table.hide()
    table.to(_DTYPES[sizes.dtype]).to_empty(device="cpu")
    table.weight.fill_(0.01)
    if plainly:
        table.backend = plain_rows
    optimizer = RowAdam([table], rounding="stochastic", clip=sizes.clip)

    def step(rows: Tensor, weights: Tensor, upstream: Tensor) -> dict[str, float]:
        return _timed(
            lambda weights: table.weighted_sum(rows, weights), weights, upstream, optimizer
        )

    return step


def _torchs(sizes: Sizes, sparse: bool) -> Step:
    """Return a step of an EmbeddingBag with the optimizer that goes with its gradient."""
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
        # Sets the gradient to None, so that backward writes it anew instead of adding: the dense
        # one has the table's size.
        bag.zero_grad()
        return parts

    return step


def _fbgemm(sizes: Sizes) -> Step:
    """Return a step of FBGEMM's table on CPU, which backward updates; it has no Adam there."""
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
        # Its bags are ranges of one list of rows, and it wants the end of the last one as well.
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
    PLAIN: lambda sizes: _ours(sizes, plainly=True),
    SPARSE: lambda sizes: _torchs(sizes, sparse=True),
    DENSE: lambda sizes: _torchs(sizes, sparse=False),
    FBGEMM: _fbgemm,
}


def competitors() -> dict[str, str | None]:
    """Return what to install for each competitor, None where nothing is missing."""
    missing = importlib.util.find_spec("fbgemm_gpu") is None
    commands = {FBGEMM: "pip install fbgemm-gpu-cpu==1.8.0"} if missing else {}
    return {name: commands.get(name) for name in _BUILDERS}


def _timed(
    read: Callable[[Tensor], Tensor],
    weights: Tensor,
    upstream: Tensor,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, float]:
    """Return seconds of forward, backward and update; without an optimizer backward updates."""
    # A leaf of its own for each step: all competitors get the same weights, and none the gradient
    # of another.
    weights = weights.clone().requires_grad_()
    times = [time.perf_counter()]
    y = read(weights)
    times.append(time.perf_counter())
    y.backward(upstream)
    times.append(time.perf_counter())
    if optimizer is not None:
        optimizer.step()
    times.append(time.perf_counter())
    # The last part, total, is timed around the whole step: hence not strict.
    return {name: end - start for name, start, end in zip(PARTS, times, times[1:], strict=False)}


def read_bandwidth() -> float:
    """Return bytes a second of summing 1 GiB of fp32, the best of five."""
    x = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - begun)
    # The best: whatever else runs on the machine only makes it slower.
    return x.numel() * 4 / min(times)
