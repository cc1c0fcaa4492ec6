"""Draw a run's loss curve, and which slots of a table are read. Needs matplotlib (extra `eval`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memshard.trainer.evaluation.canvas import COLORS, INK, canvas, clean
from memshard.trainer.watch.metrics import numbers, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNREAD = "#ffffff"
_MAX_PIXELS = 1024


def loss_curve(metrics_files: Mapping[str, str | Path], out_png: str | Path) -> None:
    """Draw training loss (thin) and held-out loss (with dots), in nats per token, against steps.

    metrics_files: label to metrics.jsonl, one JSON object a line with "step", "train/loss" and
    sometimes "eval/loss". ValueError if there is nothing to draw, or no matplotlib.
    """
    if not metrics_files:
        raise ValueError("no metrics files were given: pass at least one label and metrics.jsonl")
    curves = {label: _read_losses(Path(path)) for label, path in metrics_files.items()}
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for number, (label, (train, held_out)) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        # Names of folders are neither formulas nor always Unicode.
        label = label.replace("$", r"\$").encode(errors="backslashreplace").decode()
        prefix = f"{label}, " if label else ""
        if len(train):
            alpha = 0.45 if len(held_out) else 1
            axes.plot(*train.T, color=color, linewidth=1.2, alpha=alpha, label=f"{prefix}training")
        if len(held_out):
            last = held_out[-1, 1]
            axes.plot(
                *held_out.T,
                color=color,
                linewidth=2,
                marker="o",
                markersize=4,
                label=f"{prefix}held-out ({last:.3f})",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.set_ylim(*_span(curves.values()))
    axes.legend(frameon=False)
    figure.savefig(out_png)


def usage_map(counts: npt.ArrayLike, keys: int, out_png: str | Path, title: str = "") -> None:
    """Draw how often each slot is read, as a keys x keys image, and how unevenly, as a curve.

    counts: [keys^2] reads (or summed weights) in slot order, slot = i1 * keys + i2. Rows of the
    image are first sub-keys, columns second ones; colour is logarithmic; unread slots are white.
    Above 1024 keys a pixel is the mean of a square of slots, and unread if all of them are. title:
    put before the usage. ValueError if the counts do not fit, or no matplotlib.
    """
    reads = np.asarray(counts, dtype=np.float64)
    if reads.shape != (keys * keys,):
        raise ValueError(
            f"counts have shape {list(reads.shape)}; expected one number for each of {keys} x "
            f"{keys} = {keys * keys:,} slots"
        )
    if not np.isfinite(reads).all() or reads.min() < 0:
        raise ValueError("counts must be finite and not negative")
    figure = canvas(10, 4.6)
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1], gridspec_kw={"wspace": 0.06})
    block = -(-keys // _MAX_PIXELS)
    image = _shrink(reads.reshape(keys, keys), block)
    used = image[image > 0]
    low, high = (float(used.min()), float(used.max())) if len(used) else (1.0, 1.0)
    # A colour bar of less than a decade would have no readable ticks.
    high = max(high, 10 * low)
    left.set_facecolor(_UNREAD)
    shown = left.imshow(
        # log 0 has no colour: the white of the axes shows through.
        np.ma.masked_equal(image, 0),
        norm=LogNorm(low, high),
        cmap="viridis",
        interpolation="nearest",
        extent=(0, keys, keys, 0),
    )
    left.set_xlabel("second sub-key")
    left.set_ylabel("first sub-key")
    left.tick_params(colors=INK)
    left.locator_params(integer=True)
    bar = figure.colorbar(shown, ax=left, fraction=0.046, pad=0.03)
    bar.set_label(
        "reads of a slot" if block == 1 else f"reads of a slot, mean of {block} x {block}"
    )
    bar.outline.set_visible(False)
    usage = float((reads > 0).mean())
    unread = Patch(facecolor=_UNREAD, edgecolor=INK, linewidth=0.8, label="never read")
    left.legend(
        handles=[unread],
        loc="upper left",
        bbox_to_anchor=(0, -0.13),
        frameon=False,
        borderaxespad=0,
    )
    left.set_title(
        f"{title + ': ' if title else ''}{usage:.1%} of {keys * keys:,} slots are read", fontsize=11
    )
    _share_curve(right, reads)
    figure.savefig(out_png)


def _share_curve(axes: "Axes", reads: npt.NDArray[np.float64]) -> None:
    """Draw the share of all reads that the most read slots take."""
    clean(axes)
    total = reads.sum()
    axes.plot(
        [0, 100],
        [0, 100],
        color="#9a9a9a",
        linewidth=1,
        linestyle=(0, (4, 3)),
        label="all slots alike",
    )
    if total > 0:
        # A Lorenz curve, but from the most read slot on, in percent.
        share = np.concatenate([[0], np.cumsum(np.sort(reads)[::-1]) / total * 100])
        slots = np.linspace(0, 100, len(share))
        # A line of a million points would make a large and slow file; 1,000 look the same.
        points = np.unique(np.linspace(0, len(share) - 1, 1000).astype(int))
        axes.plot(slots[points], share[points], color=COLORS[0], linewidth=2, label="this table")
        half = slots[int(np.searchsorted(share, 50))]
        axes.plot([half], [50], marker="o", markersize=5, color=COLORS[0])
        digits = 1 if half >= 0.1 else 2
        text = f"{half:.{digits}f}% of the slots\ntake half the reads"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.annotate(
            text, (half, 50), xytext=(10, -8), textcoords="offset points", va="top", bbox=paper
        )
    axes.set_xlabel("slots, most read first (%)")
    axes.set_ylabel("share of all reads (%)")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    axes.set_title("how reads are shared", fontsize=11)
    axes.legend(frameon=False, loc="lower right")


def _shrink(image: npt.NDArray[np.float64], block: int) -> npt.NDArray[np.float64]:
    """Return means of block x block squares, smaller ones at the edges."""
    starts = np.arange(0, len(image), block)
    sums = np.add.reduceat(np.add.reduceat(image, starts, axis=0), starts, axis=1)
    sizes = np.diff(np.append(starts, len(image)))
    return sums / np.outer(sizes, sizes)


def _read_losses(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (step, loss) rows of training and of evaluation."""
    lines = read_metrics(path)
    train, held_out = (
        np.array(numbers(lines, key), dtype=np.float64).reshape(-1, 2)
        for key in ("train/loss", "eval/loss")
    )
    if not len(train) and not len(held_out):
        raise ValueError(
            f"{path} has no train/loss or eval/loss: train for at least train.log_every steps"
        )
    return train, held_out


def _span(curves: Any) -> tuple[float | None, float | None]:
    """Return limits of the loss axis; the first steps, far above all others, may be outside."""
    losses = np.concatenate([np.concatenate(pair)[:, 1] for pair in curves])
    losses = losses[np.isfinite(losses)]
    if len(losses) < 10:
        return None, None
    # The first losses, near ln(vocabulary), would squeeze the rest of the curve into a strip.
    low, high = losses.min(), np.quantile(losses, 0.98)
    margin = 0.05 * (high - low) or 0.1
    return float(low - margin), float(high + margin)
