"""Checkers of notebook 04."""

from collections.abc import Callable, Mapping

import numpy as np

from l3paper.train import learning_rate_factor


def check_1(answer: Callable[[int, int, int, int], float]) -> None:
    """A schedule for `steps` steps which, from step `now` on, falls on a line to zero at step `end`."""
    for steps, now, end in ((1000, 300, 700), (1000, 600, 800), (1000, 800, 900)):
        case = f"With steps, now, end = {steps}, {now}, {end}:"
        cut = [answer(step, steps, now, end) for step in range(end + 1)]
        plan = [learning_rate_factor(step, steps) for step in range(end)]
        assert np.allclose(cut[:now], plan[:now]), f"{case} until step {now} follow the old plan."
        assert np.isclose(cut[now], plan[now]), (
            f"{case} step {now} jumps to {cut[now]:.3f}. Start from {plan[now]:.3f}, where the plan is."
        )
        assert abs(cut[end]) < 1e-9, f"{case} the factor ends at {cut[end]:.3f}, not at 0."
        falls = np.diff(cut[now:])
        assert np.allclose(falls, falls[0]), f"{case} from step {now} on, fall on one straight line."


def check_2(answer: Callable[[float, int, int], float]) -> None:
    """Nats per token to bits per byte."""
    bits = answer(1.0, 1, 1)
    assert not np.isclose(bits, np.log(2)), "One nat is more than one bit: divide by ln 2."
    assert np.isclose(bits, 1 / np.log(2)), "One nat is 1 / ln 2 = 1.44 bits."
    assert np.isclose(answer(3.0, 100, 400), 0.75 / np.log(2)), (
        "Multiply by the tokens for the nats of the whole text; its bytes share them."
    )


def check_3(answer: Callable[[Mapping[float, float]], tuple[float, float]]) -> None:
    """The (factor, loss) of a parabola's lowest point, through the best factor and its neighbours."""
    for x, low, steep in ((0.25, 3.6, 0.02), (-0.4, 3.5, 0.05)):
        losses = {2.0**i: low + steep * (i - x) ** 2 for i in (-1, 0, 1)}
        factor, loss = answer(losses)
        assert not np.isclose(factor, x), "That is the logarithm of the factor: return 2 to its power."
        assert np.isclose(factor, 2**x), (
            f"For {losses} the factor is {2**x:.3f}, not {factor:.3f}. Did you fit over its logarithm?"
        )
        assert np.isclose(loss, low), f"The lowest loss of that parabola is {low}, not {loss:.4f}."
    wide = {0.25: 9.0, 0.5: 3.625, 1.0: 3.6, 2.0: 3.625}
    assert np.isclose(answer(wide)[1], 3.6), "Use the best factor and its two neighbours, no others."


def check_4(answer: Callable[[float, float, int], float]) -> None:
    """The probability that Student's interval over so many paired seeds lies above 0."""
    from scipy import stats

    for gain, deviation, seeds in ((0.01, 0.0045, 3), (0.005, 0.0045, 8), (0.0, 0.0045, 5)):
        quantile = stats.t.ppf(0.975, seeds - 1)
        exact = stats.nct.sf(quantile, seeds - 1, gain / deviation * np.sqrt(seeds))
        power = answer(gain, deviation, seeds)
        case = f"A gain of {gain}, a deviation of {deviation} and {seeds} seeds"
        assert power < exact + 0.04, (
            f"{case}: {power:.2f} is too high. Is it Student's quantile, and the deviation of one gap?"
        )
        assert power > exact - 0.04, (
            f"{case}: {power:.2f} is too low. Is the standard error the deviation over the seeds' root?"
        )
