"""The figures of notebook 06: gains of variations, rows against width, and what the two sizes cost."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from l3paper.experiments.statistics import Gain
from l3paper.notebooks.plots import COLOURS, DENSE, L3, MARKERS, figure, interval


def forest(title: str, groups: Mapping[str, Mapping[str, Gain]], xlabel: str) -> Figure:
    """A line per gain, in named groups: its 95 % interval, a dot per seed, and a bar at the mean.

    A group named "" has no heading.
    """
    lines = sum(bool(group) + len(gains) for group, gains in groups.items())
    fig, ax = figure(width=9.5, height=1.4 + 0.36 * lines)
    labels = []
    for (group, gains), colour in zip(groups.items(), (L3, *COLOURS[2:]) * 2, strict=False):
        if group:
            heading = ax.text(0.01, len(labels), group, transform=ax.get_yaxis_transform())
            heading.set(va="center", fontweight="bold", backgroundcolor="white")
            labels.append("")
        for name, gain in gains.items():
            interval(ax, len(labels), gain, colour)
            labels.append(name)
    ax.axvline(0, color="black", linewidth=1, zorder=0)
    places = [y for y, label in enumerate(labels) if label]
    ax.set_yticks(places, [labels[y] for y in places])
    ax.set(xlabel=xlabel, ylim=(len(labels) - 0.5, -0.6))
    fig.suptitle(title, fontweight="bold", fontsize=13, x=0.01, ha="left")
    return fig


def rows_and_width(title: str, points: Mapping[int, Mapping[int, Gain]]) -> Figure:
    """Gains with 95 % intervals by rows per token, a line per width."""
    fig, ax = figure(width=8.5, height=4.4)
    for i, (width, gains) in enumerate(points.items()):
        x = np.array(list(gains)) * 1.03 ** (i - (len(points) - 1) / 2)  # beside each other
        means = np.array([gain.mean for gain in gains.values()])
        halves = [gain.half_width() for gain in gains.values()]
        style = dict(color=COLOURS[i + 1], marker=MARKERS[i], capsize=4, label=f"$C$ = {width}")
        ax.errorbar(x, means, halves, **style)
    ax.axhline(0, color="black", linewidth=1)
    ticks = sorted({rows for gains in points.values() for rows in gains})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(rows) for rows in ticks])
    ax.minorticks_off()
    ax.set(xlabel=r"rows per token, $v\,/\,|\mathcal{V}|$", ylabel="gain over wider MLPs, nats")
    ax.set_title(title)
    ax.legend(fontsize=11)
    return fig


def two_dials(
    gigabytes: Mapping[str, Mapping[int, float]], work: Mapping[str, tuple[float, float]]
) -> Figure:
    """Memory by rows per token, a line per use, and work by the width after the up-projection.

    `work` holds the FLOPs of the projections and of the lookup, in percent of the dense model's.
    """
    fig, (left, right) = figure(2, width=11, height=4.2)
    for (use, sizes), marker, colour in zip(gigabytes.items(), MARKERS, (DENSE, L3), strict=False):
        left.plot(list(sizes), list(sizes.values()), f"{marker}-", color=colour, label=use)
    ticks = sorted({rows for sizes in gigabytes.values() for rows in sizes})
    left.set_xscale("log", base=2)
    left.set_xticks(ticks, [str(rows) for rows in ticks])
    left.minorticks_off()
    left.set(xlabel=r"rows per token, $v\,/\,|\mathcal{V}|$", ylabel="GB per table", yscale="log")
    left.set_title("Rows cost memory")
    left.legend(fontsize=11)
    names = list(work)
    projections, lookup = np.array(list(work.values())).T
    right.bar(names, projections, color=COLOURS[5], label="projections")
    right.bar(names, lookup, bottom=projections, color=L3, label="lookup, at most")
    right.set(xlabel=r"$d_\mathrm{up}$", ylabel="% more FLOPs per token")
    right.set_title("Projections cost work")
    right.legend(fontsize=11)
    right.grid(axis="x")
    return fig
