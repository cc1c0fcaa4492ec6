"""The pictures of a report. Needs matplotlib (extra `eval`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memshard.search.evolve.history import STOPPED, History
from memshard.search.evolve.power_law import PowerLaw, Sizes, frontier
from memshard.search.evolve.verdict import SIGMAS, Curve, mean_curve, noise
from memshard.trainer.evaluation.canvas import COLORS, GRID, INK, canvas, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def history(history: History, file: Path) -> None:
    """Draw the loss of every program in order of birth, the best so far, the start's noise band,
    and the lineage of the best.
    """
    figure = canvas(9, 4.5)
    axes = figure.subplots()
    clean(axes)
    born = history.searched()
    for status, color, label in (
        (STOPPED, GRID, "stopped at a hurdle"),
        ("full", COLORS[0], "trained to the end"),
    ):
        dots = [child for child in born if child.status == status]
        axes.plot(
            [c.id for c in dots],
            [c.fitness for c in dots],
            ".",
            color=color,
            markersize=5,
            label=label,
            zorder=1,
        )
    # The first programs are all the start, from different initial values: their spread is chance.
    copies = [child.fitness for child in born[: history.settings.copies] if child.status == "full"]
    if len(copies) > 1:
        band = noise(copies)
        width = SIGMAS * band.deviation
        axes.axhspan(
            band.mean - width,
            band.mean + width,
            color=COLORS[1],
            alpha=0.2,
            label="noise band of the start",
        )
    full = [child for child in born if child.status == "full"]
    if full:
        best = np.minimum.accumulate([child.fitness for child in full])
        axes.step(
            [child.id for child in full],
            best,
            # A loss is the lowest from its program's birth on, not from the birth before.
            where="post",
            color=INK,
            linewidth=1,
            label="lowest so far",
        )
        finals = [child for child in history.children if child.phase == "final"]
        # Before the last of them has ended the winner may still change, so the line is named after
        # what it is, the lowest so far.
        decided = finals and all(child.status for child in finals)
        chosen, name = (
            (history.winner(), "winner")
            if decided
            else (min(full, key=lambda child: child.fitness).id, "lowest")
        )
        path = [
            (child.id, child.fitness, child.mutation)
            for child in history.lineage(chosen)
            # A duplicate whose twin has not ended has no loss yet.
            if math.isfinite(child.fitness)
        ]
        color = COLORS[4]
        axes.plot(
            [p[0] for p in path],
            [p[1] for p in path],
            "-o",
            color=color,
            markersize=4,
            linewidth=1.2,
            label=f"lineage of the {name}",
        )
        for id, loss, mutation in path[1:]:
            axes.annotate(
                mutation,
                (id, loss),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=7,
                color=color,
            )
        low, high = min(c.fitness for c in full), max(c.fitness for c in full)
        # Programs that hurdles stopped, far above, would squeeze the others into a strip.
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.6 * (high - low) + 1e-3)
    axes.set_xlabel("program, in order of birth")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def _logarithmic(axes: "Axes") -> None:
    """Make both axes logarithmic, with numbers that are written out."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    # Minor ones as well: losses from 1.9 to 3 have no power of ten between them.
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def curves(trainings: Mapping[str, Sequence[Curve]], file: Path) -> None:
    """Draw loss against cost of programs trained again: each training thin, their mean thick."""
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for number, (label, runs) in enumerate(trainings.items()):
        color = COLORS[number % len(COLORS)]
        for run in runs:
            axes.plot(*zip(*run, strict=True), color=color, linewidth=0.5, alpha=0.5)
        axes.plot(*mean_curve(runs).T, color=color, linewidth=1.8, label=label)
    _logarithmic(axes)
    axes.set_xlabel("cost, in steps of the start")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def frontiers(fits: Mapping[str, tuple[Sizes, PowerLaw]], file: Path) -> None:
    """Draw mean curves of all sizes, their lower hulls and the power laws."""
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for number, (label, (sizes, law)) in enumerate(fits.items()):
        color = COLORS[number]
        for runs in sizes.values():
            axes.plot(*mean_curve(runs).T, color=color, linewidth=0.6, alpha=0.6)
        points = frontier(sizes)
        axes.plot(*points.T, "o", color=color, markersize=4)
        name = f"{label}: {law.a:.2f} cost^-{law.k:.3f}"
        axes.plot(
            points[:, 0],
            law.a * points[:, 0] ** -law.k,
            "--",
            color=color,
            linewidth=1.5,
            label=name,
        )
    _logarithmic(axes)
    axes.set_xlabel("cost, in steps of the start at size 1")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
