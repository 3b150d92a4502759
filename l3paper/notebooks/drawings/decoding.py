"""The figures of notebook 07: a small table of rows, bytes per token, and one step as a timeline."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l3paper.notebooks import plots


def small_table(names: Sequence[str], bounds: Sequence[int], step: Sequence[int]) -> Figure:
    """Draw all rows, with those of the step's token ids in colour, and the small table that travels.

    Token t is called names[t] and owns rows bounds[t] up to, not including, bounds[t + 1].
    """
    fig, ax = plots.figure(width=8.5, height=3.6)
    distinct = sorted(set(step))
    place = 0
    for token, name in enumerate(map(repr, names)):
        first, last = bounds[token], bounds[token + 1]
        colour = plots.COLOURS[token] if token in distinct else "lightgrey"
        _rows(ax, 0, first, last, colour)
        ax.text(-0.1, (first + last) / 2, name, ha="right", va="center")
        if token in distinct:
            end = place + last - first
            _rows(ax, 2, place, end, colour)
            label = f"{name}, renumbered {distinct.index(token)}"
            ax.text(3.1, (place + end) / 2, label, ha="left", va="center")
            ends = {"xy": (1.95, (place + end) / 2), "xytext": (1.05, (first + last) / 2)}
            ax.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
            place = end
    ax.text(0.5, -0.4, "all rows, outside", ha="center")
    ax.text(2.5, -0.4, "rows that travel", ha="center")
    ax.set(xlim=(-1, 5), ylim=(bounds[-1], -1.2))
    ax.axis("off")
    ax.set_title(f"One step with the tokens {', '.join(repr(names[token]) for token in step)}")
    return fig


def _rows(ax: Axes, left: float, first: int, last: int, colour: str) -> None:
    for row in range(first, last):
        ax.barh(row + 0.5, 1, 1, left=left, color=colour, edgecolor="white", linewidth=2)


def bytes_per_token(
    batches: Sequence[int], read: Sequence[float], predicted: Sequence[float]
) -> Figure:
    """Draw bytes per token against the tokens in one step: predicted, and as they were read."""
    fig, ax = plots.figure(height=3.6)
    ax.plot(batches, [count / 1e3 for count in predicted], color=plots.L3, label="predicted")
    ax.plot(batches, [count / 1e3 for count in read], "kx", markersize=9, label="read from the file")
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, batches)
    ax.set_ylim(0)
    ax.set(xlabel="tokens per step (sequences in the batch)", ylabel="KB per token")
    ax.set_title("The larger the batch, the more of its tokens share rows")
    ax.legend()
    return fig


def timeline(shares: Mapping[str, float]) -> Figure:
    """Draw one step twice: its parts one after another, and with the copy beside the blocks.

    `shares` has the parts in order, as shares of the step: "copy", "block 0", ..., with one "L3"
    between the blocks, then others. In the second drawing, the L3 layer waits until the copy has ended.
    """
    fig, (above, below) = plots.figure(rows=2, width=9, height=4.4)
    at = 0.0
    for name, share in shares.items():
        at = _part(above, 0, at, name, share)
    _part(below, 1, 0.0, "copy", shares["copy"])
    at = 0.0
    for name, share in shares.items():
        if name == "L3":
            at = max(at, shares["copy"])
        if name != "copy":
            at = _part(below, 0, at, name, share)
    above.set_yticks([0], ["one path"])
    below.set_yticks([0, 1], ["computation", "copy"])
    below.set_xlabel("% of the step that was measured")
    for ax in (above, below):
        ax.set_xlim(0, 100)
        ax.grid(False)
    above.set_title("Measured: the rows are read before the first block")
    below.set_title("Worked out: the rows are read beside the blocks")
    bars, names = above.get_legend_handles_labels()
    parts = dict(zip(names, bars, strict=True))  # one entry for all blocks
    fig.legend(parts.values(), parts, loc="outside lower center", ncols=len(parts))
    return fig


def _part(ax: Axes, lane: int, at: float, name: str, share: float) -> float:
    """Draw one part of the step, which begins at `at`, and return where it ends."""
    kind, _, number = name.partition(" ") if name.startswith("block") else (name, "", "")
    colours = {"copy": plots.COLOURS[4], "block": plots.COLOURS[5], "L3": plots.L3, "rest": "lightgrey"}
    colour = colours.get(kind, plots.COLOURS[2])
    ax.barh(lane, 100 * share, left=100 * at, color=colour, edgecolor="white", label=kind)
    ax.text(100 * (at + share / 2), lane, number, ha="center", va="center")
    return at + share
