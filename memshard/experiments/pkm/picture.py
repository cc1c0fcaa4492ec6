"""The picture of a study of memories. Needs matplotlib (extra `eval`)."""

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.experiments.common.catalogue import Point
from memshard.experiments.common.repeated import ratios
from memshard.trainer.evaluation.canvas import COLORS, canvas, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("training", "inference")


def draw(
    learned: dict[str, list[dict[str, Any]]], clocks: list[tuple[Point, dict[str, Any]]], file: Path
) -> None:
    """Draw perplexity against parameters and, where it was measured, time, usage and KL where there
    are several memories to compare, and further comparisons of speed.
    """
    memories = {label: results for label, results in learned.items() if "usage" in results[0]}
    further = clocks[1:]
    panels = 1 + bool(clocks) + (len(memories) > 1) + len(further)
    figure = canvas(4.4 * panels, 4)
    parameters, *rest = figure.subplots(1, panels, squeeze=False)[0]
    sizes = {
        label: [(results[0]["dense"] + results[0]["table"]) / 1e6]
        for label, results in learned.items()
    }
    _scatter(parameters, sizes, learned, "million parameters (logarithmic)")
    parameters.set_xscale("log", subs=[2, 3, 4, 6, 8])
    parameters.xaxis.set_major_formatter("{x:g}")
    # Sizes span less than a decade or two: without minor numbers the axis would have one or two.
    parameters.xaxis.set_minor_formatter("{x:g}")
    if clocks:
        title = "inference, us a token (bars: range of rounds)"
        _scatter(rest.pop(0), clocks[0][1]["inference"], learned, title)
    if len(memories) > 1:
        _draw_usage(rest.pop(0), memories)
    for axes, (point, result) in zip(rest, further, strict=True):
        _draw_ratios(axes, point, result)
    parameters.figure.legend(
        *parameters.get_legend_handles_labels(),
        frameon=False,
        fontsize=7,
        loc="outside lower center",
        ncols=6,
    )
    figure.savefig(file)


def _draw_usage(axes: "Axes", memories: dict[str, list[dict[str, Any]]]) -> None:
    clean(axes)
    used, low_high = _ranges(memories, "usage", 100)
    axes.barh(
        list(memories), used, xerr=low_high, color=COLORS[0], height=0.6, error_kw={"capsize": 3}
    )
    axes.set_xlabel("slots used, % (bars)")
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    # An axis of its own at the top: per cent and nats have no common scale.
    divergence = axes.twiny()
    middle, low_high = _ranges(memories, "kl_weighted")
    divergence.errorbar(middle, list(memories), xerr=low_high, fmt="o", color=COLORS[1], capsize=3)
    divergence.set_xlabel("KL to uniform, nats (dots)")
    divergence.set_xlim(0, 1.1 * max(middle))
    divergence.spines["right"].set_visible(False)


def _draw_ratios(axes: "Axes", point: Point, result: dict[str, Any]) -> None:
    clean(axes)
    first, *_ = labels = list(point["models"])
    for number, kind in enumerate(KINDS):
        ratios = ratios_to_first(result[kind], first)
        middles = [statistics.median(of) for of in ratios.values()]
        # By label, not by place in the list: models that are not trained leave a gap.
        places = [labels.index(label) - 0.2 + 0.4 * number for label in ratios]
        axes.barh(
            places,
            middles,
            xerr=_both_ends(list(ratios.values()), middles),
            color=COLORS[number],
            height=0.36,
            label=kind,
            error_kw={"capsize": 3},
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time, {first} = 1 (bars: range of rounds)")
    axes.set_title(point["title"], fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _family(label: str, learned: Iterable[str]) -> str:
    """Return the last part of "N slots, no norm" or "N layers + M" if other labels share it, else
    the label. A family is drawn as one line.
    """
    return (
        _parts(label)[1]
        if sum(_parts(other)[1:] == _parts(label)[1:] != [] for other in learned) > 1
        else label
    )


def _parts(label: str) -> list[str]:
    """Return [what varies, what a family shares], or the label alone."""
    # At the last separator only, so that "3 layers, one table, Memory+" shares "Memory+".
    return re.split(r"(?:, | \+ )(?!.*(?:, | \+ ))", label)


def _scatter(
    axes: "Axes",
    places: dict[str, list[float]],
    learned: dict[str, list[dict[str, Any]]],
    name: str,
) -> None:
    clean(axes)
    families: dict[str, list[str]] = {}
    for label in learned:
        if label in places:
            families.setdefault(_family(label, learned), []).append(label)
    for number, labels in enumerate(families.values()):
        perplexities = [[result["perplexity"] for result in learned[label]] for label in labels]
        x, y = (
            [statistics.median(places[label]) for label in labels],
            [statistics.mean(of_seeds) for of_seeds in perplexities],
        )
        across, up = _both_ends([places[label] for label in labels], x), _both_ends(perplexities, y)
        begin = f"{_parts(labels[0])[0]} to " if len(labels) > 1 else ""
        # Colours come again after some families, with another marker.
        marker = "osD^v"[number // len(COLORS) % 5]
        axes.errorbar(
            x,
            y,
            yerr=up,
            xerr=across,
            fmt=f"-{marker}",
            linewidth=1,
            color=COLORS[number % len(COLORS)],
            label=begin + labels[-1],
            capsize=3,
        )
    axes.set_xlabel(name)
    axes.set_ylabel("perplexity (bars: range of seeds)")


def _both_ends(samples: list[list[float]], middles: list[float]) -> tuple[list[float], list[float]]:
    """Return how far values reach below and above their middles."""
    pairs = list(zip(samples, middles, strict=True))
    return [middle - min(values) for values, middle in pairs], [
        max(values) - middle for values, middle in pairs
    ]


def _ranges(
    learned: dict[str, list[dict[str, Any]]], key: str, factor: float = 1
) -> tuple[list[float], Any]:
    """Return means over seeds, and how far the seeds reach below and above them."""
    samples = [[factor * result[key] for result in results] for results in learned.values()]
    means = [statistics.mean(values) for values in samples]
    return means, _both_ends(samples, means)


def ratios_to_first(times: dict[str, list[float]], first: str) -> dict[str, list[float]]:
    """Return the ratios of each model's times to the first one's in the same round."""
    return {label: ratios(of, times[first]) for label, of in times.items()}
