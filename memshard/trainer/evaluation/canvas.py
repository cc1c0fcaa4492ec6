"""The common style of all pictures. Needs matplotlib (extra `eval`)."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = [
    "#1f5fa8",
    "#d1661c",
    "#2a8f5b",
    "#8a4fa3",
    "#b3273e",
    "#6b6b6b",
    "#17999e",
    "#b59a1d",
    "#d36fa8",
    "#4b3f35",
]
INK, GRID = "#2b2b2b", "#e3e3e3"
_STYLE = "matplotlibrc"


def canvas(width: float, height: float) -> "Figure":
    """Return an empty figure; sizes in inches. ValueError without matplotlib."""
    if "matplotlib" not in sys.modules and Path(_STYLE).exists() and not Path(_STYLE).is_file():
        # matplotlib reads it as it is imported, a pipe for ever.
        raise ValueError(f"{Path(_STYLE).absolute()} is no regular file: remove it")
    try:
        from matplotlib import rcdefaults
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("pictures need matplotlib: pip install 'memshard[eval]'") from error
    if "matplotlib.pyplot" not in sys.modules:
        # A matplotlibrc in the current folder, maybe a stranger's, has been read: `text.usetex`
        # would run LaTeX on its preamble. A program with pictures of its own keeps its style.
        rcdefaults()
    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def clean(axes: "Axes") -> None:
    """Give axes a light grid and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
