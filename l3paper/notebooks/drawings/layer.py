"""The figures of notebook 02: rows, masks, one position's numbers, and the softmax as it turns."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import NullLocator
from torch import Tensor

from l3paper.notebooks.plots import COLOURS, MARKERS, figure

BLUE, ORANGE = COLOURS[0], COLOURS[1]


def ragged_rows(vocabulary: Sequence[str], bounds: Tensor, ids: Sequence[int]) -> Figure:
    """Positions of a text above the rows of the table; a fan leads from each to its token's rows."""
    bounds = bounds.tolist()
    fig, ax = figure(width=9.5, height=4.2)
    for token, name in enumerate(vocabulary):
        first, last = bounds[token : token + 2]
        ink = "white" if token < 4 else "black"  # on the lighter colours
        for row in range(first, last):
            box = Rectangle((row, 0), 1, 1, facecolor=COLOURS[token], edgecolor="white", lw=1.5)
            ax.add_patch(box)
            ax.text(row + 0.5, 0.5, row, ha="center", va="center", color=ink)
        label = dict(ha="center", color=COLOURS[token], weight="bold")
        ax.text((first + last) / 2, -1.15, f'"{name}"', **label)
    for bound in bounds:
        ax.plot([bound, bound], [-0.25, 0], color="black", lw=1.5)
        ax.text(bound, -0.35, bound, ha="center", va="top", fontsize=11)
    for i, token in enumerate(ids):
        at, (first, last) = (i + 0.5) * bounds[-1] / len(ids), bounds[token : token + 2]
        fan = [(at, 3.4), (first + 0.05, 1.05), (last - 0.05, 1.05)]
        ax.add_patch(Polygon(fan, facecolor=COLOURS[token], alpha=0.22, lw=0))
        ax.plot(at, 3.4, "o", ms=13, color=COLOURS[token])
        ax.text(at, 3.85, vocabulary[token], ha="center", color=COLOURS[token], weight="bold")
    for y, text in ((3.4, "positions"), (0.5, "rows of the table"), (-0.62, "bounds")):
        ax.text(-0.4, y, text, ha="right", va="center")
    ax.set(xlim=(-3.1, bounds[-1] + 0.2), ylim=(-1.4, 4.5))
    ax.set_title("The token alone decides which rows a position may read")
    ax.axis("off")
    return fig


def ownership(bounds: Tensor, ids: Tensor) -> Tensor:
    """Which rows each position may read: a mask (N, v) for ids (N,)."""
    rows = torch.arange(int(bounds[-1]))
    return (rows >= bounds[ids, None]) & (rows < bounds[ids + 1, None])


def block_diagonal(vocabulary: Sequence[str], bounds: Tensor, ids: Tensor, block: int) -> Figure:
    """The mask of positions against rows, in the order of the text and sorted by token, with blocks."""
    ordered = ids.sort(stable=True).values
    fig, (left, right) = figure(2, width=10.5, height=4.6)
    _mask(left, vocabulary, bounds, ids)
    _mask(right, vocabulary, bounds, ordered)
    for top, tokens in enumerate(ordered.split(block)):
        first, last = int(bounds[tokens[0]]), int(bounds[tokens[-1] + 1])
        box = Rectangle((first, top * block), last - first, len(tokens), fill=False, lw=2.2, zorder=5)
        box.set_clip_on(False)
        right.add_patch(box)
    left.set(title="In the order of the text", ylabel="position, by its token")
    right.set_title("Sorted by token: blocks along the diagonal")
    return fig


def _mask(ax: Axes, vocabulary: Sequence[str], bounds: Tensor, ids: Tensor) -> None:
    for position, row in ownership(bounds, ids).nonzero().tolist():
        colour = COLOURS[int(ids[position])]
        ax.add_patch(Rectangle((row, position), 1, 1, facecolor=colour, edgecolor="white"))
    for bound in bounds[1:-1].tolist():
        ax.axvline(bound, color="0.8", lw=0.8, zorder=0)
    ax.set(xlim=(0, int(bounds[-1])), ylim=(len(ids), 0), xlabel="row of the table")
    ax.set_xticks(bounds.tolist())
    ax.set_yticks([i + 0.5 for i in range(len(ids))], [vocabulary[i] for i in ids])
    ax.tick_params(length=0)
    ax.grid(False)


def one_position(steps: Sequence[Mapping[str, Tensor]]) -> Figure:
    """Rows of vectors and matrices, to scale; cells below zero are orange, those above are blue.

    Each of `steps` maps names to tensors (n,) or (m, n); a name that begins with an operator and a
    space, such as "= scores", puts that operator in front of the block.
    """
    fig, ax = figure(width=10.5, height=5.9)
    middle = 0.0
    for blocks in steps:
        tallest = max(numbers.shape[0] for numbers in blocks.values())
        middle -= tallest / 2 + 1.4
        left = 0.0
        for name, numbers in blocks.items():
            operator, _, label = name.partition(" ")
            if label:
                word = len(operator) > 1
                width = 3.2 if word else 1.9
                size = 11 if word else 15
                ax.text(left + width / 2 - 0.05, middle, operator, ha="center", va="center", size=size)
                left += width
            left = _block(ax, left, middle, numbers, label or name) + 0.5
        middle -= tallest / 2 + 1.4
    ax.set(xlim=(-0.3, 31.8), ylim=(middle, 0.2), aspect="equal")
    ax.axis("off")
    return fig


def _block(ax: Axes, left: float, centre: float, numbers: Tensor, label: str) -> float:
    """Draw a vector as a column, or a matrix, around the height `centre`; return its right edge."""
    matrix = numbers if numbers.ndim == 2 else numbers[:, None]
    height, width = matrix.shape
    scale = float(matrix.abs().max()) or 1.0
    for (i, j), value in zip(
        ((i, j) for i in range(height) for j in range(width)), matrix.flatten().tolist(), strict=True
    ):
        colour = BLUE if value > 0 else ORANGE
        share = 0.08 + 0.9 * abs(value) / scale
        place = (left + j, centre + height / 2 - i - 1)
        ax.add_patch(Rectangle(place, 1, 1, facecolor=colour, alpha=share, edgecolor="none"))
        ax.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="0.6", lw=0.6))
    middle = left + width / 2
    ax.text(middle, centre + height / 2 + 0.2, label, ha="center", va="bottom", fontsize=12.5)
    shape = " x ".join(str(n) for n in numbers.shape)
    ax.text(middle, centre - height / 2 - 0.2, shape, ha="center", va="top", fontsize=11, color="0.35")
    return left + width


def softmax_turns(degrees: Tensor, keys: Sequence[float], weights: Mapping[float, Tensor]) -> Figure:
    """The weight of every row while the hidden state turns once around, for two lengths of the keys.

    keys: the keys' directions in degrees; weights: tensors (angles, rows) by the keys' length.
    """
    fig, axes = figure(len(weights), width=10.5, height=4.2)
    titles = ("Short keys ({:g}): nearly an average", "Long keys ({:g}): the nearest row")
    for ax, title, (length, turned) in zip(axes, titles, weights.items(), strict=True):
        for i, key in enumerate(keys):
            ax.plot(degrees, turned[:, i], color=COLOURS[i])
            for at in (key, key + 360):
                ax.axvline(at, color=COLOURS[i], lw=1, ls=":")
            ax.text(key + 5, 1.06, f"key of row {i}", color=COLOURS[i], fontsize=11)
        ax.set(xlim=(-4, 364), ylim=(-0.02, 1.15), xticks=range(0, 361, 90))
        ax.set(title=title.format(length), xlabel="direction of the hidden state (degrees)")
    axes[0].set_ylabel("weight of the row")
    return fig


def turning(keys: Sequence[float], lengths: Sequence[float], weights_at) -> Iterator[Figure]:
    """Frames: a hidden state turns among keys that grow longer; bars show the rows' weights.

    `weights_at(length, degrees)` returns the weights (rows,).
    """
    for step, length in enumerate(lengths):
        degrees = 360 * step / len(lengths)
        weights = weights_at(length, degrees).tolist()
        fig, (left, right) = figure(2, width=8, height=3.9)
        for i, key in enumerate(keys):
            _arrow(left, key, length, COLOURS[i])
        _arrow(left, degrees, 2**0.5, "black")
        left.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), aspect="equal")
        left.axis("off")
        left.set_title(f"keys of length {length:.1f}; the query in black", fontsize=12)
        right.bar(range(len(keys)), weights, color=COLOURS[: len(keys)])
        right.set(ylim=(0, 1), xticks=range(len(keys)), xlabel="row", ylabel="weight")
        right.set_title("softmax over the rows", fontsize=12)
        yield fig


def _arrow(ax: Axes, degrees: float, length: float, colour: str) -> None:
    angle = torch.tensor(degrees).deg2rad()
    tip = (float(angle.cos()) * length, float(angle.sin()) * length)
    ax.annotate("", tip, (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, lw=2.5))


def gradient_rows(
    vocabulary: Sequence[str], bounds: Tensor, present: set[str], norms: Mapping[str, Tensor]
) -> Figure:
    """The norm of the gradient of every row, in one panel per title of `norms`."""
    fig, axes = figure(rows=len(norms), width=8.5, height=4.6)
    top = 1.4 * max(float(norm.max()) for norm in norms.values())
    owner = torch.repeat_interleave(torch.arange(len(vocabulary)), bounds.diff())
    for ax, (title, norm) in zip(axes, norms.items(), strict=True):
        ax.bar(range(len(norm)), norm, color=[COLOURS[t] for t in owner], width=0.85)
        if not norm.any():
            ax.text(len(norm) / 2, 0.3 * top, "all zero", ha="center", color="0.35")
        for token, name in enumerate(vocabulary):
            middle = (bounds[token] + bounds[token + 1] - 1).item() / 2
            text = f'"{name}"' if name in present else f'"{name}"\nabsent'
            ax.text(middle, 0.96 * top, text, ha="center", va="top", color=COLOURS[token], fontsize=11)
        for bound in bounds[1:-1].tolist():
            ax.axvline(bound - 0.5, color="0.6", lw=0.8, ls=":")
        ax.set(title=title, xlim=(-0.5, len(norm) - 0.5), ylim=(0, top), xticks=range(len(norm)))
        ax.set_yticks([])
        ax.grid(False)
    axes[-1].set_xlabel("row of the table")
    fig.supylabel("norm of the row's gradient", fontsize=12)
    return fig


def costs_by_size(time: Mapping[str, Mapping], memory: Mapping[str, Mapping]) -> Figure:
    """Time relative to the fastest at the smallest batch, and bytes kept, by positions in the batch."""
    fig, (left, right) = figure(2, width=10.5, height=4.2)
    unit = min(min(times.values()) for times in time.values())
    for (name, times), marker, colour in zip(time.items(), MARKERS, COLOURS, strict=False):
        style = dict(marker=marker, color=colour, label=name)
        left.plot(list(times), [t / unit for t in times.values()], **style)
        right.plot(list(memory[name]), [b / 1e6 for b in memory[name].values()], **style)
    left.set(title="Time, forward and backward", ylabel="times the quickest point")
    right.set(title="Kept for the backward pass", ylabel="MB")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="positions in the batch, N")
        ax.set_xticks(list(times), [str(n) for n in times])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
    left.legend()
    return fig
