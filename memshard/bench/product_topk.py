"""Product-key search: what the fixed order of ties costs, and what pruning the pairs saves.

    OMP_NUM_THREADS=1 memshard bench product-topk --rounds 31

Random scores, one thread; medians of interleaved rounds, and their ratios to torch.topk (whose ties
have no order) and to the search over all pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memshard.experiments.common.clock import interleave
from memshard.experiments.common.repeated import median_range
from memshard.models.kernels.plain_topk import product_search, ranked_topk
from memshard.models.memory.product_topk import product_topk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--keys", type=int, default=512, help="sub-keys of a half (default 512)")
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument(
        "--rounds", type=int, default=9, help="interleaved rounds whose median counts (default 9)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of every round, by task and variant."""
    torch.manual_seed(0)
    first, second = torch.randn(2, args.tokens, args.heads, args.keys)
    k = args.topk
    tasks: dict[str, dict[str, Callable[[], object]]] = {
        "top sub-keys of one half": {
            "torch.topk": lambda: first.topk(k),
            "ranked_topk": lambda: ranked_topk(first, k),
            # The plain way to an order of ties: lowest number first, at 4.7 times torch.topk.
            "stable sort": lambda: torch.sort(first, dim=-1, descending=True, stable=True).indices[
                ..., :k
            ],
        },
        "slots of both halves": {
            "all topk^2 pairs": lambda: all_pairs(first, second, k),
            "product_topk, plain": lambda: product_search(first, second, k),
            "product_topk": lambda: product_topk(first, second, k),
        },
    }
    with torch.no_grad():
        return {
            task: interleave(variants, args.rounds, time.perf_counter)
            for task, variants in tasks.items()
        }


def show(result: dict[str, Any]) -> None:
    """Print medians with their range, and ratios to the first variant of each task."""
    for task, variants in result.items():
        print(task)
        base = statistics.median(next(iter(variants.values())))
        for name, seconds in variants.items():
            print(
                f"  {name:<20}{median_range(seconds, '.1f', 1e-3):>24} ms  "
                f"{statistics.median(seconds) / base:5.2f}x"
            )


def all_pairs(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Search all k x k pairs of the best sub-keys: `product_topk` without its pruning."""
    i1, i2 = ranked_topk(first, k), ranked_topk(second, k)
    # k^2 sums for a token and head, 1,024 of them at 32, of which k are wanted.
    sums = (first.gather(-1, i1)[..., :, None] + second.gather(-1, i2)[..., None, :]).flatten(-2)
    chosen = ranked_topk(sums, k)
    # A flattened pair's number is first * k + second.
    return sums.gather(-1, chosen), i1.gather(-1, chosen // k), i2.gather(-1, chosen % k)
