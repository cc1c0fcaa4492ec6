"""Main-text extraction against gold article bodies: precision, recall and F1 of 4-grams, mean over
pages.

    memshard bench extraction --pages news_pages*.warc.gz --truth news_pages.truth.jsonl \\
        --gold ground-truth.json.gz

The score of scrapinghub's article-extraction-benchmark: multisets of 4-grams of words. --truth maps
the URLs of the WARC files to the ids of the gold bodies, by the name of the original file.
"""

import argparse
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from memshard.data_pipeline.web.charset import decode
from memshard.data_pipeline.web.extract import Extractor, main_text
from memshard.data_pipeline.web.warc import read_pages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--pages", nargs="+", type=Path, required=True, metavar="FILE", help="WARC files"
    )
    parser.add_argument(
        "--truth",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with the url and the path of each page",
    )
    parser.add_argument(
        "--gold",
        type=Path,
        required=True,
        metavar="FILE",
        help="gzipped JSON of gold bodies: id -> articleBody",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extract every page that has a gold text with each extractor, and score the texts."""
    pages = gold_pages(args.pages, args.truth, args.gold)
    if not pages:
        raise ValueError(f"{args.pages[0]}: no page in these files has a gold text in {args.gold}")
    extractors: tuple[Extractor, ...] = ("trafilatura", "resiliparse")
    result: dict[str, Any] = {"pages": len(pages)}
    for extractor in extractors:
        begun = time.process_time()
        texts = [(main_text(decode(body), extractor), gold) for body, gold in pages]
        rate = len(pages) / (time.process_time() - begun)
        precision, recall, f1 = score(texts)
        result[extractor] = {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "pages_per_s": rate,
        }
    return result


def show(result: dict[str, Any]) -> None:
    """Print a line for each extractor."""
    for extractor in ("trafilatura", "resiliparse"):
        row = result[extractor]
        print(
            f"{extractor:<12} {result['pages']} pages  P {row['precision']:.3f}  "
            f"R {row['recall']:.3f}  F1 {row['f1']:.3f}  "
            f"{row['pages_per_s']:.0f} pages/s of CPU time"
        )


def gold_pages(warcs: Iterable[Path], truth: Path, gold: Path) -> list[tuple[bytes, str]]:
    """Return the bodies of the pages that have a gold text, each with that text."""
    with gzip.open(gold, "rt", encoding="utf-8") as stream:
        texts = {key: value["articleBody"] for key, value in json.load(stream).items()}
    ids = {}
    with truth.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            # Gold bodies are named after the files that the pages once were, up to the first dot.
            ids[record["url"]] = Path(record["path"]).name.partition(".")[0]
    bodies = {}
    for warc in warcs:
        for page in read_pages(warc, Counter()):
            if ids.get(page.url) in texts:
                bodies[ids[page.url]] = bytes(page.body)
    return [(body, texts[key]) for key, body in sorted(bodies.items())]


def score(texts: Iterable[tuple[str, str]]) -> tuple[float, float, float]:
    """Return precision, recall and F1 over pairs of extracted and gold texts.

    Each page's counts enter as shares of its n-grams, so that long pages weigh no more than others.
    """
    hits, extracted_shares, gold_shares = [], [], []
    for extracted, gold in texts:
        a, b = ngrams(extracted), ngrams(gold)
        # Of multisets: & takes the smaller count of each n-gram, the hits; | the larger, which
        # makes hits + misses + false ones. At least 1, where both texts are empty.
        true, total = (a & b).total(), max((a | b).total(), 1)
        hits.append(true / total)
        extracted_shares.append(a.total() / total)
        gold_shares.append(b.total() / total)
    # The mean of the shares first, then one ratio, as the benchmark's own script has it: a page
    # without extracted text has no precision of its own.
    precision = mean(hits) / max(mean(extracted_shares), 1e-9)
    recall = mean(hits) / max(mean(gold_shares), 1e-9)
    return precision, recall, 2 * precision * recall / (precision + recall)


def ngrams(text: str) -> Counter[tuple[str, ...]]:
    """Return the 4-grams of words of a text; a shorter text is one n-gram."""
    words = re.findall(r"\w+", text)
    # n - 3 of n words; 1 of one to three words (a slice beyond the end is shorter), 0 of none.
    return Counter(
        tuple(words[place : place + 4]) for place in range(max(len(words) - 3, min(len(words), 1)))
    )
