"""Main-text extraction against gold article bodies: precision, recall and F1 of 4-grams, mean over
pages.

    python -m memshard.bench.extraction --pages news_pages-*.warc.gz --truth news_pages.truth.jsonl
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

from memshard.data_pipeline.web.extract import Extractor, decode, main_text
from memshard.data_pipeline.web.warc import read_pages


def main() -> None:
    """Print one line an extractor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", nargs="+", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--gold", type=Path, required=True)
    args = parser.parse_args()
    pages = gold_pages(args.pages, args.truth, args.gold)
    extractors: tuple[Extractor, ...] = ("trafilatura", "resiliparse")
    for extractor in extractors:
        begun = time.process_time()
        texts = [(main_text(decode(body), extractor), gold) for body, gold in pages]
        rate = len(pages) / (time.process_time() - begun)
        precision, recall, f1 = score(texts)
        print(
            f"{extractor:<12} {len(pages)} pages  P {precision:.3f}  R {recall:.3f}  F1 {f1:.3f}  "
            f"{rate:.0f} pages/s of CPU time"
        )


def gold_pages(warcs: Iterable[Path], truth: Path, gold: Path) -> list[tuple[bytes, str]]:
    """Bodies of the pages that have a gold text, with that text."""
    with gzip.open(gold, "rt", encoding="utf-8") as stream:
        texts = {key: value["articleBody"] for key, value in json.load(stream).items()}
    ids = {}
    for line in truth.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        ids[record["url"]] = Path(record["path"]).name.partition(".")[0]
    found = {}
    for warc in warcs:
        for page in read_pages(warc, Counter()):
            if ids.get(page.url) in texts:
                found[ids[page.url]] = page.body
    return [(body, texts[key]) for key, body in sorted(found.items())]


def score(texts: Iterable[tuple[str, str]]) -> tuple[float, float, float]:
    """Precision, recall and F1 over (found, gold) texts: each page's counts as shares, summed over
    pages.
    """
    hits, found_sum, gold_sum = [], [], []
    for found, gold in texts:
        a, b = ngrams(found), ngrams(gold)
        true, total = (a & b).total(), max((a | b).total(), 1)
        hits.append(true / total)
        found_sum.append(a.total() / total)
        gold_sum.append(b.total() / total)
    precision, recall = (
        mean(hits) / max(mean(found_sum), 1e-9),
        mean(hits) / max(mean(gold_sum), 1e-9),
    )
    return precision, recall, 2 * precision * recall / (precision + recall)


def ngrams(text: str) -> Counter[tuple[str, ...]]:
    """4-grams of words; a shorter text is one n-gram."""
    words = re.findall(r"\w+", text)
    return Counter(
        tuple(words[place : place + 4]) for place in range(max(len(words) - 3, min(len(words), 1)))
    )


if __name__ == "__main__":
    main()
