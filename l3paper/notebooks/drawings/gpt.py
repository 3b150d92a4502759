"""The figures of notebook 03: where the L3 layer sits, and what it costs."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from l3paper.notebooks.plots import COLOURS, DENSE, L3, figure

GREY, PALE, LIGHT = "#777777", "#E6E6E6", "#F4CCAA"
"""Embedding and head; operations without parameters; rows that a position does not read."""

PARTS = {
    "embedding": "#999999",
    "head": COLOURS[4],
    "attention projections": COLOURS[0],
    "mlp": COLOURS[2],
    "attention scores": COLOURS[5],
    "l3 projections": COLOURS[3],
    "l3 tables": L3,
    "l3 lookup": L3,
}
"""The colours of `costs`, in the order of the bars; the table and its lookup have the same."""


def where_it_sits(owners: Sequence[str], token: str, n_layer: int = 4, after: int = 2) -> Figure:
    """The decoder with an L3 layer after block `after`, and beside it the inside of the layer.

    `owners` names the token that owns each row of the table, the first row on top; the rows of `token`
    are the ones that the drawn position reads.
    """
    fig, ax = figure(width=10, height=7)
    _stack(ax, n_layer, after)
    _inside(ax, owners, token)
    ax.set(xlim=(0, 10), ylim=(0, 7), aspect="equal")
    ax.axis("off")
    return fig


def costs(
    parameters: Mapping[str, Mapping[str, float]], flops: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Two stacks of horizontal bars, one bar per model, divided by part.

    Both arguments map a model's name to its numbers by part, as in `l3paper.costs.accounting`; `flops`
    are per token of a forward pass.
    """
    fig, (top, bottom) = figure(rows=2, width=9, height=5)
    _bars(top, parameters, "Parameters")
    _bars(bottom, flops, "FLOPs per token, forward")
    used = {part for bars in (*parameters.values(), *flops.values()) for part in bars} - {"l3 lookup"}
    names = {"l3 tables": "L3 table or lookup", "l3 projections": "L3 projections", "mlp": "MLP"}
    fig.legend(
        [Rectangle((0, 0), 1, 1, color=PARTS[part]) for part in PARTS if part in used],
        [names.get(part, part) for part in PARTS if part in used],
        loc="outside lower center",
        ncols=4,
        fontsize=11,
    )
    return fig


def _bars(ax: Axes, values: Mapping[str, Mapping[str, float]], title: str) -> None:
    longest = max(sum(bar.values()) for bar in values.values())
    for y, bar in enumerate(values.values()):
        left = 0.0
        for part in PARTS:
            ax.barh(y, bar.get(part, 0.0), left=left, color=PARTS[part], height=0.6)
            left += bar.get(part, 0.0)
        ax.text(left + 0.01 * longest, y, f"{left / 1e6:.2f} M", va="center")
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.1 * longest), xticks=[], title=title)
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)


def _stack(ax: Axes, n_layer: int, after: int) -> None:
    """The decoder, from the ids at the bottom to the logits on top."""
    parts = ["embedding", *(f"block {i}" for i in range(n_layer)), "norm, head"]
    parts.insert(after + 2, "L3 layer")
    step, middle = 5.6 / (len(parts) - 1), 1.55
    levels = [0.72 + step * i for i in range(len(parts))]
    for part, y in zip(parts, levels, strict=True):
        colour = L3 if part == "L3 layer" else DENSE if part.startswith("block") else GREY
        _box(ax, middle, y, 1.5, part, colour)
        _arrow(ax, (middle, y - step + 0.21 if y > 1 else 0.3), (middle, y - 0.21))
    _arrow(ax, (middle, levels[-1] + 0.21), (middle, 6.85))
    ax.text(middle, 0.14, "token ids  $(B, T)$", ha="center", va="center")
    ax.text(middle + 0.1, 6.72, "logits", va="center", fontsize=11)
    for i in (1, after + 2):
        ax.text(
            middle - 0.1, levels[i] - step / 2, "$x$  $(B, T, C)$", ha="right", va="center", fontsize=11
        )
    y = levels[after + 2]
    ax.plot([0.62, 0.32, 0.32], [0.14, 0.14, y], color=L3)
    _arrow(ax, (0.315, y), (middle - 0.75, y), L3, 2)
    ax.text(0.17, y / 2, "the ids again", color=L3, rotation=90, ha="center", va="center")
    for edge, corner in ((y + 0.21, 6.9), (y - 0.21, 0.05)):
        ax.plot([middle + 0.75, 3.05], [edge, corner], ":", color=L3, linewidth=1.2)


def _inside(ax: Axes, owners: Sequence[str], token: str) -> None:
    """What the layer does at one position, from the bottom to the top."""
    frame = FancyBboxPatch((3.1, 0.1), 6.8, 6.75, boxstyle="round,pad=0.05", fill=False)
    frame.set(edgecolor=L3, linestyle=":", linewidth=1.2)
    ax.add_patch(frame)
    ax.text(3.25, 6.66, "Inside the L3 layer, at one position", weight="bold", va="center")
    middle, side, step = 7.35, 9.35, 0.68
    chain = [  # an operation, whether it is learned, and the shape of its result
        ("Norm", False, r"$\hat x$  $(C)$"),
        (r"scores  $K_t\,\hat x$", False, "$(d_t)$"),
        ("softmax", False, "$w$  $(d_t)$"),
        (r"weighted sum  $V_t^\top w$", False, r"$(d_\mathrm{emb})$"),
        (r"$W_\mathrm{up}$", True, r"$(d_\mathrm{up})$"),
        ("Norm", False, r"$(d_\mathrm{up})$"),
        ("concatenate with $x$", False, r"$(d_\mathrm{up} + C)$"),
        (r"$W_\mathrm{mix}$", True, "$(C)$"),
    ]
    levels = [0.9 + step * i for i in range(len(chain))]
    for (text, learned, shape), y in zip(chain, levels, strict=True):
        _box(ax, middle, y, 2.3, text, L3 if learned else PALE)
        _arrow(ax, (middle, y + 0.19), (middle, y + step - 0.19))
        ax.text(middle + 0.1, y + step / 2, shape, va="center", fontsize=11)
    _residual(ax, middle, side, levels)
    _table(ax, owners, token, middle - 1.15, levels)
    _key(ax)


def _residual(ax: Axes, middle: float, side: float, levels: Sequence[float]) -> None:
    """The way of x past the layer: into the concatenation, and into the sum on top."""
    top = levels[-1] + 0.68
    ax.text(middle, 0.27, "$x$  $(C)$", ha="center", va="center")
    _arrow(ax, (middle, 0.4), (middle, levels[0] - 0.19))
    ax.plot([middle + 0.45, side, side], [0.27, 0.27, top], color="black", linewidth=1.3)
    _arrow(ax, (side, levels[-2]), (middle + 1.15, levels[-2]))
    _arrow(ax, (side, top), (middle + 0.19, top))
    ax.add_patch(Circle((middle, top), 0.19, facecolor="white", edgecolor="black", linewidth=1.3))
    ax.text(middle, top, "+", ha="center", va="center", fontsize=15)
    ax.plot([side], [levels[-2]], "o", color="black", markersize=4)
    ax.text(side + 0.22, top / 2, "the residual stream", rotation=90, ha="center", va="center")
    _arrow(ax, (middle, top + 0.19), (middle, 6.95))
    ax.text(middle + 0.1, top + 0.4, "$x$  $(C)$", va="center", fontsize=11)


def _table(ax: Axes, owners: Sequence[str], token: str, chain: float, levels: Sequence[float]) -> None:
    """The rows, named after their owners, and the way of those of `token` to the chain's left edge."""
    left, right, height = 3.75, 5.05, 0.36
    first, last = owners.index(token), len(owners) - owners[::-1].index(token)
    top = levels[2] + height * (first + last) / 2  # the rows of `token` stand beside the softmax
    for row, owner in enumerate(owners):
        y = top - height * (row + 1)
        colour, ink = (L3, "white") if owner == token else (LIGHT, "black")
        ax.add_patch(Rectangle((left, y + 0.02), right - left, height - 0.04, color=colour))
        ax.text((left + right) / 2, y + height / 2, owner, color=ink, ha="center", va="center")
    ax.text((left + right) / 2, top + 0.17, "table: $v$ rows", ha="center", va="center")
    ax.text(3.25, 0.27, f"token id $t$: “{token}”", va="center", color=L3)
    ax.plot([3.4, 3.4], [0.44, levels[2]], color=L3)
    _arrow(ax, (3.395, levels[2]), (left, levels[2]), L3, 2)
    edge, ends = right + 0.09, (top - height * last + 0.02, top - height * first - 0.02)
    ax.plot([edge - 0.05, edge, edge, edge - 0.05], [ends[0], *ends, ends[1]], color=L3)
    for name, width, y in (("K_t", "C", levels[1]), ("V_t", r"d_\mathrm{emb}", levels[3])):
        _arrow(ax, (edge, y), (chain, y), L3, 2)
        ax.text((edge + chain) / 2, y + 0.16, f"${name}$", color=L3, ha="center", va="center")
        shape = f"$(d_t, {width})$"
        ax.text((edge + chain) / 2, y - 0.19, shape, color=L3, ha="center", va="center", fontsize=11)


def _key(ax: Axes) -> None:
    """What the colours inside the layer mean."""
    for y, colour, text in (
        (5.9, L3, "learned, used here"),
        (5.55, LIGHT, "learned, not read now"),
        (5.2, PALE, "nothing to learn"),
    ):
        ax.add_patch(Rectangle((3.4, y - 0.1), 0.3, 0.2, color=colour))
        ax.text(3.82, y, text, va="center", fontsize=11)


def _box(ax: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    """A box around the point (x, y)."""
    height = 0.38
    ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, color=colour))
    ink = "black" if colour == PALE else "white"
    ax.text(x, y, text, ha="center", va="center", color=ink, weight="bold" if ink == "white" else None)


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = "black",
    width: float = 1.3,
) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, **look))
