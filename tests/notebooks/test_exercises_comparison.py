"""Notebook 05's checkers tell right from wrong answers."""

import numpy as np
import pytest
from scipy import stats

from l3paper.experiments import statistics
from l3paper.notebooks.exercises import check


def flops(n_embd, d_up, mean_rows):
    return 2 * (n_embd * d_up + (d_up + n_embd) * n_embd) + 4 * mean_rows * n_embd


def balance(n_experts):
    return n_experts / 2, 1.0


def equal(gaps, margin, level=0.1):
    half = stats.t.ppf(1 - level / 2, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return abs(np.mean(gaps)) + half < margin


def planned(gain, deviation):
    return statistics.seeds_needed(gain, deviation, above=0.0)


@pytest.mark.parametrize(
    ("number", "answer"),
    [*enumerate((flops, balance, statistics.holm, equal, planned), start=1)],
)
def test_right_answers_pass(number, answer, capsys):
    check(f"05.{number}", answer)
    assert "correct" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "answer", "hint"),
    [
        (1, lambda *sizes: flops(*sizes) / 2, "two projections"),
        (1, lambda n_embd, d_up, rows: flops(n_embd, d_up, rows) - 2 * rows * n_embd, "used twice"),
        (2, lambda n: (1.0, n / 2), "what are f and P"),
        (3, lambda p_values: [min(1.0, len(p_values) * p) for p in p_values], "become"),
        (4, lambda gaps, margin: not equal(gaps, 0.0) and np.ptp(gaps) > 0.001, "covers 0"),
        (5, lambda gain, deviation: 4 * planned(gain, deviation), "far off"),
    ],
)
def test_wrong_answers_get_a_hint(number, answer, hint):
    with pytest.raises(AssertionError, match=hint):
        check(f"05.{number}", answer)
