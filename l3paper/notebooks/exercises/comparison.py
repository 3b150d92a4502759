"""Checkers of notebook 05."""

import math

import numpy as np

from l3paper.costs.accounting import account
from l3paper.experiments import statistics
from l3paper.gpt import GPTConfig


def check_1(answer):
    """answer(n_embd, d_up, mean_rows) is the forward FLOPs per token that a tied L3 layer adds."""
    for width, d_up, mean in ((64, 256, 16.0), (128, 100, 3.5)):
        config = GPTConfig(8, 100, 2, 2, 2, width, l3_after_layers="0", l3_n_emb=100, l3_d_up=d_up)
        flops = account(config, mean).flops
        expected, found = flops["l3 projections"] + flops["l3 lookup"], answer(width, d_up, mean)
        hint = "two projections, and each row is used twice: as a key and as a value"
        assert math.isclose(found, expected), f"{found:,.0f} is not {expected:,.0f}: {hint}"


def check_2(answer):
    """answer(n_experts) is the balance term of a collapsed router with two experts, and an even one."""
    for n in (4, 16):
        collapsed, even = np.zeros(n), np.full(n, 1 / n)
        collapsed[:2] = 0.5
        expected = [n * float((p * p).sum()) for p in (collapsed, even)]  # here f = P
        assert np.allclose(answer(n), expected), f"for {n} experts: what are f and P?"


def check_3(answer):
    """answer(p_values) are Holm's adjusted p values, in their order."""
    for p_values in ([0.01, 0.04, 0.03], [0.2, 0.001, 0.03, 0.6], [0.5, 0.9]):
        found, expected = answer(p_values), statistics.holm(p_values)
        assert np.allclose(found, expected), f"{p_values} become {expected}, not {list(found)}"


def check_4(answer):
    """answer(gaps, margin) says whether two one-sided tests at 5 % show that models are equal."""
    cases = {
        (0.001, -0.002, 0.0015, 0.0): True,
        (0.02, -0.02, 0.01, -0.01): False,
        (0.01, 0.012, 0.011, 0.0105): False,
    }
    for gaps, expected in cases.items():
        hint = "the 90 % interval must lie inside the margin: it is not enough that it covers 0"
        assert bool(answer(list(gaps), 0.008)) == expected, f"wrong for {gaps}: {hint}"


def check_5(answer):
    """answer(gain, deviation) is the number of seeds that show a gain with power 0.8."""
    for gain, deviation in ((0.05, 0.01), (0.02, 0.012), (0.005, 0.01)):
        expected, found = statistics.seeds_needed(gain, deviation, above=0.0), answer(gain, deviation)
        assert abs(found - expected) <= max(2, 0.25 * expected), (
            f"for a gain of {gain} and a deviation of {deviation}, {found} seeds are far off"
        )
