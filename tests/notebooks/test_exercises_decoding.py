"""The checkers and the figures of notebook 07."""

import math

import matplotlib.pyplot as plt
import pytest

from l3paper.notebooks.drawings import decoding as draw
from l3paper.notebooks.exercises import check

ALLOC, COUNTS = [8, 4, 4, 1, 1] * 10, [10, 12, 12, 3, 50] * 10


def nucleus(chances, top_p):
    kept = sorted(range(len(chances)), key=lambda t: -chances[t])
    sums = [sum(chances[t] for t in kept[: n + 1]) for n in range(len(kept))]
    return set(kept[: 1 + next(n for n, total in enumerate(sums) if total >= top_p - 1e-9)])


def place(bounds, token, width, bytes_per_number):
    first, last = bounds[token : token + 2]
    return first * width * bytes_per_number, (last - first) * width * bytes_per_number


def kept_by(value):
    """Keep tokens by a value of (rows, count), the largest first, while they fit."""

    def keep(alloc, counts, budget):
        kept = set()
        for token in sorted(range(len(alloc)), key=lambda t: -value(alloc[t], counts[t])):
            if alloc[token] <= budget:
                kept.add(token)
                budget -= alloc[token]
        return kept

    return keep


def blocks(copy_bytes, speed, start, block):
    return math.ceil((start + copy_bytes / speed) / block)


@pytest.mark.parametrize(
    ("exercise", "answer", "context"),
    [
        ("07.1", nucleus, {}),
        ("07.2", place, {}),
        ("07.3", kept_by(lambda rows, count: count), {"alloc": ALLOC, "token_counts": COUNTS}),
        ("07.4", blocks, {}),
    ],
)
def test_right_answers_pass(exercise, answer, context, capsys):
    check(exercise, answer, **context)
    assert capsys.readouterr().out == f"exercise {exercise}: correct\n"


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"),
    [
        ("07.1", lambda chances, top_p: {1}, "must add up"),
        ("07.1", lambda chances, top_p: set(range(4)), "the fewest"),
        ("07.2", lambda bounds, t, width, n: (bounds[t] * width, 2 * width), "bytes, not numbers"),
        ("07.2", lambda bounds, t, width, n: (bounds[t] * n, 2 * width * n), "a row has `width`"),
        ("07.3", lambda alloc, counts, budget: range(len(alloc)), "there is room for 8"),
        ("07.3", kept_by(lambda rows, count: rows * count), "one kept row save"),
        ("07.3", kept_by(lambda rows, count: rows), "one kept row save"),
        ("07.4", lambda size, speed, start, block: math.ceil(size / speed / block), "start_seconds"),
        ("07.4", lambda size, speed, start, block: (start + size / speed) / block, "blocks are whole"),
    ],
)
def test_wrong_answers_get_a_hint(exercise, answer, hint):
    context = {"alloc": ALLOC, "token_counts": COUNTS} if exercise == "07.3" else {}
    with pytest.raises(AssertionError, match=hint):
        check(exercise, answer, **context)


def test_a_copy_that_is_slow_makes_the_layer_wait():
    shares = {"copy": 0.5, "block 0": 0.1, "L3": 0.2, "head": 0.1, "rest": 0.1}
    fig = draw.timeline(shares)
    ends = [max(bar.get_x() + bar.get_width() for bar in ax.patches) for ax in fig.axes]
    assert ends == pytest.approx([100, 90])
    plt.close(fig)


def test_only_rows_of_the_step_travel():
    fig = draw.small_table(["a", "b", "c"], [0, 2, 3, 7], [2, 2])
    places = [bar.get_x() for bar in fig.axes[0].patches]
    assert places.count(0) == 7
    assert places.count(2) == 4
    plt.close(fig)


def test_bytes_are_drawn_in_kilobytes():
    fig = draw.bytes_per_token([1, 2], [2000, 1000], [2000, 1000])
    assert list(fig.axes[0].lines[0].get_ydata()) == [2, 1]
    plt.close(fig)
