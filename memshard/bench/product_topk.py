"""Product-key search: what the fixed order of ties and the pruning cost and save.

    OMP_NUM_THREADS=1 python -m memshard.bench.product_topk

Medians of interleaved runs on random scores, and ratios to torch.topk (whose ties have no order)
and to the unpruned search.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from memshard.models.memory.product_topk import _search_plain, product_topk, ranked_topk


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--keys", type=int, default=512)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    first, second = torch.randn(2, args.tokens, args.heads, args.keys)
    k = args.topk
    with torch.no_grad():
        report(
            "top sub-keys of one half",
            args.runs,
            {
                "torch.topk": lambda: first.topk(k),
                "ranked_topk": lambda: ranked_topk(first, k),
                "stable sort": lambda: torch.sort(
                    first, dim=-1, descending=True, stable=True
                ).indices[..., :k],
            },
        )
        report(
            "slots of both halves",
            args.runs,
            {
                "all topk^2 pairs": lambda: unpruned(first, second, k),
                "product_topk, plain": lambda: _search_plain(first, second, k),
                "product_topk": lambda: product_topk(first, second, k),
            },
        )


def unpruned(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same search without the pruning of pairs."""
    i1, i2 = ranked_topk(first, k), ranked_topk(second, k)
    sums = (first.gather(-1, i1)[..., :, None] + second.gather(-1, i2)[..., None, :]).flatten(-2)
    chosen = ranked_topk(sums, k)
    return sums.gather(-1, chosen), i1.gather(-1, chosen // k), i2.gather(-1, chosen % k)


def report(title: str, runs: int, variants: dict[str, Callable[[], object]]) -> None:
    """Print the median milliseconds of each variant, measured in turn, and ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(runs + 1):
        for name, call in variants.items():
            begun = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = next(iter(medians.values()))
    print(title)
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(
            f"  {name:<20}{median * 1e3:8.1f} ms  ({low * 1e3:.1f} to {high * 1e3:.1f})  "
            f"{median / base:5.2f}x"
        )


if __name__ == "__main__":
    main()
