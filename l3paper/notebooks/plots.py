"""One style for every figure and table, and the one place that saves figures.

`save` writes files only if $L3_FIGURES names a folder, as in `make figures`: running a notebook, or
its test, leaves the committed figures alone.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import Image as NotebookImage
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from l3paper.files import atomic_write
from l3paper.records import markdown

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito (2008): colours that differ for people with any common form of colour blindness."""

DENSE, L3 = COLOURS[0], COLOURS[1]
"""The same model has the same colour in all figures."""

MARKERS = "osD^vPX"

_STYLE = {
    "figure.dpi": 82,
    "savefig.dpi": 82,
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
}


def figure(columns: int = 1, rows: int = 1, width: float = 8.0, height: float = 4.2):
    """Return a figure in this style and its axes: one, or an array of rows x columns."""
    plt.rcParams.update(_STYLE)
    return plt.subplots(rows, columns, figsize=(width, height))


def save(fig: Figure, name: str) -> None:
    """Display a figure in the notebook, write it to $L3_FIGURES/NAME.png if that is set, and close it.

    Both get the same image, reduced to tints of COLOURS: a quarter of the usual size, which keeps
    notebooks small.
    """
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, format="png")
    plt.close(fig)
    image = Image.open(raw).convert("RGB").quantize(palette=_tints(), dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    if folder := os.environ.get("L3_FIGURES"):
        with atomic_write(Path(folder) / f"{name}.png", "wb") as file:
            file.write(small.getvalue())
    if get_ipython() is not None:
        display(NotebookImage(small.getvalue()))


def _tints() -> Image.Image:
    """A palette image: every colour mixed with white in eleven steps, and 32 greys."""
    mixes = [(c, step / 11) for c in COLOURS[:-1] for step in range(11)]
    numbers = [round(255 * ((1 - w) * x + w)) for c, w in mixes for x in to_rgb(c)]
    numbers += [round(255 * i / 31) for i in range(32) for _ in "RGB"]
    palette = Image.new("P", (1, 1))
    palette.putpalette(numbers)
    return palette


def band(
    ax: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], colour: str, label: str
) -> None:
    """Draw the mean of several runs as a line, and a band from their smallest to largest value."""
    points = list(zip(*runs, strict=True))
    ax.plot(x, [sum(values) / len(values) for values in points], color=colour, label=label)
    low, high = [min(values) for values in points], [max(values) for values in points]
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def intervals(ax: Axes, gains: Mapping[str, Any], colour: str) -> None:
    """Draw one line per gain, the first on top: its interval, a mark per seed, and a bar at the mean.

    A gain has the attributes `mean`, `low`, `high` and `by_seed`; its key labels the line.
    """
    for place, gain in enumerate(gains.values()):
        ax.plot([gain.low, gain.high], [place, place], color=colour, alpha=0.35, linewidth=5)
        ax.plot(gain.by_seed, [place] * len(gain.by_seed), "o", color=colour, markersize=5)
        ax.plot([gain.mean, gain.mean], [place - 0.3, place + 0.3], color="black")
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(gains)), gains)
    ax.invert_yaxis()


def table(*rows: Sequence[object]) -> Markdown:
    """Return a table that a notebook displays; the first row is its head."""
    return Markdown(markdown(rows))
