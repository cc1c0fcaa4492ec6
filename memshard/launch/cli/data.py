"""`memshard data build`, `index` and `verify`."""

import argparse
import time
from collections import Counter
from importlib import import_module

from memshard.data_pipeline.prepare.inputs.kinds import (
    DEFAULTS,
    EXCLUDED_FOLDERS,
    OWN_BUILDS,
    SOURCES,
    TEXT_ENDINGS,
    Options,
    OwnBuild,
)
from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import MOST_SEED, add_allow, real, whole


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `data` command with its subcommands."""
    data = subparsers.add_parser("data", help="turn text into token shards, or check them")
    names = [build.command for build in OWN_BUILDS.values() if build.command]
    commands = data.add_subparsers(
        dest="data_command", required=True, metavar="|".join(["build", *names, "verify"])
    )
    build = commands.add_parser(
        "build",
        help="WARC, text, jsonl (also .gz), folders or URLs of them -> shards, index, tokenizer",
    )
    _add_common(
        build,
        "file, glob, folder, http(s)/s3 URL, pipe:COMMAND, or list (*.paths); each also .gz",
        web=True,
    )
    _add_build(build)
    build.set_defaults(run=run_build)
    for kind in OWN_BUILDS.values():
        if kind.command:
            command = commands.add_parser(kind.command, help=kind.help)
            _add_common(command, kind.takes)
            _add_options(command, kind.options)
            # As a default, `kind` is bound now; the name alone would be the loop's last
            # one for all.
            command.set_defaults(run=lambda args, kind=kind: run_own(kind, args))
    verify = commands.add_parser("verify", help="re-hash every shard and check every count")
    verify.add_argument(
        "path", metavar="DIR", help="folder that `memshard data build` wrote, or its URL"
    )
    verify.set_defaults(run=run_verify)


def _add_common(parser: argparse.ArgumentParser, takes: str, web: bool = False) -> None:
    """Add what every build asks for. takes: what its inputs are. web: they may be web archives."""
    parser.add_argument("sources", nargs="+", metavar="SRC", help=takes)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty"
    )
    parser.add_argument(
        "--vocab", type=whole(), default=8192, help="pieces in the vocabulary (default 8192)"
    )
    parser.add_argument(
        "--model",
        choices=("bpe", "unigram"),
        default="bpe",
        help="kind of tokenizer (default bpe, quicker to train)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="take this tokenizer (model file or data folder), train none",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="AMOUNT",
        help="kept for evaluation: share of the documents or a number (default 0.01"
        + ("; WARC 5000, at most 1 %%)" if web else ")"),
    )
    parser.add_argument(
        "--test",
        type=float,
        metavar="AMOUNT",
        help="kept for a final test, likewise (default none"
        + ("; WARC: as --held-out)" if web else ")"),
    )
    parser.add_argument(
        "--workers", type=whole(), metavar="N", help="worker processes (default: one a core)"
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    """Add the options of `data build`: which files, how they are read, which documents stay."""
    parser.add_argument(
        "--suffix",
        nargs="+",
        default=TEXT_ENDINGS,
        metavar="END",
        help=f"endings of files to take from directories (default {' '.join(TEXT_ENDINGS)}; each "
        "also .gz)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=EXCLUDED_FOLDERS,
        metavar="NAME",
        help=f"folders to leave out by name (default {' '.join(EXCLUDED_FOLDERS)}); hidden "
        "folders are always left out",
    )
    parser.add_argument(
        "--prefix",
        default="",
        help="put before every line of a list file, e.g. https://data.commoncrawl.org/",
    )
    add_allow(parser)
    choices = {name: source.choice for name, source in SOURCES.items() if source.choice}
    parser.add_argument(
        "--documents",
        choices=tuple(choices),
        default="auto",
        help="what a document is in files that no other ending names; "
        + "; ".join(f"{name}: {text}" for name, text in choices.items()),
    )
    for source in SOURCES.values():
        _add_options(parser, source.options)
    for kind in OWN_BUILDS.values():
        if not kind.command:
            _add_options(parser, kind.options)
    parser.add_argument(
        "--page-seconds",
        type=real(0),
        default=20,
        metavar="S",
        help="most CPU time a page may take (default 20)",
    )
    parser.add_argument(
        "--language",
        metavar="CODE",
        help="keep documents in this language, e.g. en, or any (default any; for WARC en)",
    )
    parser.add_argument(
        "--quality",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="drop what is not prose by the rules of Gopher and C4 (default no; for WARC yes)",
    )
    parser.add_argument(
        "--dedup",
        choices=("none", "exact", "near"),
        help="drop equal, or also similar documents (default none; for WARC near)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=whole(),
        default=1 << 28,
        metavar="N",
        help="text in a shard (default 268435456)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, MOST_SEED),
        default=0,
        help="draws the lines that train the tokenizer (default 0)",
    )


def _add_options(parser: argparse.ArgumentParser, options: Options) -> None:
    for flag, keywords in options.items():
        parser.add_argument(flag, **keywords)


def run_build(args: argparse.Namespace) -> dict:
    """Build a data folder and print its report."""
    from memshard.data_pipeline.prepare.documents import Filters
    from memshard.data_pipeline.prepare.inputs.files import Sources, find_files
    from memshard.data_pipeline.prepare.pipeline import build_data

    for kind in OWN_BUILDS.values():
        # An input without a command of its own is chosen by its flag, such as --images.
        if not kind.command and getattr(args, kind.name):
            return run_own(kind, args)
    began = time.perf_counter()
    passed_over: Counter[str] = Counter()
    with usage_errors():
        sources = Sources(
            find_files(
                args.sources, args.suffix, args.exclude, args.prefix, passed_over, args.allow
            ),
            args.documents,
            {name: getattr(args, name) for name in DEFAULTS},
            passed_over,
        )
        # Not in the parser: what was not said depends on the sources, which are known only now.
        dedup = args.dedup or ("near" if sources.web else "none")
        near = dedup == "near"
        report = build_data(
            sources,
            args.out,
            vocab_size=args.vocab,
            model=args.model,
            tokenizer=args.tokenizer,
            filters=Filters(
                language(args, "any"),
                bool(args.quality),
                near,
                web=Filters(language(args, "en"), args.quality is not False, near),
            ),
            deduplicate=dedup != "none" and (args.dedup is not None or "web"),
            held_out=args.held_out,
            test=args.test,
            web=sources.web,
            shard_bytes=args.shard_bytes,
            seed=args.seed,
            page_seconds=args.page_seconds,
            workers=args.workers,
        )
    result = {"data": args.out, "seconds": round(time.perf_counter() - began, 1), **report}
    if not args.json:
        show(result)
    return result


def language(args: argparse.Namespace, default: str) -> str | None:
    """Return the language to keep, None for any."""
    code: str = args.language or default
    return None if code == "any" else code


def run_own(kind: OwnBuild, args: argparse.Namespace) -> dict:
    """Build a data folder from an input that is not documents, and print its report."""
    began = time.perf_counter()
    # By name, so that Pillow is needed for images only.
    module = import_module(kind.module)
    with usage_errors():
        report = module.build(args)
    result = {"data": args.out, "seconds": round(time.perf_counter() - began, 1), **report}
    if not args.json:
        print(module.describe(result))
    return result


def show(report: dict) -> None:
    """Print a build's report as a table."""
    from memshard.data_pipeline.prepare.inputs.files import count_endings
    from memshard.data_pipeline.prepare.report import NOT_UTF8

    print(
        f"{report['data']}: built in {report['seconds']} s, vocabulary of {report['vocabulary']:,}"
    )
    first = f", e.g. {report['files_not_utf8_first'][0]}" if report["files_not_utf8"] else ""
    print(
        f"  files      {report['files']:,} read, {report['files_not_utf8']:,} of them skipped "
        f"({NOT_UTF8 if first else 'not UTF-8 text'}{first})"
    )
    if report["files_passed_over"]:
        print(f"  passed over in folders: {count_endings(report['files_passed_over'])}")
    if report["archive"]:
        print(
            "  archives   "
            f"{', '.join(f'{name} {number:,}' for name, number in report['archive'].items())}"
        )
    if any(report["faults"].values()):
        faults = [f"{name} {number:,}" for name, number in report["faults"].items() if number]
        print(f"  faults     {', '.join(faults)}")
    print(
        f"  documents  {report['documents']:,} kept ({report['documents_cut']:,} long ones cut), "
        "left out: "
        f"{report['documents_empty']:,} empty, {report['documents_invalid']:,} invalid"
    )
    if len(report["stages"]) > 1:
        print(f"  {'stage':<28}{'documents':>12}{'bytes':>18}")
        for name, stage in report["stages"].items():
            what = "in" if name in ("pages", "text") else "left out"
            print(f"  {name:<19}{what:>9}{stage['documents']:>12,}{stage['bytes']:>18,}")
    print(
        f"  {'split':<9}{'documents':>12}{'tokens':>16}{'text bytes':>16}{'words':>14}"
        f"{'bytes/token':>13}{'shards':>8}"
    )
    for name, split in report["splits"].items():
        print(
            f"  {name:<9}{split['documents']:>12,}{split['tokens']:>16,}{split['text_bytes']:>16,}"
            f"{split['words']:>14,}"
            f"{split['bytes_per_token'] or 0:>13.2f}{split['shards']:>8,}"
        )


def run_verify(args: argparse.Namespace) -> dict:
    """Check a data folder and print its totals."""
    from memshard.data_pipeline.format.verify import verify_data

    with usage_errors():
        result = verify_data(args.path)
    if not args.json:
        print(
            f"{args.path}: {result['shards']} shards, {result['bytes']:,} bytes, every hash and "
            "count is right"
        )
    return result
