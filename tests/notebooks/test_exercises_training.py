"""Notebook 04's checkers tell right from wrong answers, and its figures can be drawn."""

import numpy as np
import pytest
from scipy import stats

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
