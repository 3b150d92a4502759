"""One style for every figure and table, and the one place that saves figures.

`save` and `save_animation` write files only if $L3_FIGURES names a folder, as in `make figures`:
running a notebook, or its test, leaves the committed figures alone. What a figure shows is drawn in
`l3paper.notebooks.drawings`.
"""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
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

DPI = 82
"""Pixels per inch at which a notebook shows a figure; images have twice as many, for sharp screens."""

_STYLE = {
    "figure.dpi": DPI,
    "savefig.dpi": 2 * DPI,
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
    small = io.BytesIO()
    image = _image(fig)
    image.save(small, format="png", optimize=True)
    _write(f"{name}.png", small.getvalue())
    if get_ipython() is not None:
        display(NotebookImage(small.getvalue(), width=image.width // 2))


def save_animation(figs: Iterable[Figure], name: str, seconds: float = 1.0) -> None:
    """Write $L3_FIGURES/NAME.gif, if that is set: figures of one size, `seconds` each, in a loop.

    A notebook shows the file by a link in its prose, since not every viewer shows a GIF in an output.
    """
    if not os.environ.get("L3_FIGURES"):
        return
    frames = [_image(fig) for fig in figs]
    moving = io.BytesIO()
    frames[0].save(
        moving,
        format="gif",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 * seconds),
        loop=0,
        optimize=False,
    )
    _write(f"{name}.gif", moving.getvalue())


def _image(fig: Figure) -> Image.Image:
    """The figure as an image of few colours; closes it."""
    raw = io.BytesIO()
    fig.savefig(raw, format="png")
    plt.close(fig)
    return Image.open(raw).convert("RGB").quantize(palette=_tints(), dither=Image.Dither.NONE)


def _write(name: str, content: bytes) -> None:
    if folder := os.environ.get("L3_FIGURES"):
        with atomic_write(Path(folder) / name, "wb") as file:
            file.write(content)


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


def interval(ax: Axes, place: float, gain: Any, colour: str) -> None:
    """Draw one gain at height `place`: its interval, a mark per seed, and a bar at the mean."""
    ax.plot([gain.low, gain.high], [place, place], color=colour, alpha=0.35, linewidth=5)
    ax.plot(gain.by_seed, [place] * len(gain.by_seed), "o", color=colour, markersize=5)
    ax.plot([gain.mean, gain.mean], [place - 0.3, place + 0.3], color="black")


def intervals(ax: Axes, gains: Mapping[str, Any], colour: str) -> None:
    """Draw one line per gain, the first on top: its interval, a mark per seed, and a bar at the mean.

    A gain has the attributes `mean`, `low`, `high` and `by_seed`; its key labels the line.
    """
    for place, gain in enumerate(gains.values()):
        interval(ax, place, gain, colour)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(gains)), gains)
    ax.invert_yaxis()


def table(*rows: Sequence[object]) -> Markdown:
    """Return a table that a notebook displays; the first row is its head."""
    return Markdown(markdown(rows))
