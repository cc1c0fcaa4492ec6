"""A training step of the value table alone and of whole memory layers, against their peers.

    memshard bench values --threads 2 --rounds 5

This file loads torch only in `run`, since torch and its OpenMP read the number of threads and the
page size from the environment when they are loaded.
"""

import argparse
import os
from typing import Any

from memshard.bench.values.report import show

__all__ = ["add_arguments", "run", "show"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--slots", type=int, default=262_144, help="rows of the table (default 262144)"
    )
    parser.add_argument("--dim", type=int, default=1024, help="values a row (default 1024)")
    parser.add_argument("--reads", type=int, default=128, help="rows a token reads (default 128)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[2048, 256],
        metavar="N",
        help="tokens of a step, one size after the other (default 2048 256)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds whose median counts (default 7)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of every side (default 2)")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="of our table; the others are fp32",
    )
    parser.add_argument(
        "--clip", type=float, default=0.0, help="table clipping of RowAdam (default off)"
    )
    parser.add_argument(
        "--thp",
        action="store_true",
        help="2 MB pages for all of torch's memory (THP_MEM_ALLOC_ENABLE=1)",
    )
    parser.add_argument("--only-ours", action="store_true", help="no competitors")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small table and 3 rounds: seconds, no figures to quote",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every competitor that is installed; the others are listed as missing."""
    # Before torch is loaded; processes that measure memory inherit it.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.thp:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    import torch

    from memshard.bench.values import layers, table

    torch.set_num_threads(args.threads)
    sizes = table.Sizes(
        args.slots, args.dim, args.reads, tuple(args.tokens), args.rounds, args.dtype, args.clip
    )
    if args.quick:
        # 8 MB of fp32: it may stay in a cache, where no table of use would.
        sizes = table.Sizes(16_384, 128, 32, (256,), 3, args.dtype, args.clip)
    competitors = {} if args.only_ours else {**table.competitors(), **layers.competitors()}
    missing = {name: command for name, command in competitors.items() if command}
    # Ours among the competitors: it is first, and ratios are taken to the first.
    tables = [table.OURS] if args.only_ours else table.competitors()
    peers = [] if args.only_ours else layers.competitors()
    return {
        "threads": args.threads,
        "torch": torch.__version__,
        "thp": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "table": table.measure(sizes, [name for name in tables if name not in missing]),
        "layers": {name: layers.measure(sizes, name) for name in peers if name not in missing},
        "missing": missing,
    }
