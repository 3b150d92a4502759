"""The figure of notebook 09: a trained model that continues with and without L3."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from l3paper.experiments.statistics import Gain
from l3paper.notebooks.plots import COLOURS, DENSE, L3, band, figure, intervals

LOOKS = {"dense": (DENSE, "dense"), "continued": (DENSE, None), "with L3": (L3, "L3 added")}
"""The colour and the label of each leg."""


def retrofit(
    losses: Mapping[str, Sequence[Mapping[int, float]]], steps: int, gains: Mapping[str, Gain]
) -> Figure:
    """Held-out losses of a model that is continued without and with L3, and the gains of L3.

    losses: by leg, one {step: loss} per seed. L3 is added after `steps`. Bands span the seeds.
    """
    fig, (left, right) = figure(columns=2, width=10, height=3.8)
    for leg, (colour, label) in LOOKS.items():
        start = [{} if leg == "dense" else {steps: run[steps]} for run in losses["dense"]]
        curves = [first | run for first, run in zip(start, losses[leg], strict=True)]
        band(left, list(curves[0]), [list(curve.values()) for curve in curves], colour, label)
    left.axvline(steps, color="black", linewidth=1, linestyle=":")
    left.set(xlabel="step", ylabel="nats per token")
    left.set_title("Live: held-out loss")
    left.legend()
    intervals(right, gains, COLOURS[2])
    right.set(xlabel="nats per token", ylim=(len(gains) - 0.4, -0.6))
    right.set_title("Live: the gain of L3")
    return fig
