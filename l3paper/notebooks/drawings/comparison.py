"""The figures of notebook 05: searches, gains with their intervals, and loss against compute."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from l3paper.experiments.statistics import Gain
from l3paper.notebooks.plots import COLOURS, DENSE, L3, MARKERS, band, figure, intervals


def search(
    losses: Mapping[str, Mapping[float, float]], rates: Mapping[str, Mapping[float, float]]
) -> Figure:
    """Loss by the factor on all learning rates, and by the rate of tables or routers, per family."""
    fig, (left, right) = figure(2, width=10.5, height=4.2)
    looks = dict(zip(losses, zip(MARKERS, COLOURS, strict=False), strict=False))
    for ax, curves in ((left, losses), (right, rates)):
        for name, found in curves.items():
            marker, colour = looks[name]
            ordered = dict(sorted(found.items()))
            ax.plot(list(ordered), list(ordered.values()), f"{marker}-", color=colour, label=name)
    factors = sorted({factor for found in losses.values() for factor in found})
    left.set(xscale="log", xlabel="factor on all learning rates", ylabel="nats per token")
    left.set_xticks(factors, [f"{factor:g}" for factor in factors])
    left.xaxis.set_minor_locator(NullLocator())
    right.set(xscale="log", xlabel="learning rate of tables, or of routers")
    left.set_title("Recorded: all rates together")
    right.set_title("Recorded: tables or routers alone")
    left.legend(fontsize=11, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.08))
    return fig


def gains(title: str, found: Mapping[str, Gain], margin: float | None = None) -> Figure:
    """A line per comparison: its interval, a dot per seed, a bar at the mean; and a margin around 0."""
    fig, ax = figure(width=9.5, height=1.5 + 0.5 * len(found))
    if margin:
        ax.axvspan(-margin, margin, color="0.9", zorder=0)
        box = {"facecolor": "0.9", "edgecolor": "none", "pad": 1}  # hides the line at 0
        ax.text(0, -0.62, "counts as equal", ha="center", fontsize=11, color="0.35", bbox=box)
    intervals(ax, found, L3)
    ax.set_ylim(len(found) - 0.4, -0.95 if margin else -0.6)
    ax.set(title=title, xlabel="gain of L3, nats per token")
    return fig


def against_compute(
    flops: Mapping[str, float], loss: Mapping[str, float], seconds: Mapping[str, float] | None
) -> Figure:
    """Mean loss by training FLOPs of a run, and by its time if that was measured, relative to dense.

    The line through "dense" and "dense, longer" is what training the plain model for longer buys.
    """
    costs = {"FLOPs": flops} | ({"time on a CPU": seconds} if seconds else {})
    fig, axes = figure(len(costs), width=5.4 * len(costs) + 1, height=5)
    for ax, (unit, cost) in zip(np.atleast_1d(axes), costs.items(), strict=True):
        x = {name: cost[name] / cost["dense"] for name in loss}
        slope = (loss["dense, longer"] - loss["dense"]) / np.log(x["dense, longer"])
        far = np.geomspace(1, max(x.values()), 50)
        ax.plot(far, loss["dense"] + slope * np.log(far), "--", color=DENSE, lw=1.5)
        ax.plot(list(x.values()), list(loss.values()), "o", color="0.6", ms=7)
        ax.plot(x["L3"], loss["L3"], "o", color=L3, ms=9)
        right = 1 + 1.06 * (max(x.values()) - 1)
        for (name, value), height in zip(loss.items(), _spread(loss.values()), strict=True):
            bold = "bold" if name == "L3" else "normal"
            ax.plot([x[name], right], [value, height], color="0.8", lw=0.8, zorder=0)
            ax.text(right, height, f" {name}", va="center", fontsize=11, weight=bold)
        ax.set(xlabel=f"training {unit}, dense = 1", ylabel="nats per token")
        ax.set_xlim(right=1 + 1.75 * (max(x.values()) - 1))
        ax.set_title(f"Recorded: loss against {unit}")
    return fig


def _spread(heights: Iterable[float], share: float = 0.055) -> list[float]:
    """Heights of labels near these, no two closer than `share` of their range."""
    heights = list(heights)
    gap = share * (max(heights) - min(heights))
    placed, lowest = {}, -np.inf
    for i in np.argsort(heights):
        placed[i] = lowest = max(heights[i], lowest + gap)
    return [placed[i] for i in range(len(heights))]


def lead(
    title: str, millions: Sequence[float], gaps: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """The lead of L3 over several families by tokens trained: mean and range of the seeds.

    It is measured on one sample of the held-out text.
    """
    fig, ax = figure(width=8.5, height=4.2)
    colours = dict(zip(("dense", "dense, wider", "MoE", "Engram"), COLOURS, strict=False))
    for name, runs in gaps.items():
        band(ax, millions, runs, colours[name], f"over {name}")
    half = max(millions) / 2
    ax.axvline(half, color="0.5", lw=1, ls=":")
    ax.text(half, ax.get_ylim()[1], " rates begin to fall", va="top", fontsize=11, color="0.35")
    ax.axhline(0, color="black", lw=1)
    ax.set(xlabel="training tokens (millions)", ylabel="gain of L3, nats per token")
    ax.set_title(title)
    ax.legend(fontsize=11, ncols=2)
    return fig
