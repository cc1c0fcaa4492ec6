"""The inputs of `memshard data`, one row each.

Adding one takes a file and a row here: the command line offers its options, `data build` finds its
files in folders, and the build reads them. Most inputs are documents of text (`SOURCES`), which all
go through the same filters, tokenizer and shards. What is something else has a build of its own
(`OWN_BUILDS`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memshard.data_pipeline.prepare.inputs.encodings import known_encoding

MAX_DOCUMENT = 65_536
"""Characters; longer documents are cut, so that one big file spreads over lanes and splits."""

Options = Mapping[str, Mapping[str, Any]]
"""Command line options: flag -> keyword arguments of argparse's add_argument."""

# ASCII's record separator, which no text has a use for.
PAIR = "\x1e"
"""Between the sentences of a pair until they are tokens; then it is an <eos>."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of documents.

    read: "module:function"; function(files, options, counts, watch) yields the documents of one
    file, or of `unit` files that belong together, as strings. `options` maps names, as argparse
    makes them of the flags, to values, and holds `language`, `longest`, the most characters of a
    document, and `encodings`, those of the files if they are text; what is left out is counted in
    `counts`; a step that may hang runs under `watch.item(number)`.

    endings: of files to take from folders, each also with .gz. named: endings of files that are
    read so where they are named, but not taken from folders. begins: how a file begins, for those
    whose name says nothing. choice: for what `--documents NAME` says of files that no other source
    has the ending of; None if only ending or beginning choose it.
    takes_all: with `--documents NAME`, every file is of this kind, whatever its ending.

    unit: files read together; None is as many small ones as make a unit of work. takes: what these
    files are, for an error. is_text: leave out, and report, files that are neither UTF-8 nor in
    the encoding that the user names. timed: items are under the limit of --page-seconds. web: text
    of the open web, which by default is filtered. packages: those whose versions decide what is
    read. record_kind: of the data folder (`format/kinds.py`). separator: between the texts of a
    record.
    """

    name: str
    read: str
    endings: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    begins: re.Pattern[bytes] | None = None
    choice: str | None = None
    takes_all: bool = False
    options: Options = field(default_factory=dict)
    unit: int | None = None
    takes: str = ""
    is_text: bool = True
    timed: bool = False
    web: bool = False
    packages: tuple[str, ...] = ()
    record_kind: str = "text"
    separator: str | None = None


@dataclass(frozen=True, kw_only=True)
class OwnBuild:
    """An input that is not documents of text.

    module: its file, with build(args) -> report and describe(report) -> str for people. command: a
    command of its own under `memshard data`, with this help, and `takes` as the help of its inputs;
    None for `memshard data build --NAME`.
    """

    name: str
    module: str
    options: Options
    command: str | None = None
    help: str = ""
    takes: str = ""


# Names of functions, not functions: the command line lists its options without importing readers,
# whose packages may be missing.
_TEXT = "memshard.data_pipeline.prepare.inputs.text"
SOURCES = {
    source.name: source
    for source in (
        Source(
            name="auto",
            read=f"{_TEXT}:read_articles_or_file",
            endings=(".txt", ".text", ".md", ".rst", ".py"),
            choice="articles if the file begins with '<doc ', else the whole file (default)",
            options={
                "--encoding": {
                    "default": None,
                    "type": known_encoding,
                    "metavar": "NAME",
                    "help": "of text files that are not UTF-8, e.g. latin-1 (default: leave them "
                    "out)",
                }
            },
        ),
        Source(name="file", read=f"{_TEXT}:read_file", choice="the whole file"),
        Source(name="line", read=f"{_TEXT}:read_each_line", choice="a line"),
        Source(
            name="wikiextractor",
            read=f"{_TEXT}:read_wikiextractor",
            choice="an article of WikiExtractor's output",
        ),
        Source(
            name="jsonl",
            read="memshard.data_pipeline.prepare.inputs.jsonl:read",
            endings=(".jsonl", ".ndjson"),
            named=(".json",),
            begins=re.compile(rb"(\xef\xbb\xbf)?\s*(\{\s*\"|\[\s*[\[{\"])"),
            options={
                "--text-key": {
                    "default": "text",
                    "metavar": "KEY",
                    "help": "key of the text in jsonl (default text)",
                }
            },
        ),
        Source(
            name="warc",
            read="memshard.data_pipeline.prepare.inputs.warc:read",
            endings=(".warc", ".arc", ".wet"),
            begins=re.compile(rb"\s*WARC/\d|filedesc:"),
            options={
                "--extractor": {
                    "choices": ("trafilatura", "resiliparse"),
                    "default": "trafilatura",
                    "help": "finds the article in a page: trafilatura (default, better) or "
                    "resiliparse (7 times as fast)",
                }
            },
            unit=1,
            is_text=False,
            timed=True,
            web=True,
            packages=("Resiliparse", "trafilatura", "py3langid"),
        ),
        Source(
            name="pairs",
            read="memshard.data_pipeline.prepare.inputs.pairs:read",
            choice="SRC are source and target files in turn, a sentence pair a line",
            takes_all=True,
            unit=2,
            takes="source and target files in turn",
            record_kind="pairs",
            separator=PAIR,
        ),
    )
}

OWN_BUILDS = {
    build.name: build
    for build in (
        OwnBuild(
            name="images",
            module="memshard.data_pipeline.prepare.images",
            options={
                "--images": {
                    "action": "store_true",
                    "help": "SRC are folders of images: one record an image, a token a colour "
                    "value",
                },
                "--image-size": {
                    "type": int,
                    "default": 32,
                    "metavar": "N",
                    "help": "pixels of an image's side (default 32)",
                },
                "--gray": {"action": "store_true", "help": "images in shades of gray"},
            },
        ),
        OwnBuild(
            name="raw",
            module="memshard.data_pipeline.prepare.index_tars",
            command="index",
            help="use existing WebDataset tars of text as they are; they are tokenised when they "
            "are read",
            takes="uncompressed tar on this machine, or a folder of them; the data folder links to "
            "it",
            options={
                "--member": {
                    "default": "txt",
                    "metavar": "END",
                    "help": "ending of the members that are text (default txt)",
                }
            },
        ),
    )
}

ARCHIVE = (
    "part of a web archive that is not read (WAT, CDX): name the WARC, WET or ARC files of the "
    "crawl"
)
ARCHIVE_BEGINS = (b" CDX ",)
TABLE = (
    "a table: write its texts as jsonl, e.g. with pandas: read_csv(FILE).to_json("
    '"texts.jsonl", orient="records", lines=True), or take it as it is with --documents line'
)
MARKUP = (
    "markup (HTML or XML): extract its text, or take it as it is, tags and all, with "
    "--documents file"
)
MARKUP_BEGINS = re.compile(rb"(?i)(\xef\xbb\xbf)?\s*<(\?xml|!doctype html|html|mediawiki)\b")
REFUSED = {
    (".wat", ".cdx", ".cdxj"): ARCHIVE,
    (".csv", ".tsv"): TABLE,
    (
        ".parquet",
        ".arrow",
        ".feather",
    ): "a table, which is not read: write its texts as jsonl, e.g. "
    "with datasets: load_dataset(...)[SPLIT].to_json(FILE)",
    (
        ".zst",
        ".bz2",
        ".xz",
        ".lz4",
        ".zip",
        ".7z",
        ".tar",
        ".tgz",
    ): "compressed as only .gz is read: give the command that prints it, e.g. pipe:'zstd -dc FILE'",
}
"""What other files are that a name may tell, by their endings, and what to do."""

TEXT_ENDINGS = tuple(ending for source in SOURCES.values() for ending in source.endings)
EXCLUDED_FOLDERS = ("site-packages", "dist-packages")
DEFAULTS: dict[str, Any] = {
    flag.removeprefix("--").replace("-", "_"): keywords["default"]
    for source in SOURCES.values()
    for flag, keywords in source.options.items()
}
"""Of the sources' options, by the names that argparse gives them."""
