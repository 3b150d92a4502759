"""Figures of notebook 01: the idea of L3, the scan, and who owns how many rows."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from l3paper.notebooks.plots import COLOURS, figure

Phrase = tuple[str, ...]


def idea(contexts: Sequence[str], token: str, rows: Sequence[str], weights: np.ndarray) -> Figure:
    """A token in several contexts: one embedding on the left, its rows of an L3 layer on the right.

    weights: (contexts, rows); a line between a context and a row is as thick as their weight.
    """
    fig, ax = figure(width=10.5, height=3.2)
    ax.axis("off")
    ax.set(xlim=(0, 10.5), ylim=(-0.5, len(contexts) - 0.5))
    heights = np.arange(len(contexts))[::-1]
    middle = heights.mean()
    ax.set_title("An embedding: one vector")
    ax.set_title("An L3 layer: rows to choose from", loc="right")
    _box(ax, 0.85, middle, f"the vector\nof “{token}”", "0.35")
    for context, y, by_row in zip(contexts, heights, weights, strict=True):
        ax.text(4.5, y, f"{context} $\\bf{{{token}}}$", ha="center", va="center", fontsize=12.5)
        ax.plot([1.65, 3.05], [middle, y], color="0.35", lw=2)
        for row, (weight, end) in enumerate(zip(by_row, heights, strict=True)):
            ax.plot([5.95, 8.4], [y, end], color=COLOURS[row], lw=0.6 + 7 * weight, alpha=0.75)
            if weight > 0.1:
                at = 5.95 + 2.45 * 0.2, y + (end - y) * 0.2
                ax.text(*at, f"{weight:.2f}", ha="center", va="center", bbox=_PAPER, fontsize=12)
    for row, (name, y) in enumerate(zip(rows, heights, strict=True)):
        _box(ax, 9.4, y, f"row {row}\n{name}", COLOURS[row])
    return fig


_PAPER = dict(fc="white", ec="none", alpha=0.9, pad=1.5)


def _box(ax: Axes, x: float, y: float, label: str, colour: str, full: bool = True, size=12) -> None:
    box = dict(boxstyle="round,pad=0.35", fc=colour if full else "white", ec=colour, lw=1.8)
    look = dict(ha="center", va="center", weight="bold", fontsize=size, linespacing=1.25)
    ax.text(x, y, label, color="white" if full else colour, bbox=box, **look)


def scan_frames(
    documents: Sequence[Sequence[str]], vocabulary: Sequence[str], n_emb: int, k_max: int
) -> Iterator[Figure]:
    """Frames of an animation of Algorithm 1: one per piece of the LZ78 parse, then one per codeword.

    Every frame shows the text cut so far, the dictionary as a trie with counts, and the rows per token.
    """
    states = list(_scan(documents, vocabulary))
    pieces, counts, _ = states[-1]
    places = lay_out(counts)
    rows = dict.fromkeys(vocabulary, 1)
    for parsed, known, said in states:
        yield _frame(documents, parsed, known, places, rows, said, parsed[-1], reading=True)
    for phrase in sorted((p for p in counts if counts[p]), key=lambda p: -counts[p]):
        token = phrase[-1]
        free = rows[token] < k_max
        rows[token] += free
        said = f"“{' '.join(phrase)}” ({counts[phrase]}): {token} {'+1' if free else 'is at the cap'}"
        yield _frame(documents, pieces, counts, places, rows, said, phrase)
        if sum(rows.values()) == n_emb:
            break
    for _ in range(2):  # the last frame stays longer
        yield _frame(documents, pieces, counts, places, rows, f"all {n_emb} rows are given")


def _scan(documents, vocabulary) -> Iterator[tuple[list[Phrase], dict[Phrase, int], str]]:
    """After every piece: the pieces so far, the dictionary, and what happened in words."""
    counts: dict[Phrase, int] = {(token,): 0 for token in vocabulary}
    pieces: list[Phrase] = []
    for document in documents:
        start = 0
        while start < len(document):
            end = start + 1
            while end < len(document) and tuple(document[start : end + 1]) in counts:
                end += 1
            known, piece = tuple(document[start:end]), tuple(document[start : end + 1])
            counts = counts | {known: counts[known] + 1}
            said = f"“{' '.join(known)}” +1"
            if piece != known:
                counts |= {piece: 1}
                said += f", new: “{' '.join(piece)}”"
            pieces = [*pieces, piece]
            yield pieces, counts, said
            start = end + 1


def lay_out(phrases: Mapping[Phrase, int]) -> dict[Phrase, tuple[float, int]]:
    """Where each phrase stands in the trie: leaves side by side, parents above their middle."""
    places: dict[Phrase, tuple[float, int]] = {}

    def put(phrase: Phrase, left: float) -> float:
        right = left
        for child in (p for p in phrases if p[:-1] == phrase):
            right = put(child, right)
        right = max(right, left + 1)
        places[phrase] = ((left + right) / 2, -len(phrase))
        return right

    put((), 0)
    return places


def _frame(
    documents, pieces, counts, places, rows, said: str, marked: Phrase = (), reading=False
) -> Figure:
    """One picture of the text, the trie and the rows; `marked` is the node to point at."""
    fig, (left, right) = figure(2, width=8.4, height=4.1)
    fig.set_layout_engine("none")  # so that nothing moves from frame to frame
    left.set_position((0.01, 0.01, 0.37, 0.9))
    right.set_position((0.4, 0.01, 0.59, 0.95))
    colours = dict(zip(rows, COLOURS, strict=False))
    left.set_title(said, fontsize=12)
    left.axis("off")
    _draw_text(left, documents, pieces, reading)
    _draw_rows(left, rows, colours)
    right.axis("off")
    right.set(xlim=(0, max(x for x, _ in places.values()) + 0.6), ylim=(-4.5, 0.3))
    for phrase in (p for p in places if p in counts):
        (x, y), parent = places[phrase], places[phrase[:-1]]
        right.plot([parent[0], x], [parent[1], y], color="0.75", lw=1.5, zorder=0)
        label, colour = f"{phrase[-1]}\n{counts[phrase]}", colours[phrase[-1]]
        if phrase == marked:
            _box(right, x, y, label, "black", size=15.5)
        _box(right, x, y, label, colour, counts[phrase] > 0, size=11.5)
    _box(right, *places[()], "start", "0.5", size=11.5)
    return fig


def _draw_text(ax: Axes, documents, pieces, reading: bool) -> None:
    """One document per line, finished pieces framed; `reading` frames the last of them in black."""
    ax.set(xlim=(0, 5.2), ylim=(-8.4, 0.5))
    unframed = list(pieces)
    for line, document in enumerate(documents):
        for place, token in enumerate(document):
            ax.text(place + 0.5, -line, token, ha="center", va="center", fontsize=12)
        start = 0
        while unframed and start < len(document):
            piece = unframed.pop(0)
            look = dict(ec="black", lw=2.4) if reading and not unframed else dict(ec="0.7", lw=1.2)
            corner = (start + 0.04, -line - 0.4)
            ax.add_patch(Rectangle(corner, len(piece) - 0.08, 0.8, fill=False, **look))
            start += len(piece)


def _draw_rows(ax: Axes, rows: Mapping[str, int], colours: Mapping[str, str]) -> None:
    """A stack of squares per token, as many as it owns rows."""
    width = 5.2 / len(rows)
    for place, (token, number) in enumerate(rows.items()):
        x = (place + 0.5) * width
        ax.text(x, -8.1, token, ha="center", va="center", fontsize=12)
        for row in range(number):
            at = (x - 0.27, -7.6 + 0.75 * row)
            ax.add_patch(Rectangle(at, 0.54, 0.62, fc=colours[token], ec="none"))
    ax.text(0, -7.6 + 0.75 * 3, "rows:", va="bottom", fontsize=12, weight="bold")


def zipf(alloc: np.ndarray, token_counts: np.ndarray, k_max: int, names: Mapping[int, str]) -> Figure:
    """Rows of every token over its rank by frequency; `names` labels the tokens at some ranks."""
    by_frequency = np.argsort(-token_counts, kind="stable")
    rows, ranks = alloc[by_frequency], np.arange(1, len(alloc) + 1)
    fig, ax = figure(width=8.5, height=4.6)
    share = token_counts[by_frequency] / token_counts.sum()
    proportional = 1 + (alloc.sum() - len(alloc)) * share
    ax.plot(ranks, proportional, color="black", lw=1.5, label="in proportion to frequency, no cap")
    groups = {
        "at the cap": (rows == k_max, COLOURS[1]),
        "more than one row": ((rows > 1) & (rows < k_max), COLOURS[5]),
        "one row": (rows == 1, "0.6"),
    }
    for label, (mask, colour) in groups.items():
        ax.plot(ranks[mask], rows[mask], "o", ms=3.5, alpha=0.8, color=colour, label=label)
    for rank, name in names.items():
        y = rows[rank - 1]
        above = y > proportional[rank - 1] / 2
        spot = (rank * 1.15, y * 4) if above else (rank * 0.25, y * 0.9)
        look = dict(weight="bold", zorder=5, bbox=_PAPER, arrowprops=dict(arrowstyle="-", lw=1.2))
        ax.annotate(name, (rank, y), spot, **look)
    ax.set(xscale="log", yscale="log", xlabel="rank of the token by frequency", ylabel="rows $d_t$")
    ax.set_title("Frequent tokens own more rows, but the spread is wide")
    ax.legend(loc="lower left", markerscale=2)
    return fig


def uncertainty(bits: np.ndarray, ratio: np.ndarray) -> Figure:
    """Rows by LZW over rows by frequency, one point per token, against its H_next in bits."""
    fig, ax = figure(width=8, height=4.2)
    ax.axhline(1, color="black", lw=1)
    ax.plot(bits, ratio, "o", ms=4, alpha=0.35, mec="none", color=COLOURS[0])
    bins = bits.astype(int)
    filled = [b for b in range(bins.max() + 1) if (bins == b).sum() >= 10]
    middle = [np.median(ratio[bins == b]) for b in filled]
    ax.plot(np.add(filled, 0.5), middle, "s-", color=COLOURS[1], label="median of each bit")
    ax.set(yscale="log", xlabel="uncertainty of the next token, $H_\\mathrm{next}$ (bits)")
    ax.set_ylabel("rows by LZW / by frequency")
    ax.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    ax.minorticks_off()
    ax.set_title("LZW gives few rows where the next token is nearly certain")
    ax.legend(loc="lower right")
    return fig


def cap(caps: Sequence[int], means: Sequence[float], plain: float, uncapped: float) -> Figure:
    """Mean rows of a position for several caps, beside the plain mean and the mean without a cap."""
    fig, ax = figure(width=8, height=4.0)
    ax.plot(caps, means, "o-", color=COLOURS[0], label="a position of the text (weighted mean)")
    ax.axhline(uncapped, color=COLOURS[0], ls=":", lw=1.5)
    ax.text(caps[0], uncapped * 1.06, "without a cap", color=COLOURS[0])
    ax.axhline(plain, color=COLOURS[1], ls="--", label="a token of the vocabulary (plain mean)")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(caps, [f"{k:,}" for k in caps])
    ax.minorticks_off()
    ax.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    ax.set(ylim=(9, 700), xlabel="cap $k$", ylabel="mean rows $d_t$")
    ax.set_title("The cap decides what a position costs; the plain mean does not see it")
    ax.legend(loc="center right", bbox_to_anchor=(1, 0.42))
    return fig
