"""
Whether one setting is better than another, from the results of several seeds each.

a and b are results by seed, {seed: validation loss in nats}. Tests are two-sided. Welch's t-test asks whether the means
differ, without assuming equal variances; the paired t-test looks at the differences of equal seeds, which read the data
in the same order. Where a test has nothing to go by there is no p-value, and `why_not` says why.
"""

import functools
import math
import warnings
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

ALPHA, POWER = 0.05, 0.80
MOST_SEEDS = 10_000  # a difference that needs more is none
UNEQUAL = 0.01  # p below which the spread of groups is not pooled
SAME = 1e-9  # nats: below what float32 tells apart
GRID = 64  # quantiles of a sample variance


@dataclass(frozen=True)
class Comparison:
    """Of b with a; a difference below 0 means that b has the lower loss."""

    difference: float | None = None
    """mean of b less mean of a"""
    low: float | None = None
    """95 % confidence interval of the difference, by Welch's test"""
    high: float | None = None
    p: float | None = None
    """Welch's test"""
    n_pairs: int = 0
    """seeds in both"""
    paired_difference: float | None = None
    """mean over these seeds"""
    paired_p: float | None = None
    """paired test"""
    smallest: float | None = None
    """true difference that so many seeds show with this noise"""
    seeds_needed: float | None = None
    """of each, to show this difference with this noise; inf for more than MOST_SEEDS"""
    why_not: str = ""
    """there is no p-value"""


def compare(a: dict[int, float], b: dict[int, float], noise: float | None = None) -> Comparison:
    """
    Welch's test over all seeds and the paired test over those in both. noise: the standard deviation over seeds by
    which more of them are planned, as pooled over more groups; None: over these two.
    """
    from scipy import stats  # half a second, where it is used

    if not a or not b:
        return Comparison(why_not="no loss at this point")
    x, y = np.array(list(a.values())), np.array(list(b.values()))
    found = {"difference": float(y.mean() - x.mean())}
    pairs = [seed for seed in a if seed in b]
    differences = np.array([b[seed] - a[seed] for seed in pairs])
    if len(pairs) > 1:
        found |= {"n_pairs": len(pairs), "paired_difference": float(differences.mean())}
        if not constant(differences):
            found["paired_p"] = float(stats.ttest_rel([b[seed] for seed in pairs], [a[seed] for seed in pairs]).pvalue)
    if min(len(x), len(y)) < 2:
        return Comparison(**found, why_not="a single seed")
    if constant(x) and constant(y):
        return Comparison(**found, why_not="the seeds do not differ")
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of one side that is constant
        test = stats.ttest_ind(y, x, equal_var=False)
    low, high = test.confidence_interval(1 - ALPHA)
    noise = noise_floor([x, y])[0] if noise is None else noise
    return Comparison(**found, low=float(low), high=float(high), p=float(test.pvalue),
                      smallest=smallest_difference(noise, len(x), len(y)),
                      seeds_needed=seeds_needed(found["difference"], noise))


def constant(values) -> bool:
    return np.ptp(values) < SAME


def noise_floor(groups: list[list[float]]) -> tuple[float, int]:
    """(Standard deviation over seeds, pooled over the groups; its degrees of freedom); (nan, 0) for single seeds."""
    squares = sum(np.var(group, ddof=1) * (len(group) - 1) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups if len(group))
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def p_by_noise(difference: float, n_a: int, n_b: int, noise: float, freedom: int) -> float:
    """p of that difference of n_a and n_b seeds by Student's test with the noise floor, for its degrees of freedom."""
    from scipy import stats

    return float(2 * stats.t.sf(abs(difference) / (noise * math.sqrt(1 / n_a + 1 / n_b)), freedom))


def unequal_spread(groups: list[list[float]]) -> float | None:
    """
    p of Bartlett's test that the groups have one standard deviation, if it is below UNEQUAL: then no noise floor holds
    for all. None otherwise.
    """
    from scipy import stats

    groups = [group for group in groups if len(group) > 1 and not constant(group)]
    p = float(stats.bartlett(*groups).pvalue) if len(groups) > 1 else 1.0
    return p if p < UNEQUAL else None


def noise_interval(noise: float, freedom: int) -> tuple[float, float]:
    """95 % confidence interval of a standard deviation with these degrees of freedom, for normal results."""
    from scipy import stats

    return tuple(noise * math.sqrt(freedom / stats.chi2.ppf(part, freedom)) for part in (1 - ALPHA / 2, ALPHA / 2))


def smallest_difference(noise: float, n_a: int, n_b: int) -> float:
    """
    The true difference that Welch's test of n_a against n_b seeds finds at p < ALPHA in 80 of 100 cases (POWER), when
    both have the standard deviation `noise`; nan for fewer than 2 seeds.
    """
    if min(n_a, n_b) < 2:
        return math.nan
    return noise * math.sqrt(1 / n_a + 1 / n_b) * needed_shift(n_a, n_b)


def seeds_needed(difference: float, noise: float) -> float:
    """The fewest seeds of each setting with which that difference is found as in `smallest_difference`, at least 3."""
    if smallest_difference(noise, MOST_SEEDS, MOST_SEEDS) > abs(difference):
        return math.inf
    seeds = range(3, MOST_SEEDS + 1)
    return seeds[bisect_left(seeds, True, key=lambda n: smallest_difference(noise, n, n) <= abs(difference))]


@functools.cache
def needed_shift(n_a: int, n_b: int) -> float:
    """
    The difference, in its true standard errors, that Welch's test of n_a against n_b normal results of equal variance
    finds with POWER. Given both sample variances, the test's limit is fixed and the difference normal; the power is the
    mean over the two, independent and chi-squared, at GRID x GRID quantiles: within 0.004 of a grid of 1,000 x 1,000.
    """
    from scipy import stats
    from scipy.optimize import brentq
    from scipy.special import ndtr

    middles = (np.arange(GRID) + 0.5) / GRID
    a, b = (stats.chi2.ppf(middles, n - 1) / (n - 1) / n for n in (n_a, n_b))  # squared standard errors of the means
    a, b = a[:, None], b[None, :]
    freedom = (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (n_b - 1))
    limit = stats.t.ppf(1 - ALPHA / 2, freedom) * np.sqrt((a + b) / (1 / n_a + 1 / n_b))
    return brentq(lambda shift: np.mean(ndtr(shift - limit) + ndtr(-shift - limit)) - POWER, 0, 100)


def holm(p_values: list[float | None]) -> list[float | None]:
    """
    p-values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6:65): when all those below
    ALPHA are called significant, the chance that any of them is by accident stays below ALPHA. None stays None.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected, largest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = corrected[i] = max(largest, min(1.0, p * (len(order) - rank)))
    return corrected
