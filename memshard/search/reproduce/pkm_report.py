"""Table and picture of an experiment with memories: perplexity against parameters and time, usage and KL."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.search.reproduce.catalogue import Point
from memshard.search.reproduce.spread import mean_deviation, seeds
from memshard.trainer.evaluation.canvas import COLORS, canvas, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[tuple[Point, dict[str, Any]]]
_KINDS = ("training", "inference")


def report(rows: Rows, folder: Path, name: str) -> str:
    """Markdown; draws `name`.png."""
    learned: dict[str, list[dict[str, Any]]] = {}
    published: dict[str, str] = {}
    for point, result in rows:
        if "clock" not in point:
            learned.setdefault(point["label"], []).append(result)
            published[point["label"]] = point["published"]
    clocks = [(point, result) for point, result in rows if "clock" in point]
    first, *_ = learned
    # The largest model without a table: what else the parameters of memories could have been spent on.
    plain = [label for label, results in learned.items() if not results[0]["table"]]
    largest = max(plain, key=lambda label: learned[label][0]["dense"], default=first)
    bases = list(dict.fromkeys((first, largest)))
    speed = clocks[0][1]["inference"] if clocks else {}
    made = learned[first][0]
    text = (
        f"{made['trained_tokens'] / 1e6:.1f} million tokens, learning rates {made['lr']:g} (dense) and {made['table_lr']:g} (tables); "
        f"{made['tokens']:,} held-out tokens.\n"
    )
    text += f"Perplexity, gain (nats a token, seed by seed), usage and KL: {seeds(len(learned[first]))}. Inference: us a token.\n\n"
    titles = ["model", "perplexity", *(f"gain over {base}" for base in bases), "inference", "dense", "table", "usage", "KL", "published"]
    text += f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n"
    for label, results in learned.items():
        cells = [label, mean_deviation([result["perplexity"] for result in results], ".2f")]
        for base in bases:
            gains = [other["loss"] - result["loss"] for other, result in zip(learned[base], results, strict=True)]
            cells.append("" if label == base else mean_deviation(gains, "+.4f"))
        cells.append(f"{statistics.median(speed[label]):.0f}" if label in speed else "")
        cells += [f"{results[0][kind] / 1e6:.2f} M" for kind in ("dense", "table")]
        used = "usage" in results[0]
        cells.append(mean_deviation([100 * result["usage"] for result in results], ".1f") + " %" if used else "")
        cells.append(mean_deviation([result["kl_weighted"] for result in results], ".2f") if used else "")
        text += f"| {' | '.join([*cells, published[label]])} |\n"
    for point, result in clocks:
        text += "\n" + _clock_table(point, result)
    _draw(learned, clocks, folder / f"{name}.png")
    return text + f"\n![{name}]({name}.png)\n"


def _clock_table(point: Point, result: dict[str, Any]) -> str:
    """Times and their ratios to the first model's, round by round."""
    first, *_ = point["models"]
    text = f"{point['title']}: us a token, medians of {point['clock']} interleaved rounds; ratios to {first}, round by round (range).\n\n"
    text += "| model | training | ratio | inference | ratio |\n|---|---|---|---|---|\n"
    ratios = {kind: _ratios(result[kind], first) for kind in _KINDS}
    for label in point["models"]:
        cells = [label]
        for kind in _KINDS:
            of = ratios[kind].get(label, [])
            cells.append(f"{statistics.median(result[kind][label]):.0f}" if of else "")
            cells.append(f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})" if of else "")
        text += f"| {' | '.join(cells)} |\n"
    return text


def _ratios(times: dict[str, list[float]], first: str) -> dict[str, list[float]]:
    """Of each model's times to the first one's in the same round."""
    return {label: [time / base for time, base in zip(of, times[first], strict=True)] for label, of in times.items()}


def _draw(learned: dict[str, list[dict[str, Any]]], clocks: Rows, file: Path) -> None:
    """Perplexity against parameters and time; usage and KL, where models can be compared; further comparisons of speed."""
    memories = {label: results for label, results in learned.items() if "usage" in results[0]}
    further = clocks[1:]
    panels = 2 + (len(memories) > 1) + len(further)
    figure = canvas(4.4 * panels, 4)
    parameters, speed, *rest = figure.subplots(1, panels)
    sizes = {label: [(results[0]["dense"] + results[0]["table"]) / 1e6] for label, results in learned.items()}
    _scatter(parameters, sizes, learned, "million parameters")
    parameters.set_xscale("log", subs=[2, 5])
    parameters.xaxis.set_major_formatter("{x:g}")
    parameters.xaxis.set_minor_formatter("{x:g}")
    _scatter(speed, clocks[0][1]["inference"] if clocks else {}, learned, "inference, us a token (bars: range of rounds)")
    if len(memories) > 1:
        _draw_usage(rest.pop(0), memories)
    for axes, (point, result) in zip(rest, further, strict=True):
        _draw_ratios(axes, point, result)
    parameters.figure.legend(*parameters.get_legend_handles_labels(), frameon=False, fontsize=7, loc="outside lower center", ncols=6)
    figure.savefig(file)


def _draw_usage(axes: "Axes", memories: dict[str, list[dict[str, Any]]]) -> None:
    clean(axes)
    used, low_high = _ranges(memories, "usage", 100)
    axes.barh(list(memories), used, xerr=low_high, color=COLORS[0], height=0.6, error_kw={"capsize": 3})
    axes.set_xlabel("slots used, % (bars)")
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    divergence = axes.twiny()
    middle, low_high = _ranges(memories, "kl_weighted")
    divergence.errorbar(middle, list(memories), xerr=low_high, fmt="o", color=COLORS[1], capsize=3)
    divergence.set_xlabel("KL to uniform, nats (dots)")
    divergence.set_xlim(left=0)
    divergence.spines["right"].set_visible(False)


def _draw_ratios(axes: "Axes", point: Point, result: dict[str, Any]) -> None:
    clean(axes)
    first, *_ = labels = list(point["models"])
    for number, kind in enumerate(_KINDS):
        ratios = _ratios(result[kind], first)
        middles = {label: statistics.median(of) for label, of in ratios.items()}
        low_high = list(zip(*(_bars(of, middles[label]) for label, of in ratios.items()), strict=True))
        places = [labels.index(label) + 0.2 - 0.4 * number for label in ratios]
        bars = [[bar[0] for bar in side] for side in low_high]
        axes.barh(places, list(middles.values()), xerr=bars, color=COLORS[number], height=0.36, label=kind, error_kw={"capsize": 3})
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time, {first} = 1 (bars: range of rounds)")
    axes.set_title(point["title"], fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _scatter(axes: "Axes", places: dict[str, list[float]], learned: dict[str, list[dict[str, Any]]], name: str) -> None:
    clean(axes)
    for number, (label, results) in enumerate(learned.items()):
        if label in places:
            x, y = statistics.median(places[label]), statistics.mean(result["perplexity"] for result in results)
            error = _bars([result["perplexity"] for result in results], y)
            marker = "osD^v"[number // len(COLORS) % 5]
            color = COLORS[number % len(COLORS)]
            axes.errorbar(x, y, yerr=error, xerr=_bars(places[label], x), fmt=marker, color=color, label=label, capsize=3)
    axes.set_xlabel(name)
    axes.set_ylabel("perplexity (bars: range of seeds)")


def _bars(values: list[float], middle: float) -> list[list[float]]:
    return [[middle - min(values)], [max(values) - middle]]


def _ranges(learned: dict[str, list[dict[str, Any]]], key: str, factor: float = 1) -> tuple[list[float], Any]:
    """Means over seeds, and how far below and above them the seeds reach: [2, labels]."""
    found = [[factor * result[key] for result in results] for results in learned.values()]
    means = [statistics.mean(values) for values in found]
    bars = [_bars(values, mean) for values, mean in zip(found, means, strict=True)]
    return means, [[bar[side][0] for bar in bars] for side in (0, 1)]
