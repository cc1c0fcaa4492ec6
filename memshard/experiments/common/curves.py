"""The pictures of experiments. Needs matplotlib (extra `eval`)."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from memshard.trainer.evaluation.canvas import COLORS, canvas, clean


def lines(
    measured: Mapping[str, Mapping[int, Sequence[float]]],
    published: Mapping[str, Mapping[int, float]],
    file: Path,
    x: str,
    y: str,
    logarithmic: Literal["x", "y"] = "y",
    unfinished: Collection[tuple[str, int]] = (),
    solved: float | None = None,
) -> None:
    """Draw curves, label -> {x: ys}: their median as a line and their range as a band.

    published: label -> {x: y}, drawn as hollow dots of the same color. logarithmic: the axis that
    is. unfinished: (label, x) of runs cut short, crossed out. solved: the y below which runs end,
    a dotted line.
    """
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for number, (label, curve) in enumerate(measured.items()):
        color = COLORS[number % len(COLORS)]
        places = sorted(curve)
        values = [curve[place] for place in places]
        middles = [statistics.median(ys) for ys in values]
        # The range: a deviation of two or three seeds says little.
        axes.fill_between(
            places,
            [min(ys) for ys in values],
            [max(ys) for ys in values],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            places, middles, color=color, linewidth=1.8, marker="o", markersize=3, label=label
        )
        short = [
            (place, middle)
            for place, middle in zip(places, middles, strict=True)
            if (label, place) in unfinished
        ]
        axes.plot(
            [place for place, _ in short],
            [middle for _, middle in short],
            "x",
            color=color,
            markersize=7,
        )
        dots = sorted(set(published.get(label, {})))
        axes.plot(
            dots,
            [published[label][dot] for dot in dots] if dots else [],
            "o",
            color=color,
            markersize=7,
            markerfacecolor="none",
        )
    if logarithmic == "x":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,g}")
    else:
        axes.set_yscale("log", subs=[2, 5])
        low, high = axes.get_ylim()
        if high < 100 * low:  # where powers of ten are few
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if solved is not None:
            axes.axhline(solved, color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel(x)
    notes = [
        *(["rings: published"] if published else []),
        *(["crosses: cut short"] if unfinished else []),
    ]
    axes.set_ylabel(f"{y} ({', '.join(notes)})" if notes else y)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(file)


def bars(measured: Mapping[str, tuple[float, float]], file: Path, x: str) -> None:
    """Draw a bar for each label -> (value, half its interval)."""
    figure = canvas(8, 0.6 + 0.5 * len(measured))
    axes = figure.subplots()
    clean(axes)
    values, margins = zip(*measured.values(), strict=True)
    axes.barh(
        list(measured), values, xerr=margins, color=COLORS[0], height=0.6, error_kw={"capsize": 3}
    )
    axes.invert_yaxis()
    axes.set_xlabel(x)
    figure.savefig(file)
