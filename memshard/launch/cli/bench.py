"""`memshard bench`: side-by-side measurements."""

import argparse
from pathlib import Path

from memshard.launch.cli.outcome import UsageError, usage_errors


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `bench` command."""
    bench = subparsers.add_parser("bench", help="measure parts of memshard beside their peers")
    commands = bench.add_subparsers(dest="bench_command", required=True, metavar="data")
    data = commands.add_parser("data", help="web pages a second by stage, tokenizers, tokens a second of the stream")
    data.add_argument("path", nargs="?", metavar="DIR", help="data folder to read the stream of")
    data.add_argument("--warc", nargs="+", default=[], metavar="FILE", help="WARC files to measure the stages on")
    data.add_argument("--length", nargs="+", type=int, default=[256, 1024], metavar="N", help="row lengths (default 256 1024)")
    data.add_argument("--rounds", type=int, default=5, help="interleaved rounds whose median counts (default 5)")
    data.add_argument("--model", action="store_true", help="also what a 12-layer 1024-dim model takes in, in training on this machine")
    data.set_defaults(run=run_data)


def run_data(args: argparse.Namespace) -> dict:
    """Measure and print."""
    if not args.path and not args.warc:
        raise UsageError("nothing to measure: name a data folder, or WARC files with --warc")
    from memshard.launch.bench import data

    result: dict = {}
    with usage_errors():
        if args.warc:
            result["pages"] = data.page_rates([Path(file) for file in args.warc], args.rounds)
        if args.path:
            result["tokenizer_bytes_per_s"] = data.tokenizer_rates(args.path, args.rounds)
            result["stream_tokens_per_s"] = data.stream_rates(args.path, tuple(args.length), args.rounds)
            result["stream_tokens_per_s"][f"first pass, rows of {args.length[0]}"] = data.first_pass_rate(args.path, args.length[0])
        if args.model:
            result["model_tokens_per_s"] = data.model_rate()
    if not args.json:
        show(result)
    return result


def show(result: dict) -> None:
    """Print the rates as a table."""
    for name, rates in result.get("pages", {}).items():
        print(f"{name:<28}{rates['pages_per_s']:>14,.0f} pages/s{rates['bytes_per_s'] / 1e6:>12,.1f} MB/s")
    for name, rate in result.get("tokenizer_bytes_per_s", {}).items():
        print(f"{name:<28}{rate / 1e6:>14,.1f} MB/s")
    for name, rate in result.get("stream_tokens_per_s", {}).items():
        print(f"{name:<28}{rate / 1e6:>14,.1f} million tokens/s")
    if "model_tokens_per_s" in result:
        print(f"{'12 x 1024 model, training':<28}{result['model_tokens_per_s']:>14,.0f} tokens/s")
