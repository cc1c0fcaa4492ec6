"""Whole memory layers, ours and those of two packages: a training step of each with the optimizer
it is usually used with.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from memshard.bench.common.peak_memory import peak_memory
from memshard.bench.values.table import Sizes
from memshard.experiments.common.repeated import ratios
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import externalize_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam

PKM, PEER = "product-key-memory, fused Adam", "PEER-pytorch, fused Adam"
PAIRS = {PKM: "ProductKeyMemory, RowAdam", PEER: "Peer, RowAdam"}
# The heads are the packages' own defaults; ours get as many, and as many reads.
_HEADS, _KEY_DIM = {PKM: 4, PEER: 8}, 256


def measure(sizes: Sizes, peer: str) -> dict[str, Any]:
    """Let a peer's layer and ours take steps in turn; return medians, ratios, and each one's peak
    memory in a process of its own.
    """
    names = (PAIRS[peer], peer)
    result: dict[str, Any] = {"tokens": {}}
    steps = {name: _BUILDERS[name](sizes) for name in names}
    for tokens in token_counts(sizes, peer):
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(sizes.rounds + 1):
            # New tokens every round: rows read again would be in the cache.
            x = torch.randn(1, tokens, sizes.dim, generator=torch.Generator().manual_seed(number))
            for name, step in steps.items():
                begun = time.perf_counter()
                step(x)
                if number:  # the first is a warm-up
                    times[name].append(time.perf_counter() - begun)
        faster = ratios(times[peer], times[PAIRS[peer]])
        result["tokens"][tokens] = {
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "ratio": statistics.median(faster),
            "ratio_low": min(faster),
            "ratio_high": max(faster),
        }
    # Frees models of several GB each before processes that measure memory start.
    steps.clear()
    return result | {
        "peak_memory": {
            name: peak_memory(take_steps, sizes, name, max(token_counts(sizes, peer)))
            for name in names
        }
    }


def token_counts(sizes: Sizes, peer: str) -> tuple[int, ...]:
    """Return the numbers of tokens to measure.

    PEER-pytorch gathers every expert that a token reads, 2 MB a token of 1,024 values: for it only
    the smallest step.
    """
    return sizes.tokens if peer == PKM else (min(sizes.tokens),)


def take_steps(sizes: Sizes, name: str, tokens: int) -> None:
    """Take three steps of one layer, whose memory is measured."""
    step = _BUILDERS[name](sizes)
    for _ in range(3):
        step(torch.randn(1, tokens, sizes.dim))


def competitors() -> dict[str, str | None]:
    """Return what to install for each peer, None where nothing is missing."""
    packages = {
        PKM: ("product_key_memory", "product-key-memory"),
        PEER: ("PEER_pytorch", "PEER-pytorch"),
    }
    return {
        name: None if importlib.util.find_spec(module) else f"pip install {package}"
        for name, (module, package) in packages.items()
    }


def _ours(sizes: Sizes, kind: type[ProductKeyMemory], heads: int) -> Callable[[Tensor], None]:
    layer = kind(sizes.dim, isqrt(sizes.slots), heads, sizes.reads // heads, _KEY_DIM)
    tables = externalize_tables(layer)
    optimizer = CombinedOptimizer(
        Adam(layer.parameters(), fused=True), RowAdam(tables, clip=sizes.clip)
    )

    def step(x: Tensor) -> None:
        _train(layer, optimizer, x)

    return step


def _peers(layer: nn.Module) -> Callable[[Tensor], None]:
    optimizer = Adam(layer.parameters(), fused=True)
    return lambda x: _train(layer, optimizer, x)


def _pkm(sizes: Sizes) -> Callable[[Tensor], None]:
    from product_key_memory import PKM as Layer

    heads = _HEADS[PKM]
    return _peers(
        Layer(
            sizes.dim,
            heads=heads,
            num_keys=isqrt(sizes.slots),
            topk=sizes.reads // heads,
            # Of half a query there, of a whole one here.
            dim_head=_KEY_DIM // 2,
        )
    )


def _peer(sizes: Sizes) -> Callable[[Tensor], None]:
    from PEER_pytorch import PEER as Layer

    heads, slots = _HEADS[PEER], isqrt(sizes.slots) ** 2
    return _peers(
        Layer(
            sizes.dim,
            heads=heads,
            num_experts=slots,
            num_experts_per_head=sizes.reads // heads,
            # Likewise of half a query.
            dim_key=_KEY_DIM // 2,
        )
    )


_BUILDERS: dict[str, Callable[[Sizes], Callable[[Tensor], None]]] = {
    PAIRS[PKM]: lambda sizes: _ours(sizes, ProductKeyMemory, _HEADS[PKM]),
    PAIRS[PEER]: lambda sizes: _ours(sizes, Peer, _HEADS[PEER]),
    PKM: _pkm,
    PEER: _peer,
}


def _train(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    # A loss that costs next to nothing and has a gradient that differs from token to token.
    layer(x).square().mean().backward()
    optimizer.step()
