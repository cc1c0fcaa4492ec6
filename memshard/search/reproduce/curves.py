"""The pictures of experiments. Needs matplotlib (extra `eval`)."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from memshard.trainer.evaluation.canvas import COLORS, canvas, clean


def lines(
    found: Mapping[str, Mapping[int, Sequence[float]]],
    published: Mapping[str, Mapping[int, float]],
    file: Path,
    x: str,
    y: str,
    logarithmic: Literal["x", "y"] = "y",
) -> None:
    """Curves label -> {x: ys}, their mean as a line and their range as a band; one axis logarithmic. published: label -> {x: y}, hollow
    dots of the same color.
    """
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for number, (label, curve) in enumerate(found.items()):
        color = COLORS[number % len(COLORS)]
        places = sorted(curve)
        values = [curve[place] for place in places]
        axes.fill_between(places, [min(ys) for ys in values], [max(ys) for ys in values], color=color, alpha=0.15, linewidth=0)
        axes.plot(places, [statistics.mean(ys) for ys in values], color=color, linewidth=1.8, marker="o", markersize=3, label=label)
        dots = sorted(set(published.get(label, {})))
        axes.plot(dots, [published[label][dot] for dot in dots] if dots else [], "o", color=color, markersize=7, markerfacecolor="none")
    if logarithmic == "x":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,g}")
    else:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(f"{y} (rings: published)" if published else y)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(file)


def bars(found: Mapping[str, tuple[float, float]], file: Path, x: str) -> None:
    """label -> (value, half its interval)."""
    figure = canvas(8, 0.6 + 0.5 * len(found))
    axes = figure.subplots()
    clean(axes)
    values, margins = zip(*found.values(), strict=True)
    axes.barh(list(found), values, xerr=margins, color=COLORS[0], height=0.6, error_kw={"capsize": 3})
    axes.invert_yaxis()
    axes.set_xlabel(x)
    figure.savefig(file)
