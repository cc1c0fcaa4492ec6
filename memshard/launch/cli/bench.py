"""`memshard bench`: side-by-side measurements."""

import argparse
import os
from pathlib import Path
from typing import Any

from memshard.launch.cli.outcome import UsageError, usage_errors

NAMES = {
    "data": "web pages a second by stage, tokenizers, tokens a second of the stream",
    "values": "a training step of the value table and of whole layers, against torch, FBGEMM, "
    "product-key-memory, PEER-pytorch",
    "parallel": "steps at every (tensor, data) split of some ranks and on each engine, a block "
    "beside DTensor's, train beside a plain loop",
}

_SIZES = [
    ("layers", 4, "blocks"),
    ("dim", 256, "width"),
    ("heads", 4, "attention heads"),
    ("length", 256, "tokens of a sequence"),
    ("batch", 8, "sequences of a step, over all ranks"),
    ("vocabulary", 8192, "tokens of the vocabulary, without --data"),
    ("keys", 0, "sub-keys of a memory in the middle layer, 0 for none"),
]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `bench` command."""
    bench = subparsers.add_parser("bench", help="measure parts of memshard beside their peers")
    bench.add_argument("--list", action="store_true", help="what can be measured")
    bench.set_defaults(run=run_list)
    commands = bench.add_subparsers(dest="bench_command", metavar="|".join(NAMES))
    data = commands.add_parser("data", help=NAMES["data"])
    data.add_argument("path", nargs="?", metavar="DIR", help="data folder to read the stream of")
    data.add_argument(
        "--warc", nargs="+", default=[], metavar="FILE", help="WARC files to measure the stages on"
    )
    data.add_argument(
        "--length",
        nargs="+",
        type=int,
        default=[256, 1024],
        metavar="N",
        help="row lengths (default 256 1024)",
    )
    data.add_argument(
        "--rounds", type=int, default=5, help="interleaved rounds whose median counts (default 5)"
    )
    data.add_argument(
        "--model",
        action="store_true",
        help="also what a 12-layer 1024-dim model takes in, in training on this machine",
    )
    data.set_defaults(run=run_data)

    parallel = commands.add_parser("parallel", help=NAMES["parallel"])
    parallel.add_argument(
        "--ranks",
        type=int,
        default=2,
        metavar="N",
        help="processes of this machine (default 2); 1 for the loop alone",
    )
    parallel.add_argument(
        "--data", metavar="DIR", help="data folder to train on in one process, beside a plain loop"
    )
    for name, default, what in _SIZES:
        parallel.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{what} (default {default:,})",
        )
    parallel.add_argument(
        "--rounds", type=int, default=9, help="interleaved rounds whose median counts (default 9)"
    )
    parallel.set_defaults(run=run_parallel)
    values = commands.add_parser("values", help=NAMES["values"])
    values.add_argument(
        "--slots", type=int, default=262_144, help="rows of the table (default 262144)"
    )
    values.add_argument("--dim", type=int, default=1024, help="values a row (default 1024)")
    values.add_argument("--reads", type=int, default=128, help="of a token (default 128)")
    values.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[2048, 256],
        metavar="N",
        help="of a step (default 2048 256)",
    )
    values.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds whose median counts (default 7)"
    )
    values.add_argument("--threads", type=int, default=2, help="of every side (default 2)")
    values.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="of our table; the others are fp32",
    )
    values.add_argument(
        "--clip", type=float, default=0.0, help="table clipping of RowAdam (default off)"
    )
    values.add_argument(
        "--thp",
        action="store_true",
        help="2 MB pages for all of torch's memory (THP_MEM_ALLOC_ENABLE=1)",
    )
    values.add_argument("--only-ours", action="store_true", help="no competitors")
    values.add_argument(
        "--quick",
        action="store_true",
        help="a small table and 3 rounds: seconds, no figures to quote",
    )
    values.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON, too")
    values.set_defaults(run=run_values)


def run_list(args: argparse.Namespace) -> dict:
    """Print what can be measured."""
    if not args.list:
        raise UsageError(
            f"name a benchmark: {', '.join(NAMES)} (memshard bench --list says what they measure)"
        )
    if not args.json:
        for name, what in NAMES.items():
            print(f"{name:<10}{what}")
    return NAMES


def run_data(args: argparse.Namespace) -> dict:
    """Measure and print."""
    if not args.path and not args.warc:
        raise UsageError("nothing to measure: name a data folder, or WARC files with --warc")
    from memshard.bench import data

    result: dict = {}
    with usage_errors():
        if args.warc:
            result["pages"] = data.page_rates([Path(file) for file in args.warc], args.rounds)
        if args.path:
            result["tokenizer_bytes_per_s"] = data.tokenizer_rates(args.path, args.rounds)
            result["stream_tokens_per_s"] = data.stream_rates(
                args.path, tuple(args.length), args.rounds
            )
            result["stream_tokens_per_s"][f"first pass, rows of {args.length[0]}"] = (
                data.first_pass_rate(args.path, args.length[0])
            )
        if args.model:
            result["model_tokens_per_s"] = data.model_rate()
    if not args.json:
        show(result)
    return result


def show(result: dict) -> None:
    """Print the rates as a table."""
    for name, rates in result.get("pages", {}).items():
        print(
            f"{name:<28}{rates['pages_per_s']:>14,.0f} "
            f"pages/s{rates['bytes_per_s'] / 1e6:>12,.1f} MB/s"
        )
    for name, rate in result.get("tokenizer_bytes_per_s", {}).items():
        print(f"{name:<28}{rate / 1e6:>14,.1f} MB/s")
    for name, rate in result.get("stream_tokens_per_s", {}).items():
        print(f"{name:<28}{rate / 1e6:>14,.1f} million tokens/s")
    if "model_tokens_per_s" in result:
        print(f"{'12 x 1024 model, training':<28}{result['model_tokens_per_s']:>14,.0f} tokens/s")


def run_values(args: argparse.Namespace) -> dict:
    """Measure and print, competitor by competitor as far as installed."""
    # torch and its OpenMP read these when they are loaded.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.thp:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    import torch

    from memshard.bench.values import layers
    from memshard.bench.values import report as values_report
    from memshard.bench.values import table as values

    torch.set_num_threads(args.threads)
    sizes = values.Sizes(
        args.slots, args.dim, args.reads, tuple(args.tokens), args.rounds, args.dtype, args.clip
    )
    if args.quick:
        sizes = values.Sizes(16_384, 128, 32, (256,), 3, args.dtype, args.clip)
    settings = {
        "threads": args.threads,
        "torch": torch.__version__,
        "thp": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
    }
    names = (
        [values.OURS]
        if args.only_ours
        else [name for name, missing in values.competitors() if not missing]
    )
    result: dict[str, Any] = {
        **settings,
        "table": values.measure(sizes, names),
        "layers": {},
        "missing": {},
    }
    if not args.only_ours:
        peers = dict(layers.competitors())
        result["missing"] = {
            name: missing for name, missing in [*values.competitors(), *peers.items()] if missing
        }
        result["layers"] = {
            name: layers.measure(sizes, name) for name, missing in peers.items() if not missing
        }
    if not args.json:
        values_report.show(result)
    if args.out:
        values_report.write(result, args.out)
    return result


def run_parallel(args: argparse.Namespace) -> dict:
    """Measure and print."""
    for name in ("ranks", "rounds", *(name for name, _, _ in _SIZES)):
        if getattr(args, name) < (name != "keys"):
            raise UsageError(
                f"--{name} is {getattr(args, name)}; it must be at least {int(name != 'keys')}"
            )
    from memshard.bench import parallel, plain_loop

    result: dict = {}
    with usage_errors():
        if args.ranks > 1:
            size = parallel.Size(
                args.layers,
                args.dim,
                args.heads,
                args.length,
                args.batch,
                args.vocabulary,
                args.keys,
            )
            result |= parallel.on_ranks(args.ranks, size, args.rounds)
        if args.data:
            result["tokens_per_s"] = plain_loop.rates(
                args.data, args.layers, args.dim, args.heads, args.length, args.batch, args.rounds
            )
    if not result:
        raise UsageError("nothing to measure: give --ranks 2 or more, or a data folder with --data")
    if not args.json:
        show_parallel(result)
    return result


def show_parallel(result: dict) -> None:
    """Print the points, the blocks and the rates as tables."""
    from memshard.bench.spread import shown

    for point in result.get("steps", []):
        print(
            f"tensor {point['tensor']} x data "
            f"{point['data']:<4}{shown(point['step_s'], 1e-3, ',.0f'):>24} ms a step"
            f"{point['dense_bytes'] / 1e6:>12,.1f} MB dense weights a "
            f"rank{point['sent_bytes'] / 1e6:>12,.1f} MB sent a step"
        )
    for name, seconds in result.get("engines_s", {}).items():
        print(f"engine {name:<32}{shown(seconds, 1e-3, ',.0f'):>24} ms a step")
    for name, seconds in result.get("blocks_s", {}).items():
        print(f"block, {name:<32}{shown(seconds, 1e-3, ',.0f'):>24} ms")
    for name, rate in result.get("tokens_per_s", {}).items():
        ratio = " / " in name
        print(
            f"{name:<24}{shown(rate, 1, ',.2f' if ratio else ',.0f'):>24}"
            f"{'' if ratio else ' tokens/s'}"
        )
