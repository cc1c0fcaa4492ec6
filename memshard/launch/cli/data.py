"""`memshard data build` and `memshard data verify`."""

import argparse
import time

from memshard.data_pipeline.prepare.inputs import EXCLUDED_FOLDERS, TEXT_SUFFIXES
from memshard.launch.cli.outcome import usage_errors


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `data` command with its two subcommands."""
    data = subparsers.add_parser("data", help="turn text into token shards, or check them")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="build|index|verify")

    build = commands.add_parser(
        "build",
        help="WARC, text, jsonl (also .gz), folders or URLs of them -> shards, index, tokenizer",
    )
    build.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="WARC, text or jsonl file, glob, directory, http(s)/s3 URL, pipe:COMMAND, or list "
        "file (*.paths); each also .gz",
    )
    build.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty"
    )
    build.add_argument(
        "--vocab", type=int, default=8192, help="pieces in the vocabulary (default 8192)"
    )
    build.add_argument(
        "--model",
        choices=("bpe", "unigram"),
        default="bpe",
        help="kind of tokenizer (default bpe, quicker to train)",
    )
    build.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="take this tokenizer (model file or data folder), train none",
    )
    build.add_argument(
        "--held-out",
        type=float,
        metavar="AMOUNT",
        help="kept for evaluation: share of the documents or a number (default 0.01; WARC 5000, "
        "at most 1 %%)",
    )
    build.add_argument(
        "--test",
        type=float,
        metavar="AMOUNT",
        help="kept for a final test, likewise (default none; WARC: as --held-out)",
    )
    build.add_argument(
        "--suffix",
        nargs="+",
        default=TEXT_SUFFIXES,
        metavar="END",
        help=f"endings of files to take from directories (default {' '.join(TEXT_SUFFIXES)}; each "
        "also .gz)",
    )
    build.add_argument(
        "--exclude",
        nargs="+",
        default=EXCLUDED_FOLDERS,
        metavar="NAME",
        help=f"folders to leave out by name (default {' '.join(EXCLUDED_FOLDERS)}); hidden "
        "folders are always left out",
    )
    build.add_argument(
        "--prefix",
        default="",
        help="put before every line of a list file, e.g. https://data.commoncrawl.org/",
    )
    build.add_argument(
        "--documents",
        choices=("auto", "file", "line", "wikiextractor", "pairs"),
        default="auto",
        help="what a document is in a text file (default auto: articles if the file begins with "
        "'<doc ', else the whole file); "
        "pairs: SRC are source and target files in turn, a sentence pair a line",
    )
    build.add_argument(
        "--images",
        action="store_true",
        help="SRC are folders of images: one record an image, a token a colour value",
    )
    build.add_argument(
        "--image-size",
        type=int,
        default=32,
        metavar="N",
        help="pixels of an image's side (default 32)",
    )
    build.add_argument("--gray", action="store_true", help="images in shades of gray")
    build.add_argument(
        "--text-key", default="text", metavar="KEY", help="key of the text in jsonl (default text)"
    )
    build.add_argument(
        "--extractor",
        choices=("trafilatura", "resiliparse"),
        default="trafilatura",
        help="finds the article in a page: trafilatura (default, better) or resiliparse (7 times "
        "as fast)",
    )
    build.add_argument(
        "--page-seconds",
        type=float,
        default=20,
        metavar="S",
        help="most CPU time a page may take (default 20)",
    )
    build.add_argument(
        "--language",
        metavar="CODE",
        help="keep documents in this language, e.g. en, or any (default any; for WARC en)",
    )
    build.add_argument(
        "--quality",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="drop what is not prose by the rules of Gopher and C4 (default no; for WARC yes)",
    )
    build.add_argument(
        "--dedup",
        choices=("none", "exact", "near"),
        help="drop equal, or also similar documents (default none; for WARC near)",
    )
    build.add_argument(
        "--shard-bytes",
        type=int,
        default=1 << 28,
        metavar="N",
        help="text in a shard (default 268435456)",
    )
    build.add_argument(
        "--seed", type=int, default=0, help="draws the lines that train the tokenizer (default 0)"
    )
    build.add_argument(
        "--workers", type=int, metavar="N", help="worker processes (default: one a core)"
    )
    build.set_defaults(run=run_build)

    index = commands.add_parser(
        "index",
        help="use existing WebDataset tars of text as they are; they are tokenised when they are "
        "read",
    )
    index.add_argument("sources", nargs="+", metavar="TAR", help="uncompressed tar on this machine")
    index.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write; it will hold links to the tars",
    )
    index.add_argument(
        "--member",
        default="txt",
        metavar="END",
        help="ending of the members that are text (default txt)",
    )
    index.add_argument(
        "--vocab", type=int, default=8192, help="pieces in the vocabulary (default 8192)"
    )
    index.add_argument(
        "--model", choices=("bpe", "unigram"), default="bpe", help="kind of tokenizer (default bpe)"
    )
    index.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="take this tokenizer (model file or data folder), train none",
    )
    index.add_argument(
        "--held-out",
        type=float,
        default=0.01,
        metavar="AMOUNT",
        help="kept for evaluation: share or number (default 0.01)",
    )
    index.add_argument(
        "--test",
        type=float,
        default=0,
        metavar="AMOUNT",
        help="kept for a final test, likewise (default none)",
    )
    index.add_argument(
        "--workers", type=int, metavar="N", help="worker processes (default: one a core)"
    )
    index.set_defaults(run=run_index)

    verify = commands.add_parser("verify", help="re-hash every shard and check every count")
    verify.add_argument("path", metavar="DIR", help="folder that `memshard data build` wrote")
    verify.set_defaults(run=run_verify)


def run_build(args: argparse.Namespace) -> dict:
    """Build a data folder and print its report."""
    from memshard.data_pipeline.prepare.documents import Filters
    from memshard.data_pipeline.prepare.inputs import Sources, find_files, is_warc
    from memshard.data_pipeline.prepare.pipeline import build_data

    began = time.perf_counter()
    if args.images:
        return _build_images(args, began)
    with usage_errors():
        sources = Sources(
            find_files(args.sources, args.suffix, args.exclude, args.prefix),
            args.documents,
            args.text_key,
        )
        web = any(map(is_warc, sources.files))
        dedup = args.dedup or ("near" if web else "none")
        language = args.language or ("en" if web else "any")
        quality = web if args.quality is None else args.quality
        report = build_data(
            sources,
            args.out,
            vocab_size=args.vocab,
            model=args.model,
            tokenizer=args.tokenizer,
            filters=Filters(
                args.extractor, None if language == "any" else language, quality, dedup == "near"
            ),
            deduplicate=dedup != "none",
            held_out=args.held_out,
            test=args.test,
            web=web,
            shard_bytes=args.shard_bytes,
            seed=args.seed,
            page_seconds=args.page_seconds,
            workers=args.workers,
        )
    result = {"data": args.out, "seconds": round(time.perf_counter() - began, 1), **report}
    if not args.json:
        show(result)
    return result


def _build_images(args: argparse.Namespace, began: float) -> dict:
    from pathlib import Path

    from memshard.data_pipeline.prepare.images import IMAGE_SUFFIXES, build_images
    from memshard.data_pipeline.prepare.inputs import find_files

    with usage_errors():
        files = [Path(file) for file in find_files(args.sources, IMAGE_SUFFIXES, args.exclude)]
        report = build_images(
            files,
            args.out,
            size=args.image_size,
            gray=args.gray,
            held_out=args.held_out or 0.01,
            test=args.test or 0,
            workers=args.workers,
        )
    result = {"data": args.out, "seconds": round(time.perf_counter() - began, 1), **report}
    if not args.json:
        splits = ", ".join(
            f"{name} {split['documents']:,} ({split['tokens']:,} tokens)"
            for name, split in report["splits"].items()
        )
        print(
            f"{args.out}: {report['images']:,} images ({report['equal']:,} files equal to "
            f"another) in {result['seconds']} s: {splits}"
        )
    return result


def show(report: dict) -> None:
    """Print a build's report as a table."""
    print(
        f"{report['data']}: built in {report['seconds']} s, vocabulary of {report['vocabulary']:,}"
    )
    print(
        f"  files      {report['files']:,} read, {report['files_not_utf8']:,} of them skipped "
        "(not UTF-8 text)"
    )
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


def run_index(args: argparse.Namespace) -> dict:
    """Index tars of text and print what they hold."""
    from pathlib import Path

    from memshard.data_pipeline.prepare.index_tars import index_tars
    from memshard.data_pipeline.prepare.inputs import find_files

    with usage_errors():
        tars = [Path(file) for file in find_files(args.sources, (".tar",))]
        report = index_tars(
            tars,
            args.out,
            suffix=args.member,
            vocab_size=args.vocab,
            model=args.model,
            tokenizer=args.tokenizer,
            held_out=args.held_out,
            test=args.test,
            workers=args.workers,
        )
    if not args.json:
        splits = ", ".join(
            f"{name} {split['documents']:,} ({split['tokens']:,} tokens)"
            for name, split in report["splits"].items()
        )
        print(f"{args.out}: {splits}")
        print(
            "  the text is tokenised again in every epoch, at some 1 million tokens/s a core: set "
            "data.workers, or build token shards"
        )
    return {"data": args.out, **report}


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
