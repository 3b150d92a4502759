"""Gains, their intervals, and verdicts on claims.

A gain is a difference of losses between models trained from the same seed on the same batches, in nats
per token; positive means that the first model is better. Student's t gives intervals and tests over
other seeds on the same held-out text; resampling gives intervals over other documents as well. Holm's
procedure corrects the verdicts of a table. Quantiles need scipy; without it, they raise ImportError,
which names the extra to install.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from l3paper.errors import at_least, at_most

LEVEL = 0.05
"""The probability that an interval misses, and that any verdict in a table of claims is wrong."""

POWER, MOST = 0.8, 1000
"""The probability of a verdict that `seeds_needed` asks for, and the most seeds that it considers."""

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "not decidable at this scale"


class Deviation(NamedTuple):
    """A standard deviation of gaps between seeds, in nats per token, with its degrees of freedom."""

    value: float
    degrees: int


@dataclass(frozen=True)
class Gain:
    """Nats per token by which one model is better than another.

    `deviation` is that of the gaps by seed: their own, or one pooled over several contrasts.
    """

    mean: float
    by_seed: tuple[float, ...]
    deviation: Deviation

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"

    @property
    def standard_error(self) -> float:
        """The standard deviation over the root of the number of seeds."""
        return self.deviation.value / math.sqrt(len(self.by_seed))

    def half_width(self, level: float = LEVEL) -> float:
        """Half the length of Student's interval (Student 1908) that misses with probability `level`."""
        quantile = _scipy_stats().t.ppf(1 - level / 2, self.deviation.degrees)
        return float(quantile) * self.standard_error

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.mean - self.half_width()

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self.mean + self.half_width()

    def p_above(self, threshold: float = 0.0) -> float:
        """The p value of Student's one-sided t-test: small if the gain is above `threshold`.

        Raises ValueError if the gaps do not vary at all: such a test would always be sure.
        """
        return self._upper_tail(self.mean - threshold)

    def p_below(self, threshold: float = 0.0) -> float:
        """The same for a gain below `threshold`."""
        return self._upper_tail(threshold - self.mean)

    def _upper_tail(self, distance: float) -> float:
        if self.standard_error == 0:
            raise ValueError(f"by_seed is {self.by_seed}; a test needs gaps that vary")
        t = _scipy_stats().t
        return float(t.sf(distance / self.standard_error, self.deviation.degrees))

    def pooled(self, deviation: Deviation) -> "Gain":
        """Return the same gain with a deviation from `pooled_deviation`."""
        return replace(self, deviation=deviation)


def over_seeds(gaps: Sequence[float]) -> Gain:
    """Return the gain with these values by seed: at least two, all finite, or ValueError."""
    gaps = tuple(float(gap) for gap in gaps)
    at_least(2, seeds=len(gaps))
    if not all(map(math.isfinite, gaps)):
        raise ValueError(f"gaps is {gaps}; all of them must be finite")
    return Gain(statistics.fmean(gaps), gaps, Deviation(statistics.stdev(gaps), len(gaps) - 1))


def paired_gain(of: Sequence[float], over: Sequence[float]) -> Gain:
    """Return the gain of one model over another from their losses, in the same order of seeds.

    Raises what `over_seeds` raises, and ValueError for different numbers of seeds.
    """
    _require_equal(of=of, over=over)
    return over_seeds([theirs - ours for ours, theirs in zip(of, over, strict=True)])


def gain_on_common_seeds(of: Mapping[int, float], over: Mapping[int, float]) -> Gain:
    """Return the gain of one model over another from losses by seed, over the seeds that both have."""
    return over_seeds([over[seed] - of[seed] for seed in sorted(of.keys() & over.keys())])


def share_contrast(part: Sequence[float], whole: Sequence[float], share: float) -> Gain:
    """Return the contrast `part - share * whole`, above 0 if `part` is more than that share of `whole`.

    Both are gains by seed over one baseline. "Uniform keeps 80 % of the gain of LZW" has the part
    dense - uniform and the whole dense - LZW. The ratio itself is not tested: it is not normally
    distributed, and it explodes where the whole comes near 0. Multiplied out, the claim is about a
    linear contrast of paired losses, to which Student's t applies. Fieller's interval of a ratio (1954)
    is the set of shares that this test does not reject. Raises what `paired_gain` raises.
    """
    _require_equal(part=part, whole=whole)
    return over_seeds([p - share * w for p, w in zip(part, whole, strict=True)])


def _require_equal(**by_seed: Sequence[float]) -> None:
    (one, first), (other, second) = by_seed.items()
    if len(first) != len(second):
        raise ValueError(f"{one} has {len(first)} seeds and {other} {len(second)}; give both the same")


def slope_per_doubling(x: Sequence[float], gaps: Sequence[Sequence[float]]) -> Gain:
    """Return the slope of `gaps`, of shape (seeds, points), per doubling of `x`, of shape (points,).

    Each seed has its own least-squares line over log2 x, and its slope is one observation, so that the
    points of one seed may depend on each other.
    """
    slopes, _ = np.polyfit(np.log2(x), np.transpose(gaps), 1)
    return over_seeds(slopes)


def pooled_deviation(gains: Sequence[Gain]) -> Deviation:
    """Return the pooled standard deviation of several contrasts of one text and one size of model.

    It is the root of the mean of the variances, weighted by their degrees of freedom, which add up. The
    assumption is that all contrasts have one true variance; a noisier one gets too short an interval.
    Degrees of freedom add up for independent contrasts. For eight that share a model, 95 % intervals
    cover 93 % with three seeds and 94 % with eight, as simulated.
    """
    at_least(1, gains=len(gains))
    deviations = [gain.deviation for gain in gains]
    degrees = sum(one.degrees for one in deviations)
    squares = sum(one.degrees * one.value**2 for one in deviations)
    return Deviation(math.sqrt(squares / degrees), degrees)


def two_way_interval(
    gaps: np.ndarray, tokens: np.ndarray, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a gain, in nats per token, over other seeds and other documents.

    `gaps`, of shape (seeds, documents), holds differences of losses summed over each document, in nats;
    `tokens`, of shape (documents,), its numbers of tokens. Both sides are resampled independently, with
    replacement: the pigeonhole bootstrap (Owen 2007), which is rather too long than too short. Its
    percentiles are expanded (Hesterberg, arXiv:1411.5279): with few seeds it is as long as Student's
    interval.

    Raises ValueError for fewer than five seeds: no resample leaves the range of the seeds, which misses
    the centre of a symmetric distribution with probability 2 / 2**seeds, 25 % for three.
    """
    gaps, tokens = np.asarray(gaps, float), np.asarray(tokens, float)
    if gaps.ndim != 2 or tokens.shape != gaps.shape[1:]:
        raise ValueError(f"gaps has shape {gaps.shape}, tokens {tokens.shape}; give (S, D) and (D,)")
    seeds, documents = gaps.shape
    at_least(5, seeds=seeds)
    at_least(2, documents=documents)
    stats = _scipy_stats()
    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for some in np.array_split(drawn, -(-resamples // 500)):  # weights of all would take GB
        seed_weights = _resample_counts(generator, len(some), seeds) / seeds  # (resamples, seeds)
        weights = _resample_counts(generator, len(some), documents)  # (resamples, documents)
        some[:] = ((seed_weights @ gaps) * weights).sum(1) / (weights @ tokens)
    quantile = stats.t.ppf(level / 2, seeds - 1) * math.sqrt(seeds / (seeds - 1))
    outside = stats.norm.cdf(quantile)
    low, high = np.quantile(drawn, [outside, 1 - outside])
    return float(low), float(high)


def _resample_counts(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """How often `size` draws hit each of `size` items: multinomial counts, of shape (count, size)."""
    draws = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
    return np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)


@dataclass(frozen=True)
class Evidence:
    """What a gain says on the claim that the true gain lies between `above` and `below`.

    "Better" has above=0; "keeps less than this share" has below=0 on a `share_contrast`; "equal" has
    above=-margin and below=margin. Each claim has a test for it and a test for its contrary.
    """

    gain: Gain
    above: float = -math.inf
    below: float = math.inf

    @property
    def p_agrees(self) -> float:
        """A small value shows that the claim is right.

        It is the greater of the limits' one-sided p values; for "equal", these are Schuirmann's two
        one-sided tests (TOST, 1987).
        """
        return max(self.gain.p_above(self.above), self.gain.p_below(self.below))

    @property
    def p_disagrees(self) -> float:
        """A small value shows that the claim is wrong: the gain is beyond one of the limits."""
        return min(self.gain.p_below(self.above), self.gain.p_above(self.below))

    @property
    def p(self) -> float:
        """The two-sided p value: twice the smaller of the two, since the verdict may go either way."""
        return min(1.0, 2 * min(self.p_agrees, self.p_disagrees))

    def what_would_decide(self, claims: int) -> str:
        """Say how many seeds would decide the claim, one of so many, if what was seen is typical."""
        mean, deviation = self.gain.mean, self.gain.deviation.value
        needed = seeds_needed(mean, deviation, self.above, self.below, LEVEL / claims)
        return f"{needed or f'more than {MOST:,}'} seeds would decide"


class Verdict(NamedTuple):
    """The verdict on one claim, and its p value, corrected for the table."""

    word: str
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values, in their order, as Holm's step-down procedure (1979) adjusts them.

    Rejecting those up to a level rejects any true hypothesis with at most that probability, whatever
    their dependence. Raises ValueError for a value outside [0, 1].
    """
    for p in p_values:
        at_least(0, p=p)
        at_most(1, p=p)
    order, count = np.argsort(p_values), len(p_values)
    adjusted = np.empty(count)
    adjusted[order] = np.maximum.accumulate(np.sort(p_values) * np.arange(count, 0, -1))
    return np.minimum(adjusted, 1).tolist()


def verdicts(table: Sequence[Evidence | None], level: float = LEVEL) -> list[Verdict]:
    """Return the verdict on every claim of a table, at `level` for all of them together.

    A claim on which there is no evidence yet, None, has the p value 1 and is counted all the same: new
    evidence on other claims may decide an undecided one, and changes no verdict that is given.

    Holm's procedure corrects the two-sided p values, and a rejected row takes the side of its smaller
    p value. This is valid. If the true gain is exactly on a claim's limit, both verdicts are wrong; the
    row is then an ordinary two-sided test, for which Holm's guarantee holds. Elsewhere only one of the
    two verdicts is wrong, and its probability is not greater. That the guarantee extends to such errors
    of direction is proven for independent rows (Shaffer 1980; Finner 1999); the tests simulate it for
    rows that share a model.
    """
    return [
        Verdict(UNDECIDED, p)
        if p > level
        else Verdict(AGREES if row.p_agrees < row.p_disagrees else DISAGREES, p)
        for row, p in zip(table, holm([row.p if row else 1.0 for row in table]), strict=True)
    ]


def seeds_needed(
    mean: float,
    deviation: float,
    above: float = -math.inf,
    below: float = math.inf,
    level: float = LEVEL,
) -> int | None:
    """Return the smallest number of seeds that decides an `Evidence` with power POWER, None above MOST.

    `mean` and `deviation` are those supposed of the gaps by seed. `level` is that of one row; Holm's
    procedure begins at LEVEL over the number of rows. The power is that of the one-sided t-test at half
    the level, by the noncentral t distribution. For a mean between two limits it is Bonferroni's lower
    bound, P(first) + P(second) - 1; around 0.8 it is hardly below the exact power.
    """
    if not deviation > 0:
        raise ValueError(f"deviation is {deviation}; it must be above 0")
    stats = _scipy_stats()
    seeds = np.arange(2, MOST + 1)
    critical = stats.t.ppf(1 - level / 2, seeds - 1)

    def power_over(distance: float) -> np.ndarray | float:
        if math.isinf(distance):
            return 1.0
        return stats.nct.sf(critical, seeds - 1, distance / deviation * np.sqrt(seeds))

    if above < mean < below:
        reached = power_over(mean - above) + power_over(below - mean) - 1
    else:
        reached = power_over(max(above - mean, mean - below))
    enough = seeds[reached >= POWER]
    return int(enough[0]) if enough.size else None


def _scipy_stats():
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("intervals need the extra l3paper[notebooks]: pip install scipy") from error
    return stats
