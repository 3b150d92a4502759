"""The figures of notebook 08: dead rows, the two parts of a choice, and a lens with its controls."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l3paper.notebooks.plots import COLOURS, DENSE, L3, MARKERS, band, figure

PREFERENCE, INFORMATION = "0.7", L3


def dead_rows(steps: Sequence[int], shares: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """The share of dead rows by training step: mean and range of the seeds of every layer."""
    fig, ax = figure(width=8.5, height=3.9)
    for (name, runs), colour in zip(shares.items(), (L3, COLOURS[2]), strict=False):
        band(ax, steps, [[100 * share for share in run] for run in runs], colour, name)
    ax.set(xlabel="training step", ylabel="dead rows (%)")
    ax.set_ylim(bottom=0)
    ax.set_title("Recorded: rows that hardly any context chooses")
    ax.legend()
    return fig


Parts = Mapping[str, Sequence[Sequence[float]]]
"""By name of a layer: preference and information, each by seed, in nats."""


def choice(toys: Parts, layers: Parts) -> Figure:
    """The two parts of the distance from uniform, as stacked bars, for toys and for trained layers."""
    fig, (left, right) = figure(2, width=10.5, height=3.4)
    _stacked(left, toys)
    _stacked(right, layers)
    left.legend()
    left.set_title("Toys")
    right.set_title("Recorded: two layers")
    return fig


def _stacked(ax: Axes, parts: Parts) -> None:
    """One bar per layer: means over seeds, and a dot per seed where the bar ends."""
    for place, (preference, information) in enumerate(parts.values()):
        middle, more = fmean(preference), fmean(information)
        ax.barh(place, middle, 0.6, color=PREFERENCE, label="preference" if not place else None)
        label = "information" if not place else None
        ax.barh(place, more, 0.6, left=middle, color=INFORMATION, label=label)
        if len(preference) > 1:
            ends = [p + i for p, i in zip(preference, information, strict=True)]
            ax.plot(ends, [place] * len(ends), "o", color="black", ms=4)
            ax.plot(preference, [place] * len(ends), "o", color="black", ms=4)
    ax.set_yticks(range(len(parts)), parts)
    ax.set(xlabel="distance from uniform (nats)", ylim=(len(parts) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)


LOOKS = {
    "dense": ("dense", DENSE),
    "l3": ("L3", L3),
    "mlp": ("MLP in place", COLOURS[2]),
    "per-layer-embedding": ("per-layer embedding", COLOURS[3]),
}


def lens(
    depths: Mapping[str, Sequence[str]], curves: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """KL to the final distribution by depth, mean and range of the seeds of every model.

    A layer in the place of an L3 layer stands at the same depth; the steps to them are shaded.
    """
    places = {depth: i for i, depth in enumerate(depths["l3"])}
    fig, ax = figure(width=9.5, height=4.6)
    for (name, runs), marker in zip(curves.items(), MARKERS, strict=False):
        label, colour = LOOKS[name]
        x = [places[_at_l3(depth)] for depth in depths[name]]
        band(ax, x, runs, colour, label)
        ax.plot(x, [fmean(values) for values in zip(*runs, strict=True)], marker, color=colour)
    for depth, place in places.items():
        if depth.startswith("L3"):
            ax.axvspan(place - 1, place, color="0.93", zorder=0)
    ax.set_xticks(range(len(places)), [d.replace("L3 after ", "layer\nafter ") for d in places])
    ax.set(ylabel="KL to the final answer (nats)", ylim=(0, None))
    ax.set_title("Recorded: how far each depth is from the model's answer")
    ax.legend()
    return fig


def _at_l3(depth: str) -> str:
    """The depth of an L3 layer in whose place a layer such as "mlp after 1" is."""
    _, after, place = depth.partition(" after ")
    return f"L3 after {place}" if after else depth


def one_line(text: str, most: int = 28) -> str:
    """The end of a text as code in a cell of a Markdown table; what cannot be shown becomes a box."""
    line = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    shown = "".join(x if x.isprintable() and x != "\ufffd" else "□" for x in line)
    return f"`{shown[-most:].strip()}`"
