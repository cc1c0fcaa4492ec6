"""The tables of a study of memories: perplexity, gain, usage and KL; times."""

import statistics
from pathlib import Path
from typing import Any

from memshard.experiments.common.catalogue import Point
from memshard.experiments.common.repeated import mean_deviation, median_range, seeds
from memshard.experiments.pkm.picture import KINDS, draw, ratios_to_first

Rows = list[tuple[Point, dict[str, Any]]]


def report(rows: Rows, folder: Path, name: str) -> str:
    """Return the tables in Markdown, and draw `name`.png in the folder."""
    learned: dict[str, list[dict[str, Any]]] = {}
    published: dict[str, str] = {}
    for point, result in rows:
        if "clock" not in point:
            learned.setdefault(point["label"], []).append(result)
            published[point["label"]] = point["published"]
    clocks = [(point, result) for point, result in rows if "clock" in point]
    first, *_ = learned
    # Also compare with the largest model without a table, the best one of equally large ones: it is
    # what the parameters of memories could have been spent on instead.
    plain = [label for label, results in learned.items() if not results[0]["table"]]
    largest = max(
        plain,
        key=lambda label: (
            learned[label][0]["dense"],
            -statistics.mean(r["loss"] for r in learned[label]),
        ),
        default=first,
    )
    bases = list(dict.fromkeys((first, largest)))
    speed = clocks[0][1]["inference"] if clocks else {}
    made = learned[first][0]
    other_rates = [
        f"; {label} {results[0]['table_lr']:g}"
        for label, results in learned.items()
        if results[0]["table_lr"] != made["table_lr"]
    ]
    rates = f"{made['lr']:g} (dense) and {made['table_lr']:g} (tables{''.join(other_rates)})"
    text = (
        f"{made['trained_tokens'] / 1e6:.1f} million tokens, learning rates {rates}; "
        f"{made['tokens']:,} held-out tokens.\n"
    )
    text += (
        "Perplexity, gain (nats a token, seed by seed), usage and KL: "
        f"{seeds(len(learned[first]))}.{' Inference: us a token.' if speed else ''}\n\n"
    )
    titles = [
        "model",
        "perplexity",
        *(f"gain over {base}" for base in bases),
        "inference",
        "dense",
        "table",
        "usage",
        "KL",
        "published",
    ]
    table = []
    for label, results in learned.items():
        cells = [label, mean_deviation([result["perplexity"] for result in results], ".2f")]
        for base in bases:
            # Seed by seed: both had the data in the same order, and its part of the loss cancels.
            gains = [
                other["loss"] - result["loss"]
                for other, result in zip(learned[base], results, strict=True)
            ]
            cells.append("" if label == base else mean_deviation(gains, "+.4f"))
        cells.append(f"{statistics.median(speed[label]):.0f}" if label in speed else "")
        cells += [f"{results[0][kind] / 1e6:.2f} M" for kind in ("dense", "table")]
        used = "usage" in results[0]
        cells.append(
            mean_deviation([100 * result["usage"] for result in results], ".1f") + " %"
            if used
            else ""
        )
        cells.append(
            mean_deviation([result["kl_weighted"] for result in results], ".2f") if used else ""
        )
        table.append([*cells, published[label]])
    # Columns that no row fills, such as usage in a study without memories, are left out.
    shown = [column for column in zip(titles, *table, strict=True) if any(column[1:])]
    head, *lines = zip(*shown, strict=True)
    text += f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n" + "".join(
        f"| {' | '.join(line)} |\n" for line in lines
    )
    for point, result in clocks:
        text += "\n" + _clock_table(point, result)
    draw(learned, clocks, folder / f"{name}.png")
    return text + f"\n![{name}]({name}.png)\n"


def _clock_table(point: Point, result: dict[str, Any]) -> str:
    """Return a table of times and of their ratios to the first model's, round by round."""
    first, *_ = point["models"]
    text = (
        f"{point['title']}: us a token, medians of {point['clock']} interleaved rounds; "
        f"ratios to {first}, round by round (range).\n\n"
    )
    text += "| model | training | ratio | inference | ratio |\n|---|---|---|---|---|\n"
    ratios = {kind: ratios_to_first(result[kind], first) for kind in KINDS}
    for label in point["models"]:
        cells = [label]
        for kind in KINDS:
            of = ratios[kind].get(label, [])
            cells.append(f"{statistics.median(result[kind][label]):.0f}" if of else "")
            cells.append(median_range(of, ".2f") if of else "")
        text += f"| {' | '.join(cells)} |\n"
    return text
