"""comparison/significance.py against scipy, by hand-made examples, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from comparison import numbers, significance
from comparison.significance import compare, holm, noise_floor, p_by_noise, seeds_needed, smallest_difference


def by_seed(values) -> dict:
    return dict(enumerate(values))


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 2), (3, 3), (5, 5), (3, 7)])
def test_both_tests_and_the_interval_are_scipys(n_a, n_b):
    rng = np.random.default_rng(n_a + 10 * n_b)
    a, b = rng.normal(4.5, 0.01, n_a), rng.normal(4.49, 0.03, n_b)
    found = compare(by_seed(a), by_seed(b))
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert found.p == expected.pvalue and found.difference == pytest.approx(b.mean() - a.mean())
    assert (found.low, found.high) == tuple(expected.confidence_interval(0.95))
    n = min(n_a, n_b)
    assert found.n_pairs == n and found.paired_p == pytest.approx(stats.ttest_rel(b[:n], a[:n]).pvalue)
    assert found.paired_difference == pytest.approx((b[:n] - a[:n]).mean()) and found.why_not == ""


def test_pairs_are_equal_seeds_in_any_order():
    a, b = {3: 1.0, 1: 2.0, 2: 4.0, 9: 7.0}, {1: 2.1, 2: 4.3, 8: 0.0, 3: 1.2}
    found = compare(a, b)
    assert found.n_pairs == 3 and found.paired_difference == pytest.approx(0.2)
    assert found.paired_p == pytest.approx(stats.ttest_rel([1.2, 2.1, 4.3], [1.0, 2.0, 4.0]).pvalue)


def test_pairing_finds_what_the_seeds_have_in_common():
    a = {0: 4.50, 1: 4.60, 2: 4.70, 3: 4.80}
    found = compare(a, {seed: loss - 0.02 + 0.001 * seed for seed, loss in a.items()})
    assert found.paired_p < 0.001 < 0.5 < found.p


@pytest.mark.parametrize(("a", "b", "why"), [
    ([4.5], [4.4], "a single seed"), ([4.5, 4.6, 4.7], [4.4], "a single seed"),
    ([], [4.4, 4.5], "no loss at this point"),
    ([4.5, 4.5, 4.5], [4.5, 4.5, 4.5], "the seeds do not differ"), ([0.1] * 3, [0.3] * 3, "the seeds do not differ")])
def test_no_p_value_is_invented(a, b, why):
    found = compare(by_seed(a), by_seed(b))
    assert (found.p, found.low, found.high, found.paired_p, found.seeds_needed, found.smallest) == (None,) * 6
    assert found.why_not == why
    if a:
        assert found.difference == pytest.approx(np.mean(b) - np.mean(a))


def test_one_side_without_spread_is_a_test():
    """It is the test of the other against a number."""
    found = compare(by_seed([4.5] * 3), by_seed([4.5, 4.6, 4.7]))
    assert found.p == pytest.approx(stats.ttest_1samp([4.5, 4.6, 4.7], 4.5).pvalue)


def test_a_constant_shift_has_no_paired_p_value():
    found = compare(by_seed([4.1, 4.3, 4.2]), by_seed([4.2, 4.4, 4.3]))
    assert found.paired_p is None and found.paired_difference == pytest.approx(0.1) and found.p is not None


@pytest.mark.parametrize(("n", "low", "high"), [(2, 0.01, 0.045), (3, 0.02, 0.055), (5, 0.03, 0.065)])
def test_false_positives_at_equal_means_are_near_5_percent(n, low, high, monkeypatch):
    """Welch's test is known to be on the safe side for 2 and 3 seeds. 1,500 trials: a standard deviation of 0.6 %."""
    monkeypatch.setattr(significance, "seeds_needed", lambda difference, noise: None)  # slow, and not asked here
    rng = np.random.default_rng(n)
    trials = [compare(by_seed(rng.normal(size=n)), by_seed(rng.normal(size=n))) for _ in range(1500)]
    assert low < np.mean([trial.p < 0.05 for trial in trials]) < high
    assert 0.035 < np.mean([trial.paired_p < 0.05 for trial in trials]) < 0.065
    covered = np.mean([trial.low <= 0 <= trial.high for trial in trials])
    assert covered == pytest.approx(1 - np.mean([trial.p < 0.05 for trial in trials]))


@pytest.mark.parametrize(("n", "n_others"), [(2, 1), (2, 5), (3, 3), (4, 5)])
def test_false_verdicts_at_equal_means_are_at_most_5_percent(n, n_others, monkeypatch):
    """Of any group in a table, by Holm's correction. 1,000 trials: a standard deviation of 0.7 %."""
    monkeypatch.setattr(significance, "seeds_needed", lambda difference, noise: None)
    rng, found = np.random.default_rng(n), []
    for _ in range(1000):
        first, *others = ({"label": "", "seeds": n, "diverged": 0, "val_loss": by_seed(losses)}
                          for losses in rng.normal(4.5, 0.02, (1 + n_others, n)))
        found.append({row["verdict"] for row in numbers.corrected([numbers.tested(first, other) for other in others])})
    assert 0 < np.mean([verdicts != {"not shown"} for verdicts in found]) < 0.065


def power(n_a, n_b, difference, noise, trials=20_000) -> float:
    """By simulation: how often Welch's test finds that true difference."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, noise, (trials, n_a)), rng.normal(difference, noise, (trials, n_b))
    return np.mean(stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05)


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 2), (3, 3), (5, 5), (30, 30), (2, 30), (3, 9), (30, 3)])
def test_the_smallest_difference_is_found_in_80_of_100_cases(n_a, n_b):
    """20,000 trials: a standard deviation of 0.3 %."""
    assert power(n_a, n_b, smallest_difference(0.02, n_a, n_b), 0.02) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 2), (3, 3), (5, 5), (3, 30), (100, 100)])
def test_the_grid_is_fine_enough(n_a, n_b, monkeypatch):
    shift = significance.needed_shift(n_a, n_b)
    monkeypatch.setattr(significance, "GRID", 1000)
    assert significance.needed_shift.__wrapped__(n_a, n_b) == pytest.approx(shift, abs=0.004)


@pytest.mark.parametrize("difference", [0.08, 0.04, 0.02, 0.01])
def test_so_many_seeds_are_needed_and_no_fewer(difference):
    n = seeds_needed(difference, 0.02)
    assert power(n, n, difference, 0.02) > 0.79
    assert n == 3 or power(n - 1, n - 1, difference, 0.02) < 0.81
    assert seeds_needed(-difference, 0.02) == n


def test_power_goes_by_the_noise_that_is_given():
    a, b = by_seed([4.0, 4.1, 4.2]), by_seed([4.1, 4.3, 4.5])  # variances 0.01 and 0.04
    own, given = compare(a, b), compare(a, b, noise=0.05)
    assert own.smallest == pytest.approx(smallest_difference(math.sqrt(0.025), 3, 3))
    assert given.smallest == smallest_difference(0.05, 3, 3)
    assert given.seeds_needed == seeds_needed(0.2, 0.05) < own.seeds_needed and given.p == own.p


def test_limits_of_seeds_needed():
    assert seeds_needed(0.0, 0.02) == seeds_needed(1e-6, 0.02) == math.inf
    assert seeds_needed(1.0, 0.02) == 3 and seeds_needed(0.1, 0.0) == 3
    assert math.isnan(smallest_difference(0.02, 1, 3))


def test_many_seeds_have_the_power_of_the_textbook():
    """2 (1.960 + 0.842)^2 / 0.5^2 = 63 of each for half a standard deviation."""
    assert significance.needed_shift(10_000, 10_000) == pytest.approx(1.960 + 0.842, abs=0.001)
    assert seeds_needed(0.5, 1.0) == pytest.approx(63, abs=1)


@pytest.mark.parametrize("freedom", [1, 4, 30])
def test_noise_interval_has_the_noise_in_95_of_100_cases(freedom):
    spread = np.random.default_rng(0).normal(0, 0.02, (5_000, freedom + 1)).std(axis=1, ddof=1)
    low, high = np.transpose([significance.noise_interval(noise, freedom) for noise in spread])
    assert np.mean(low > 0.02) == pytest.approx(0.025, abs=0.008)
    assert np.mean(high < 0.02) == pytest.approx(0.025, abs=0.008)


def test_p_by_the_noise_floor_of_two_groups_is_students():
    a, b = [4.0, 4.1, 4.3], [4.2, 4.6]
    expected = stats.ttest_ind(a, b, equal_var=True).pvalue
    assert p_by_noise(np.mean(b) - np.mean(a), 3, 2, *noise_floor([a, b])) == pytest.approx(expected, rel=1e-12)


def test_noise_floor_pools_variances_by_degrees_of_freedom():
    groups = [[1.0, 2.0, 3.0], [5.0], [7.0, 9.0], []]  # variances 1 with 2 degrees, 2 with 1
    assert noise_floor(groups) == (pytest.approx(math.sqrt((2 * 1 + 1 * 2) / 3)), 3)
    assert math.isnan(noise_floor([[1.0], [2.0]])[0]) and noise_floor([[1.0]])[1] == 0


def test_holm():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([None]) == [None] and holm([]) == []


def test_holm_keeps_the_chance_of_any_accident_below_5_percent():
    """Five groups that are no better than the baseline; uncorrected, one of five is called different in some 15 %."""
    rng, accidents, uncorrected = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        baseline, *others = rng.normal(size=(6, 4))
        p = list(stats.ttest_ind(others, baseline[None], axis=1, equal_var=False).pvalue)
        accidents, uncorrected = accidents + (min(holm(p)) < 0.05), uncorrected + (min(p) < 0.05)
    assert accidents / 1000 < 0.05 < 0.1 < uncorrected / 1000
