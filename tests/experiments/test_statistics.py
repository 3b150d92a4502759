"""Intervals, p values and verdicts: against printed values, hand calculation, scipy and simulation.

A simulated share may be off by 3.5 standard deviations of a binomial count. The draws are seeded.
"""

import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats

from l3paper.experiments.statistics import (
    AGREES,
    DISAGREES,
    UNDECIDED,
    Evidence,
    gain_on_common_seeds,
    holm,
    over_seeds,
    paired_gain,
    pooled_deviation,
    seeds_needed,
    share_contrast,
    slope_per_doubling,
    two_way_interval,
    verdicts,
)

# Extra hours of sleep of ten patients with two drugs: the example of Student (1908).
SLEEP = (
    (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0),
    (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4),
)


def tolerance(share, trials):
    return 3.5 * math.sqrt(share * (1 - share) / trials)


def standard(mean, seeds=4, deviation=1.0):
    """A gain with this mean and standard deviation."""
    gaps = np.linspace(-1, 1, seeds)
    return over_seeds(mean + deviation * gaps / gaps.std(ddof=1))


# Student


@pytest.mark.parametrize(
    ("degrees", "at_95", "at_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (4, 2.776, 4.604), (7, 2.365, 3.499), (15, 2.131, 2.947)],
)
def test_half_width_is_the_quantile_of_printed_tables(degrees, at_95, at_99):
    gain = standard(0.3, seeds=degrees + 1)
    root = math.sqrt(degrees + 1)
    assert gain.half_width() * root == pytest.approx(at_95, abs=5e-4)
    assert gain.half_width(0.01) * root == pytest.approx(at_99, abs=5e-4)
    assert gain.high - gain.mean == pytest.approx(gain.half_width())
    assert gain.mean - gain.low == pytest.approx(gain.half_width())


def test_students_own_example():
    gain = paired_gain(of=SLEEP[0], over=SLEEP[1])
    assert gain.mean == pytest.approx(1.58)
    assert gain.standard_error == pytest.approx(0.389, abs=5e-4)
    assert (gain.low, gain.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert Evidence(gain, above=0).p == pytest.approx(0.002833, abs=5e-7)
    assert str(gain) == "+1.5800 (+0.7001 to +2.4599)"


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.2])
def test_p_values_are_those_of_scipys_paired_test(threshold):
    ours, theirs = np.random.default_rng(0).normal(size=(2, 6))
    gain = paired_gain(ours, theirs)
    for p, side in ((gain.p_above, "greater"), (gain.p_below, "less")):
        expected = stats.ttest_rel(theirs - threshold, ours, alternative=side).pvalue
        assert p(threshold) == pytest.approx(expected)
    both = stats.ttest_1samp(theirs - ours, threshold).pvalue
    assert Evidence(gain, above=threshold).p == pytest.approx(both)


def test_small_p_values_do_not_round_to_zero():
    far = standard(1e4, seeds=6)
    assert 0 < far.p_above() < 1e-16
    assert standard(-1e4, seeds=6).p_below() == pytest.approx(far.p_above())


@pytest.mark.parametrize("seeds", [2, 3, 12])
def test_interval_covers_as_often_as_it_says(seeds):
    trials = 800
    draws = np.random.default_rng(seeds).normal(0.3, 2, size=(trials, seeds))
    gains = [over_seeds(draw) for draw in draws]
    share = np.mean([abs(gain.mean - 0.3) <= gain.half_width() for gain in gains])
    assert share == pytest.approx(0.95, abs=tolerance(0.95, trials))


@pytest.mark.parametrize("seeds", [0, 1])
def test_too_few_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match=f"seeds is {seeds}; it must be at least 2"):
        over_seeds([1.0] * seeds)


def test_gaps_that_cannot_be_tested_are_refused():
    with pytest.raises(ValueError, match=r"nan.*must be finite"):
        over_seeds([1.0, math.nan])
    same = over_seeds([0.1, 0.1, 0.1])
    assert same.half_width() == 0
    with pytest.raises(ValueError, match="gaps that vary"):
        same.p_above()


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"l3paper\[notebooks\]"):
        over_seeds([1.0, 2.0]).half_width()


def test_losses_by_seed_are_paired_over_the_seeds_that_both_have():
    gain = gain_on_common_seeds(of={0: 1.0, 2: 2.0, 1: 5.0}, over={1: 7.0, 0: 4.0, 3: 9.0})
    assert gain.by_seed == (3.0, 2.0)
    with pytest.raises(ValueError, match="seeds is 1"):
        gain_on_common_seeds({0: 1.0, 1: 1.0}, {1: 2.0})


# Several contrasts, shares and trends


def test_pooled_deviation_weighs_variances_by_their_degrees():
    three, five = standard(1, seeds=3, deviation=1), standard(2, seeds=5, deviation=2)
    pooled = pooled_deviation([three, five])
    assert pooled.degrees == 6
    assert pooled.value == pytest.approx(math.sqrt(3))  # (2 * 1 + 4 * 4) / 6
    # 2.447 is the quantile of 6 degrees of freedom
    assert three.pooled(pooled).half_width() == pytest.approx(2.447 * math.sqrt(3 / 3), abs=5e-4)
    assert three.pooled(pooled).by_seed == three.by_seed
    with pytest.raises(ValueError, match="gains is 0"):
        pooled_deviation([])


def test_pooled_deviation_is_that_of_the_two_sample_t_test():
    gains = [over_seeds(drug) for drug in SLEEP]
    pooled = pooled_deviation(gains)
    statistic = (gains[0].mean - gains[1].mean) / (pooled.value * math.sqrt(2 / 10))
    test = stats.ttest_ind(*SLEEP)
    assert (statistic, pooled.degrees) == pytest.approx((test.statistic, test.df))


@pytest.mark.parametrize(("shared", "expected"), [(False, 0.95), (True, 0.94)])
def test_pooled_interval_covers(shared, expected):
    trials, contrasts, seeds = 500, 8, 8
    draws = np.random.default_rng(0).normal(size=(trials, contrasts + 1, seeds))
    gaps = draws[:, 1:] - draws[:, :1] if shared else draws[:, 1:]
    covered = []
    for table in gaps:
        gains = [over_seeds(row) for row in table]
        half = gains[0].pooled(pooled_deviation(gains)).half_width()
        covered.append([abs(gain.mean) <= half for gain in gains])
    # Contrasts of one trial are not independent: only trials are counted.
    assert np.mean(covered) == pytest.approx(expected, abs=tolerance(expected, trials))


def test_share_contrast_tests_the_shares_outside_fiellers_interval():
    part, whole = (np.random.default_rng(1).normal(mean, 0.01, size=8) for mean in (0.05, 0.06))
    assert share_contrast(part, whole, 0.5).by_seed == pytest.approx(part - whole / 2)
    # Fieller's limits: the roots of (p - s w)^2 = t^2 (vpp - 2 s vpw + s^2 vww)
    (vpp, vpw), (_, vww) = np.cov(part, whole) / 8
    t2 = stats.t.ppf(0.975, 7) ** 2
    p, w = part.mean(), whole.mean()
    limits = np.roots([w * w - t2 * vww, -2 * (p * w - t2 * vpw), p * p - t2 * vpp])
    for share in limits:
        assert Evidence(share_contrast(part, whole, share), above=0).p == pytest.approx(0.05)
    inside = Evidence(share_contrast(part, whole, limits.mean()), above=0)
    assert inside.p > 0.05


def test_slope_has_a_line_for_each_seed():
    gaps = [[1.0, 2.0, 3.0], [5.0, 4.0, 3.0], [0.0, 0.5, 0.0]]
    slope = slope_per_doubling([4, 8, 16], gaps)
    assert slope.by_seed == pytest.approx((1, -1, 0))
    uneven = slope_per_doubling([1, 2, 8], [[7.0, 9.0, 13.0], [1.0, 0.0, -2.0]])
    assert uneven.by_seed == pytest.approx((2, -1))


# Seeds and documents


def enumerated(statistic):
    """The expanded percentile interval over all 3,125 resamples of five, which are equally likely."""
    outside = stats.norm.cdf(-2.776 * math.sqrt(5 / 4))
    resamples = [statistic(list(draw)) for draw in itertools.product(range(5), repeat=5)]
    return np.quantile(resamples, [outside, 1 - outside])


def test_two_way_interval_is_that_of_all_resamples_of_one_side():
    values = np.array([0.0, 0.1, 0.3, 0.45, 0.7])
    tokens = np.array([10, 40, 20, 25, 30])
    by_seed = two_way_interval(values[:, None] * tokens, tokens, resamples=40_000)
    assert by_seed == pytest.approx(enumerated(lambda draw: values[draw].mean()), abs=0.02)
    nats = values * tokens
    by_document = two_way_interval(np.tile(nats, (5, 1)), tokens, resamples=40_000)
    expected = enumerated(lambda draw: nats[draw].sum() / tokens[draw].sum())
    assert by_document == pytest.approx(expected, abs=0.02)


def test_two_way_interval_is_reproducible_and_scales_with_the_tokens():
    gaps = np.random.default_rng(0).normal(size=(6, 20))
    tokens = np.arange(20) + 5
    low, high = two_way_interval(gaps, tokens)
    assert low < gaps.mean(0).sum() / tokens.sum() < high
    assert two_way_interval(gaps, tokens) == (low, high)
    assert two_way_interval(gaps, tokens, seed=1) != (low, high)
    assert two_way_interval(gaps, 2 * tokens) == pytest.approx((low / 2, high / 2))
    wider = two_way_interval(gaps, tokens, level=0.01)
    assert wider[0] < low < high < wider[1]


@pytest.mark.parametrize(
    ("seeds", "deviations", "covered"),
    [
        (8, (0.01, 0, 0), (0.93, 0.95)),  # seeds alone: Student's interval, but for their discreteness
        (16, (0.01, 0.1, 0), (0.95, 0.97)),
        (16, (0.01, 0.02, 0.05), (0.95, 0.98)),  # noise of single losses counts up to three times
    ],
)
def test_two_way_interval_covers(seeds, deviations, covered):
    trials, documents, true_gain = 300, 25, 0.05
    generator = np.random.default_rng(seeds)
    both = students = 0
    for trial in range(trials):
        tokens = generator.integers(200, 3000, documents)
        of_seeds, of_documents, of_losses = (
            deviation * generator.normal(size=shape)
            for deviation, shape in zip(
                deviations, [(seeds, 1), documents, (seeds, documents)], strict=True
            )
        )
        gaps = (true_gain + of_seeds + of_documents + of_losses) * tokens
        low, high = two_way_interval(gaps, tokens, resamples=1000, seed=trial)
        both += low <= true_gain <= high
        gain = over_seeds(gaps.sum(1) / tokens.sum())
        students += gain.low <= true_gain <= gain.high
    least, most = covered
    assert least - tolerance(least, trials) <= both / trials <= most + tolerance(most, trials)
    assert deviations[1] < 0.1 or students / trials < 0.6  # which takes the documents as given


@pytest.mark.parametrize(
    ("gaps", "tokens", "message"),
    [
        ((4, 9), 9, "seeds is 4; it must be at least 5"),
        ((8, 1), 1, "documents is 1; it must be at least 2"),
        ((8, 9), 8, r"gaps has shape \(8, 9\), tokens \(8,\)"),
        ((9,), 9, r"gaps has shape \(9,\), tokens \(9,\)"),
    ],
)
def test_two_way_interval_refuses_shapes(gaps, tokens, message):
    with pytest.raises(ValueError, match=message):
        two_way_interval(np.ones(gaps), np.ones(tokens))


# Verdicts


def test_equivalence_by_hand():
    # With 2 degrees of freedom, P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)), and the mean 2 of (1, 2, 3) has
    # the standard error 1 / sqrt(3): t = 7 sqrt(3) above -5, and 3 sqrt(3) below 5.
    evidence = Evidence(over_seeds([1, 2, 3]), above=-5, below=5)
    assert evidence.gain.p_above(-5) == pytest.approx(1 / 2 - 7 * math.sqrt(3 / 149) / 2)
    assert evidence.p_agrees == pytest.approx(1 / 2 - 3 * math.sqrt(3 / 29) / 2)
    assert evidence.p_disagrees == pytest.approx(1 / 2 + 3 * math.sqrt(3 / 29) / 2)
    outside = Evidence(over_seeds([1, 2, 3]), above=-0.5, below=0.5)
    assert outside.p_disagrees == pytest.approx(1 / 2 - 1.5 * math.sqrt(3 / 8.75) / 2)
    assert outside.p == 2 * outside.p_disagrees


@pytest.mark.parametrize("mean", [-0.4, 0.0, 0.3])
def test_equivalence_holds_if_the_90_percent_interval_is_inside_the_margin(mean):
    gain = standard(mean, seeds=8)
    reach = abs(mean) + gain.half_width(0.1)
    assert Evidence(gain, above=-reach - 1e-6, below=reach + 1e-6).p_agrees < 0.05
    assert Evidence(gain, above=-reach + 1e-6, below=reach - 1e-6).p_agrees > 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.01, 0.6]) == pytest.approx([1, 0.03, 1])
    assert holm([]) == []
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"p is {bad}"):
            holm([0.5, bad])


@pytest.mark.parametrize(
    ("mean", "limits", "word"),
    [
        (4, dict(above=0), AGREES),
        (-4, dict(above=0), DISAGREES),
        (1, dict(above=0), UNDECIDED),
        (4, dict(above=3.9), UNDECIDED),
        (4, dict(above=9), DISAGREES),
        (4, dict(below=0), DISAGREES),
        (-4, dict(below=0), AGREES),
        (0.1, dict(above=-3, below=3), AGREES),
        (2, dict(above=-3, below=3), UNDECIDED),
        (7, dict(above=-3, below=3), DISAGREES),
        (-7, dict(above=-3, below=3), DISAGREES),
    ],
)
def test_verdict_on_one_claim(mean, limits, word):
    (verdict,) = verdicts([Evidence(standard(mean), **limits)])
    assert verdict.word == word
    assert (verdict.p <= 0.05) == (word != UNDECIDED)


def test_verdicts_depend_on_the_whole_table():
    alone = Evidence(standard(1.8), above=0)
    assert verdicts([alone])[0].word == AGREES
    crowd = [alone] + [Evidence(standard(0), above=0)] * 3
    assert verdicts(crowd)[0] == (UNDECIDED, pytest.approx(4 * alone.p))
    strong = [alone, Evidence(standard(-90), above=0)]  # Holm's second step is at the full level
    assert [verdict.word for verdict in verdicts(strong)] == [AGREES, DISAGREES]


@pytest.mark.parametrize("true_gains", [(0, 0, 0, 0), (0.001, 0.001, -0.001, 3)])
def test_tables_with_any_wrong_verdict_are_at_most_5_percent(true_gains):
    trials, seeds = 400, 5
    draws = np.random.default_rng(2).normal(size=(trials, 5, seeds))
    wrong = 0
    for draw in draws:
        gaps = draw[1:] - draw[0] + np.array(true_gains)[:, None]  # all against one model
        found = verdicts([Evidence(over_seeds(row), above=0) for row in gaps])
        right = [{1: AGREES, -1: DISAGREES}.get(sign) for sign in np.sign(true_gains)]
        wrong += any(v.word not in (UNDECIDED, word) for v, word in zip(found, right, strict=True))
    assert 0.01 < wrong / trials <= 0.05 + tolerance(0.05, trials)


# Seeds needed


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_printed_tables(effect, seeds):
    """The paired t-test, two-sided at 5 %, with power 80 %, as in R's power.t.test."""
    assert seeds_needed(effect, 1, above=0) == seeds
    assert seeds_needed(-effect / 10, 0.1, above=0) == seeds  # the contrary
    assert seeds_needed(1 + effect, 1, below=1) == seeds
    said = Evidence(standard(effect), above=0).what_would_decide(claims=1)
    assert said == f"{seeds} seeds would decide"


def exact_power(seeds, mean, margin, level):
    """The power of TOST for gaps of deviation 1: averaged over the deviation of the sample."""
    shares = (np.arange(4000) + 0.5) / 4000
    deviations = np.sqrt(stats.chi2.ppf(shares, seeds - 1) / (seeds - 1))
    reach = stats.t.ppf(1 - level / 2, seeds - 1) * deviations
    above, below = ((margin + side * mean) * math.sqrt(seeds) for side in (1, -1))
    return np.maximum(stats.norm.cdf(below - reach) - stats.norm.cdf(reach - above), 0).mean()


@pytest.mark.parametrize("level", [0.1, 0.05, 0.0025])
@pytest.mark.parametrize(("mean", "margin"), [(0, 0.5), (0, 1.5), (0.2, 1), (-0.6, 1.2)])
def test_seeds_needed_for_equivalence_are_the_least_by_the_exact_power(level, mean, margin):
    seeds = seeds_needed(mean, 1, above=-margin, below=margin, level=level)
    assert exact_power(seeds, mean, margin, level) >= 0.8
    assert exact_power(seeds - 1, mean, margin, level) < 0.8


def test_seeds_needed_for_equivalence_are_near_the_formula_of_normal_quantiles():
    # Chow, Shao and Wang (2007), 3.1.9: (z(0.95) + z(0.9))^2 / 0.3^2 = 95.2; t needs slightly more
    assert 96 <= seeds_needed(0, 1, above=-0.3, below=0.3, level=0.1) <= 98


def test_seeds_needed_grow_with_holms_level_and_end():
    assert seeds_needed(0.5, 1, above=0, level=0.05 / 20) > seeds_needed(0.5, 1, above=0)
    assert seeds_needed(0.01, 1, above=0) is None
    assert seeds_needed(0.25, 0.1, above=-0.25, below=0.25) is None  # on the margin
    assert seeds_needed(50, 1, above=0) == 2
    with pytest.raises(ValueError, match="deviation is 0; it must be above 0"):
        seeds_needed(1, 0, above=0)
