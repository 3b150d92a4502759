"""Paired gains and their intervals.

A gain is a difference of losses between models trained from the same seed on the same batches. Its
95 % interval is Student's, over the seeds, so that few seeds make it wide. A verdict depends on the
interval alone.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from l3paper.errors import at_least
from l3paper.experiments.search import Family

EQUAL = 0.02
"""Nats per token that still count as equal: a third of the smallest gain that the paper reports."""

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "not decidable at this scale"


class Gain(NamedTuple):
    """Nats per token by which one model is better than another, with its 95 % interval."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"

    def when_better(self) -> str:
        """The verdict on the claim that there is a gain."""
        return AGREES if self.low > 0 else DISAGREES if self.high < 0 else UNDECIDED

    def when_equal(self) -> str:
        """The verdict on the claim that the models are equal, to within EQUAL."""
        if max(-self.low, self.high) < EQUAL:
            return AGREES
        return DISAGREES if max(self.low, -self.high) > EQUAL else UNDECIDED


def over_seeds(gaps: Sequence[float]) -> Gain:
    """The gain whose values by seed are `gaps`.

    Raises ValueError for fewer than two seeds, and ImportError, naming the extra to install, without
    scipy.
    """
    at_least(2, seeds=len(gaps))
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("intervals need the extra l3paper[notebooks]: pip install scipy") from error
    mean = statistics.fmean(gaps)
    quantile = round(float(t.ppf(0.975, len(gaps) - 1)), 3)  # as printed tables of Student's t have it
    half = quantile * statistics.stdev(gaps) / len(gaps) ** 0.5
    return Gain(mean, mean - half, mean + half, tuple(gaps))


def paired_gain(of: Sequence[float], over: Sequence[float]) -> Gain:
    """The gain of one model over another from their losses by seed. Raises what `over_seeds` raises."""
    return over_seeds([theirs - ours for ours, theirs in zip(of, over, strict=True)])


def final_gain(of: Family, over: Family) -> Gain:
    """The gain on all held-out text at the end of training, over the seeds that both families have."""
    return _gain(of, over, evaluation=-1)


def early_gain(of: Family, over: Family) -> Gain:
    """The gain on a sample of the held-out text, at the first evaluation after the start."""
    return _gain(of, over, evaluation=1)


def _gain(of: Family, over: Family, evaluation: int) -> Gain:
    ours, theirs = (
        {run["config"]["seed"]: run["evaluations"][evaluation]["loss"] for run in family.runs}
        for family in (of, over)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    return paired_gain([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
