"""The value table alone: a training step of RowAdam against what torch offers for the same reads.

    python benchmarks/values.py --threads 2

A step is the weighted sums of all tokens' reads, their backward pass (to the weights and the table) and the update, on a
table of 262,144 x 1024 fp32, 128 reads a token, log-uniform row numbers. All competitors take turns, round by round; figures are
medians of the rounds, ratios are taken within a round. Processor time, of all threads,
is robust where others use the machine, too. Writes values.json where --out says.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.kernels.select import SWITCH, chosen
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.row_adam import RowAdam

CPU = torch.device("cpu")
PARTS = ("forward", "backward", "update", "total")
Step = Callable[[Tensor, Tensor, Tensor], dict[str, float]]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--reads", type=int, default=128, help="of a token (default 128)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of our table; the others are fp32")
    parser.add_argument("--clip", type=float, default=0.0, help="table clipping of RowAdam (default off)")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for values.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(f"{args.slots:,} x {args.dim} {args.dtype}, {args.reads} reads a token, {args.threads} threads, torch {torch.__version__}")
    print(f"{chosen(CPU)[1]}; THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}; clip {args.clip}")
    bandwidth = read_bandwidth()
    print(f"stream read {bandwidth / 1e9:.1f} GB/s")
    competitors = build(args)
    result = {"arguments": {name: str(value) for name, value in vars(args).items()}, "read_bandwidth": bandwidth, "tokens": {}}
    for tokens in args.tokens:
        rounds = {name: [] for name in competitors}
        for number in range(args.rounds + 1):
            reads = draw(tokens, args, seed=number)
            touched = {"rows": float(len(torch.unique(reads[0])))}
            for name, step in competitors.items():
                begun, used = time.perf_counter(), time.process_time()
                parts = step(*reads)
                parts |= {"total": time.perf_counter() - begun, "cpu": time.process_time() - used} | touched
                if number:  # the first is a warm-up
                    rounds[name].append(parts)
        result["tokens"][tokens] = report(tokens, rounds, args, bandwidth)
        sys.stdout.flush()
    result["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak resident memory of all competitors together {result['peak_rss'] / 1e9:.1f} GB")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "values.json").write_text(json.dumps(result, indent=1) + "\n")


def draw(tokens: int, args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-uniform rows in a random order of slots, weights that sum to 1 a token, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, args.reads, generator=generator, dtype=torch.float64)
    ranks = (args.slots**uniform).long().clamp(max=args.slots) - 1
    # An odd multiplier permutes a power of two of slots: hot rows are spread over the table.
    rows = ranks * 0x9E3779B1 % args.slots
    weights = torch.rand(tokens, args.reads, generator=generator).softmax(-1)
    return rows, weights, torch.randn(tokens, args.dim, generator=generator) / tokens


def build(args: argparse.Namespace) -> dict[str, Step]:
    """The competitors, each with a table of its own."""
    steps = {"memshard": ours(args, plain=False)}
    if args.only_ours:
        return steps
    steps["memshard, plain torch"] = ours(args, plain=True)
    for name, sparse in (("EmbeddingBag sparse + SparseAdam", True), ("EmbeddingBag dense + fused Adam", False)):
        steps[name] = torchs(args, sparse)
    return steps


def ours(args: argparse.Namespace, plain: bool) -> Step:
    """A hidden table and RowAdam."""
    with torch.device("meta"):
        table = ValueTable(args.slots, args.dim)
    table.hide()
    table.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]).to_empty(device="cpu")
    table.weight.fill_(0.01)
    optimizer = RowAdam([table], rounding="stochastic", clip=args.clip)

    def step(rows: Tensor, weights: Tensor, upstream: Tensor) -> dict[str, float]:
        switch(plain)
        return timed(lambda weights: table.weighted_sum(rows, weights), weights, upstream, optimizer)

    return step


def torchs(args: argparse.Namespace, sparse: bool) -> Step:
    """An EmbeddingBag's table and the optimizer that goes with its gradient."""
    bag = nn.EmbeddingBag(args.slots, args.dim, mode="sum", sparse=sparse, _weight=torch.full((args.slots, args.dim), 0.01))
    optimizer = torch.optim.SparseAdam(list(bag.parameters())) if sparse else torch.optim.Adam(bag.parameters(), fused=True)

    def step(rows: Tensor, weights: Tensor, upstream: Tensor) -> dict[str, float]:
        def read(weights: Tensor) -> Tensor:
            return F.embedding_bag(rows, bag.weight, mode="sum", per_sample_weights=weights, sparse=sparse)

        parts = timed(read, weights, upstream, optimizer)
        bag.zero_grad()
        return parts

    return step


def timed(read: Callable[[Tensor], Tensor], weights: Tensor, upstream: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds of forward, backward and update."""
    weights = weights.clone().requires_grad_()
    times = [time.perf_counter()]
    y = read(weights)
    times.append(time.perf_counter())
    y.backward(upstream)
    times.append(time.perf_counter())
    optimizer.step()
    times.append(time.perf_counter())
    return {name: end - start for name, start, end in zip(("forward", "backward", "update"), times, times[1:], strict=False)}


def switch(plain: bool) -> None:
    """Take the plain path or the fastest; building and testing kernels happens outside of what is timed."""
    if plain != (os.environ.get(SWITCH) == "plain"):
        os.environ[SWITCH] = "plain" if plain else ""
        chosen.cache_clear()
        chosen(CPU)


def read_bandwidth() -> float:
    """Bytes a second of summing 1 GiB of fp32, the best of 5."""
    x = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - begun)
    return x.numel() * 4 / min(times)


def report(tokens: int, rounds: dict[str, list[dict[str, float]]], args: argparse.Namespace, bandwidth: float) -> dict:
    """Print and return medians, spreads and ratios."""
    lines: dict[str, dict[str, float]] = {}
    print(f"\n{tokens:,} tokens a step, {tokens * args.reads:,} reads")
    print("| | forward | backward | update | step, ms | processor time, ms | ours is faster by | by processor time |")
    print("|---|---|---|---|---|---|---|---|")
    for name, times in rounds.items():
        medians = {part: statistics.median(time[part] for time in times) for part in (*PARTS, "cpu", "rows")}
        ratios = [time["total"] / own["total"] for time, own in zip(times, rounds["memshard"], strict=True)]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        cpu = statistics.median(time["cpu"] / own["cpu"] for time, own in zip(times, rounds["memshard"], strict=True))
        medians |= {"cpu_ratio": cpu, "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        lines[name] = medians
        shown = " | ".join(f"{medians[part] * 1e3:.1f}" for part in (*PARTS, "cpu"))
        print(f"| {name} | {shown} | {medians['ratio']:.1f}x ({spread}) | {cpu:.1f}x |")
    read = tokens * args.reads * args.dim * (4 if args.dtype == "fp32" else 2)
    bound = read / bandwidth
    print(f"forward: {lines['memshard']['forward'] / bound:.2f} x (bytes of all reads) / (stream read bandwidth)")
    own = lines["memshard"]
    print(f"distinct rows a step: {own['rows']:,.0f}; ours takes {own['total'] / own['rows'] * 1e6:.2f} us for each")
    return {"competitors": lines, "forward_over_bound": lines["memshard"]["forward"] / bound}


if __name__ == "__main__":
    main()
