"""The report of a build: what went into each of its stages and what was left out."""

import logging
from collections import Counter
from collections.abc import Mapping

from memshard.data_pipeline.format.index import HELD_OUT, TEST, Index, Split

READ = (
    "records",
    "responses",
    "resources",
    "conversions",
    "status",
    "not_html",
    "empty_body",
    "too_large",
    "skipped_bytes",
)
STAGES = (
    "pages",
    "page_large",
    "page_timeout",
    "page_failed",
    "page_language",
    "page_empty",
    "text",
    "language",
    "timeout",
    "quality",
    "exact_duplicate",
    "near_duplicate",
)

log = logging.getLogger(__name__)
FEW_TOKENS = 1000
SPREAD = 3.0  # nats: the standard deviation of a token's loss, roughly, whatever the model
PASSED_OVER = 20  # endings listed
NOT_UTF8 = "not UTF-8 text: name its encoding, e.g. --encoding latin-1 or utf-16-le"


def make_report(
    files: int,
    passed_over: Mapping[str, int],
    not_utf8: list[str],
    counts: Counter[str],
    index: Index,
) -> dict:
    """Return the content of report.json. Its stages are the documents and bytes that a stage took
    in (pages, text) or left out (all others).
    """
    stages = {
        name: {"documents": counts[f"{name}.documents"], "bytes": counts[f"{name}.bytes"]}
        for name in dict.fromkeys(
            key.rpartition(".")[0]
            for key in sorted(counts, key=_place)
            if key.endswith(".documents")
        )
        # What was kept is in the splits already.
        if name != "kept"
    }
    return {
        "files": files,
        "files_passed_over": _most_common(passed_over),
        "files_not_utf8": len(not_utf8),
        "files_not_utf8_first": not_utf8[:20],
        "documents": sum(split.documents for split in index.splits.values()),
        "documents_empty": counts["empty"],
        "documents_invalid": counts["invalid"],
        "documents_cut": counts["cut"],
        "archive": {name: counts[name] for name in READ if counts[name]},
        "faults": {
            name.removeprefix("fault_"): counts[name]
            for name in sorted(counts)
            if name.startswith("fault_")
        },
        "stages": stages,
        "vocabulary": index.vocab_size,
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "text_bytes": split.text_bytes,
                "words": split.words,
                "bytes_per_token": round(split.text_bytes / split.tokens, 4)
                if split.tokens
                else None,
                "shards": len(split.shards),
            }
            for name, split in index.splits.items()
        },
    }


def warn_of_little(splits: Mapping[str, Split]) -> None:
    """Log a warning for each split to evaluate on whose loss would be mostly chance."""
    for name in (HELD_OUT, TEST):
        tokens = splits[name].tokens if name in splits else FEW_TOKENS
        if tokens < FEW_TOKENS:
            log.warning(
                "the %s split has %d tokens, few for a loss (known to about %.2f nats): build from "
                "more text, or keep more of it with --%s, e.g. 0.1",
                name,
                tokens,
                SPREAD / max(tokens, 1) ** 0.5,
                "held-out" if name == HELD_OUT else name,
            )


def _most_common(passed_over: Mapping[str, int]) -> dict[str, int]:
    first = dict(Counter(passed_over).most_common(PASSED_OVER))
    others = sum(passed_over.values()) - sum(first.values())
    return first | ({"others": others} if others else {})


def _place(key: str) -> tuple[int, str]:
    name = key.rpartition(".")[0]
    # A stage may name a rule after a dot, as in quality.RULE; it is sorted under its stage.
    order = (
        STAGES.index(name.partition(".")[0]) if name.partition(".")[0] in STAGES else len(STAGES)
    )
    return order, name
