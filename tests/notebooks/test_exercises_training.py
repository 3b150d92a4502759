"""Notebook 04's checkers tell right from wrong answers, and its figures can be drawn."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from l3paper.experiments.statistics import paired_gain
from l3paper.notebooks.drawings import training as draw
from l3paper.notebooks.exercises import check
from l3paper.train import learning_rate_factor


def replanned(step, steps, now, end, start=1.0):
    """The right answer of exercise 1, if `start` is 1."""
    left = start * (end - step) / (end - now)
    return learning_rate_factor(step, steps) if step < now else left * learning_rate_factor(now, steps)


def bits_per_byte(nats, tokens, text_bytes):
    return nats * tokens / np.log(2) / text_bytes


def parabola(losses, scale=np.log2):
    best = min(losses, key=losses.get)
    near = [best / 2, best, 2 * best]
    a, b, c = np.polyfit(scale(near), [losses[x] for x in near], 2)
    x = -b / (2 * a)
    return (2**x if scale is np.log2 else x), a * x**2 + b * x + c


def power(gain, deviation, seeds, errors=None):
    gaps = np.random.default_rng(0).normal(gain, deviation, (4000, seeds))
    errors = errors or stats.t.ppf(0.975, seeds - 1)
    return np.mean(gaps.mean(1) - errors * gaps.std(1, ddof=1) / seeds**0.5 > 0)


@pytest.mark.parametrize(
    ("number", "answer"), [*enumerate((replanned, bits_per_byte, parabola, power), start=1)]
)
def test_right_answers_pass(number, answer, capsys):
    check(f"04.{number}", answer)
    assert "correct" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "answer", "hint"),
    [
        (1, lambda step, steps, now, end: learning_rate_factor(step, end), "follow the old plan"),
        (1, lambda *given: replanned(*given, start=0.5), "jumps"),
        (1, lambda step, steps, now, end: learning_rate_factor(step, steps), "not at 0"),
        (2, lambda nats, tokens, text_bytes: nats * np.log(2) * tokens / text_bytes, "divide by ln 2"),
        (2, lambda nats, tokens, text_bytes: nats / np.log(2), "Multiply by the tokens"),
        (3, lambda losses: (np.log2(parabola(losses)[0]), parabola(losses)[1]), "logarithm"),
        (3, lambda losses: parabola(losses, np.asarray), "over its logarithm"),
        (4, lambda *given: power(*given, errors=1.96), "Student's quantile"),
        (4, lambda gain, deviation, seeds: power(gain, deviation * seeds**0.5, seeds), "too low"),
    ],
)
def test_wrong_answers_get_a_hint(number, answer, hint):
    with pytest.raises(AssertionError, match=hint):
        check(f"04.{number}", answer)


def test_figures_are_drawn():
    losses = {"dense": [[4.2, 4.0], [4.3, 4.1]], "L3": [[4.1, 3.9], [4.2, 3.9]]}
    final = {
        family: {seed: run[-1] for seed, run in enumerate(runs)} for family, runs in losses.items()
    }
    gain = paired_gain(list(final["L3"].values()), list(final["dense"].values()))
    figs = [
        draw.schedules({20: [learning_rate_factor(step, 20) for step in range(20)]}),
        draw.curves([10, 20], losses, "Live", "a sample"),
        draw.search({family: {0.5: 3.0, 1.0: 2.0, 2.0: 3.0} for family in losses}),
        draw.recorded(final, gain),
    ]
    assert [len(fig.axes) for fig in figs] == [1, 2, 1, 2]
    plt.close("all")
