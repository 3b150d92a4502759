"""Figures of notebook 04: the schedule, the search, and the losses of a dense model and of L3."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from l3paper.experiments.statistics import Gain
from l3paper.notebooks.plots import COLOURS, DENSE, L3, band, figure

LOOKS = {"dense": (DENSE, "o-", "dense"), "L3": (L3, "s-", "dense + L3")}
"""The colour, the marker and the label of each family."""


def schedules(factors: Mapping[int, Sequence[float]]) -> Figure:
    """The factor on all learning rates, of one or more runs, by their numbers of steps."""
    fig, ax = figure(height=3.2)
    longest = max(factors)
    for colour, (steps, by_step) in zip(COLOURS[2:], factors.items(), strict=False):
        ax.plot(range(steps), by_step, color=colour, label=f"a run of {steps} steps")
    ax.annotate("up: 2 %", (0.01 * longest, 0.5), (0.04 * longest, 0.3), arrowprops={"arrowstyle": "-"})
    ax.text(0.25 * longest, 1.04, "level, up to half of the steps", ha="center")
    ax.text(0.8 * longest, 0.5, "linear to zero")
    ax.set(xlabel="step", ylabel="factor", ylim=(0, 1.15), xlim=(0, 1.02 * longest))
    ax.legend(loc="upper right")
    return fig


def curves(
    steps: Sequence[int], losses: Mapping[str, Sequence[Sequence[float]]], made: str, text: str
) -> Figure:
    """Held-out losses over the steps, and the gain of L3: means over the seeds, and their range.

    losses: by family, (seeds, len(steps)), with equal seeds in equal places. `made` is "Live" or
    "Recorded", `text` names the test set.
    """
    fig, (left, right) = figure(columns=2, width=10, height=4)
    for family, (colour, _, label) in LOOKS.items():
        band(left, steps, losses[family], colour, label)
    left.set(xlabel="step", ylabel=f"nats per token on {text}")
    left.set_title(f"{made}: held-out loss")
    left.legend()
    gains = np.subtract(losses["dense"], losses["L3"]).tolist()
    band(right, steps, gains, COLOURS[2], "dense minus L3")
    right.axhline(0, color="black", linewidth=1)
    right.set(xlabel="step", ylabel="nats per token")
    right.set_title(f"{made}: the gain of L3")
    for ax in (left, right):
        ax.set_xlim(0, 1.02 * max(steps))
    return fig


def search(losses: Mapping[str, Mapping[float, float]]) -> Figure:
    """Final losses over the factor on all learning rates, by family; a ring marks the best."""
    fig, ax = figure(height=3.6)
    for family, (colour, marker, label) in LOOKS.items():
        points = losses[family]
        ax.plot(list(points), list(points.values()), marker, color=colour, label=label)
        best = min(points, key=points.get)
        ax.plot(best, points[best], "o", markersize=15, markerfacecolor="none", color=colour)
    tried = sorted({factor for points in losses.values() for factor in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(tried, [f"{factor:g}" for factor in tried])
    ax.set(xlabel="factor on all learning rates", ylabel="held-out loss (nats per token)")
    ax.set_title("Recorded: the search of each family, seed 0")
    ax.legend(loc="upper left")
    return fig


def recorded(losses: Mapping[str, Mapping[int, float]], gain: Gain) -> Figure:
    """Final losses by family and seed, and the gain of each seed with the interval of its mean."""
    fig, (left, right) = figure(columns=2, width=10, height=4)
    seeds = sorted(losses["dense"])
    for family, (colour, marker, label) in LOOKS.items():
        by_seed = [losses[family][seed] for seed in seeds]
        left.plot(seeds, by_seed, marker[0], color=colour, label=label)
        left.axhline(np.mean(by_seed), color=colour, linewidth=1, linestyle="--")
    for seed in seeds:
        pair = [losses[family][seed] for family in LOOKS]
        left.plot([seed, seed], pair, color="0.7", linewidth=1, zorder=0)
    left.set(xlabel="seed", ylabel="nats per token on all held-out text", xticks=seeds)
    left.set_title("Recorded: final loss")
    left.margins(y=0.3)
    left.legend(loc="upper right", ncols=2)
    right.axhspan(gain.low, gain.high, color=COLOURS[2], alpha=0.2, linewidth=0)
    right.axhline(gain.mean, color=COLOURS[2])
    right.plot(seeds, gain.by_seed, "o", color=COLOURS[2])
    right.axhline(0, color="black", linewidth=1)
    right.set(xlabel="seed", ylabel="dense minus L3, nats per token", xticks=seeds)
    right.set_title("The gain: mean, 95 % interval")
    return fig
