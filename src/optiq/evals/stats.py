"""Statistics of paired scores: tests, intervals and what a sample can show.

Everything works on differences of the two models' scores of one item. Items with equal differences
can be exchanged, so a resample is a draw of counts (multinomial for the bootstrap, binomial for the
sign flips) and not of items: the same distribution, at the cost of a few distinct values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, binomtest, norm

Floats = npt.NDArray[np.float64]

ALPHA = 0.05
POWER = 0.8
_DECIMALS = 12  # differences are averages of few scores: equal ones are equal so far
_EXACT_OUTCOMES = 1 << 18
_CHUNK_COUNTS = 1 << 20


class McNemar(NamedTuple):
    """Both p-values of McNemar's test, two-sided.

    Attributes:
        p_exact: conditional binomial test; never above its level.
        p_mid: with half the weight of what was seen; closer to its level, on either side.
    """

    p_exact: float
    p_mid: float


def mcnemar(gained: int, lost: int) -> McNemar:
    """McNemar's test of binary scores.

    Args:
        gained: items that only the first model solves.
        lost: items that only the second model solves.

    Reference: Fagerland, Lydersen and Laake (2013), for the mid-p variant.
    """
    total, fewer = gained + lost, min(gained, lost)
    if total == 0:
        return McNemar(1.0, 1.0)
    p_exact = float(binomtest(fewer, total).pvalue)
    p_mid = float(2 * binom.cdf(fewer, total, 0.5) - binom.pmf(fewer, total, 0.5))
    return McNemar(p_exact, min(p_mid, p_exact))


def sign_flip_p(differences: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p-value of the sum of paired differences, were either order as likely.

    Exact while the sums that sign flips can give are at most 262,144, as always up to 18 items that
    differ, and for any number of items with a few distinct differences. Beyond that a Monte Carlo
    estimate, (1 + as extreme) / (1 + resamples), which is never 0 and never too small on average.

    Args:
        differences: (n,) one of every item; those of several benchmarks carry the benchmark's
            weight. Zeros have no say.
        resamples: draws of the estimate.
        rng: of the estimate.

    Reference: `scipy.stats.permutation_test` with `permutation_type="samples"`, which goes through
        2^n flips; here equal differences are one binomial.
    """
    scale = np.abs(differences).max(initial=0.0)
    if scale == 0:
        return 1.0
    scaled = np.round(differences / scale, _DECIMALS)
    sizes, counts = np.unique(np.abs(scaled[scaled != 0]), return_counts=True)
    threshold = abs(scaled.sum()) * (1 - 1e-9) - 1e-9
    if math.prod(int(count) + 1 for count in counts) <= _EXACT_OUTCOMES:
        sums, weights = _flipped(sizes, counts)
        return min(1.0, float(weights[np.abs(sums) >= threshold].sum()))
    sums = np.zeros(resamples)
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2 * rng.binomial(count, 0.5, resamples) - count)
    return float((1 + np.count_nonzero(np.abs(sums) >= threshold)) / (1 + resamples))


def _flipped(sizes: Floats, counts: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Every sum that sign flips give, and its probability."""
    sums, weights = np.zeros(1), np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        heads = np.arange(count + 1)
        sums = np.add.outer(sums, size * (2 * heads - count)).reshape(-1)
        weights = np.multiply.outer(weights, binom.pmf(heads, count, 0.5)).reshape(-1)
    return sums, weights


def bootstrap_means(differences: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means of `resamples` samples of the items, drawn with replacement: (resamples,).

    Cost: resamples x distinct values draws, of which 8 MB are in memory at a time.
    """
    values, counts = np.unique(np.round(differences, _DECIMALS), return_counts=True)
    shares = counts / len(differences)
    step = max(1, _CHUNK_COUNTS // len(values))
    parts = [
        rng.multinomial(len(differences), shares, min(step, resamples - start)) @ values
        for start in range(0, resamples, step)
    ]
    return np.asarray(np.concatenate(parts) / len(differences))


def interval(means: Floats) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap means."""
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in the order given; the chance of any false one holds."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def standard_error(differences: Sequence[Floats]) -> float:
    """Standard error of the mean of the benchmarks' mean differences.

    A benchmark on which the differences do not vary counts as if one item had: that none was seen
    does not say that there is none.

    Args:
        differences: of every benchmark, (n,), n at least 1.
    """
    variances = [
        (float(d.var(ddof=1)) if len(d) > 1 else 0.0) / len(d) or 1.0 / len(d) ** 2
        for d in differences
    ]
    return math.sqrt(sum(variances)) / len(differences)


def detectable(stderr: float) -> float:
    """The true difference that is found at a level of 5%, two-sided, in 80% of samples."""
    return float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) * stderr
