"""`memshard data build` and `memshard data verify`."""

import argparse
import time

from memshard.data_pipeline.build.sources import EXCLUDED_FOLDERS, TEXT_SUFFIXES
from memshard.launch.cli.outcome import usage_errors


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `data` command with its two subcommands."""
    data = subparsers.add_parser("data", help="turn text into token shards, or check them")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="build|verify")

    build = commands.add_parser("build", help="text, jsonl or directories of text (also .gz) -> shards, index, tokenizer")
    build.add_argument("sources", nargs="+", metavar="SRC", help="text or jsonl file, or directory of them; each also .gz")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    build.add_argument("--vocab", type=int, default=8192, help="pieces in the vocabulary (default 8192)")
    build.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="kind of tokenizer (default bpe, quicker to train)")
    build.add_argument("--held-out", type=float, default=0.01, metavar="SHARE", help="share kept for evaluation (default 0.01)")
    build.add_argument(
        "--suffix", nargs="+", default=TEXT_SUFFIXES, metavar="END",
        help=f"endings of files to take from directories (default {' '.join(TEXT_SUFFIXES)}; each also .gz)",
    )
    build.add_argument(
        "--exclude", nargs="+", default=EXCLUDED_FOLDERS, metavar="NAME",
        help=f"folders to leave out by name (default {' '.join(EXCLUDED_FOLDERS)}); hidden folders are always left out",
    )
    build.add_argument(
        "--documents", choices=("auto", "file", "line", "wikiextractor"), default="auto",
        help="what a document is in a text file (default auto: articles if the file begins with '<doc ', else the whole file)",
    )
    build.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in jsonl (default text)")
    build.add_argument("--shard-tokens", type=int, default=1 << 26, metavar="N", help="most tokens in a shard (default 67108864)")
    build.add_argument("--seed", type=int, default=0, help="draws the lines that train the tokenizer (default 0)")
    build.set_defaults(run=run_build)

    verify = commands.add_parser("verify", help="re-hash every shard and check every count")
    verify.add_argument("path", metavar="DIR", help="folder that `memshard data build` wrote")
    verify.set_defaults(run=run_verify)


def run_build(args: argparse.Namespace) -> dict:
    """Build a data folder and print its report."""
    from memshard.data_pipeline.build.build import build_data
    from memshard.data_pipeline.build.sources import Sources, find_files

    began = time.perf_counter()
    with usage_errors():
        sources = Sources(find_files(args.sources, args.suffix, args.exclude), args.documents, args.text_key)
        report = build_data(
            sources, args.out, vocab_size=args.vocab, model=args.model, held_out=args.held_out,
            shard_tokens=args.shard_tokens, seed=args.seed,
        )
    result = {"data": args.out, "seconds": round(time.perf_counter() - began, 1), **report}
    if not args.json:
        show(result)
    return result


def show(report: dict) -> None:
    """Print a build's report as a table."""
    print(f"{report['data']}: built in {report['seconds']} s, vocabulary of {report['vocabulary']:,}")
    print(f"  files      {report['files']:,} read, {report['files_not_utf8']:,} of them skipped (not UTF-8 text)")
    print(
        f"  documents  {report['documents']:,} kept ({report['documents_cut']:,} long ones cut), left out: "
        f"{report['documents_empty']:,} empty, {report['documents_invalid']:,} invalid"
    )
    print(f"  {'split':<9}{'documents':>12}{'tokens':>16}{'text bytes':>16}{'words':>14}{'bytes/token':>13}{'shards':>8}")
    for name, split in report["splits"].items():
        print(
            f"  {name:<9}{split['documents']:>12,}{split['tokens']:>16,}{split['text_bytes']:>16,}{split['words']:>14,}"
            f"{split['bytes_per_token']:>13.2f}{split['shards']:>8,}"
        )


def run_verify(args: argparse.Namespace) -> dict:
    """Check a data folder and print its totals."""
    from memshard.data_pipeline.format.verify import verify_data

    with usage_errors():
        result = verify_data(args.path)
    if not args.json:
        print(f"{args.path}: {result['shards']} shards, {result['bytes']:,} bytes, every hash and count is right")
    return result
