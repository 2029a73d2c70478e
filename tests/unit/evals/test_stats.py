"""Statistics against scipy and against laws they must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, permutation_test

from optiq.evals.stats import (
    bootstrap_means,
    detectable,
    holm,
    interval,
    mcnemar,
    sign_flip_p,
    standard_error,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def scipy_p(differences):
    """All 2^n flips."""
    result = permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    return result.pvalue


def test_mcnemar_of_a_published_table():
    # Fagerland et al. (2013), airway hyper-responsiveness: 1 and 7 discordant pairs
    found = mcnemar(1, 7)
    assert found.p_exact == pytest.approx(0.0703, abs=5e-5)
    assert found.p_mid == pytest.approx(0.0391, abs=5e-5)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_symmetric_and_mid_p_is_below_exact(gained, lost):
    found = mcnemar(gained, lost)
    assert found == mcnemar(lost, gained)
    assert 0 < found.p_mid <= found.p_exact <= 1
    if gained == lost:
        assert found.p_mid == pytest.approx(1.0)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_flips_of_binary_scores_are_mcnemar(gained, lost, same):
    differences = np.repeat([1.0, -1.0, 0.0], [gained, lost, same])
    assert sign_flip_p(differences, 10, rng()) == pytest.approx(mcnemar(gained, lost).p_exact)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([-1, -0.75, -0.5, 0, 0.25, 0.5, 1]), min_size=2, max_size=11))
def test_flips_of_fractions_equal_scipy(differences):
    values = np.array(differences, dtype=float)
    assert sign_flip_p(values, 10, rng()) == pytest.approx(scipy_p(values))


def test_equal_differences_that_were_rounded_apart_are_equal():
    third = 1 / 3
    values = np.array([third, 2 * third - third, 1 - 2 * third, -(1 - 2 * third)])
    assert sign_flip_p(values, 10, rng()) == pytest.approx(scipy_p(np.array([1.0, 1, 1, -1])))


def test_the_monte_carlo_p_is_near_the_exact_one_and_never_zero():
    values = rng(1).normal(0.35, 1.0, 17)
    exact = sign_flip_p(values, 10, rng())
    assert exact == pytest.approx(scipy_p(values))
    # a pebble beside each value leaves the sum and makes too many outcomes to enumerate
    many = np.concatenate([values, rng(2).normal(0, 1e-6, 30)])
    assert sign_flip_p(many, 40_000, rng()) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(rng(3).uniform(1, 2, 100), 999, rng()) == 1 / 1000


def test_no_difference_has_p_1():
    assert sign_flip_p(np.zeros(5), 10, rng()) == 1.0
    assert mcnemar(0, 0) == (1.0, 1.0)


@pytest.mark.parametrize("values", [rng(5).choice([-1.0, 0.0, 1.0], 300), rng(6).normal(size=300)])
def test_the_bootstrap_is_that_of_scipy(values):
    ours = bootstrap_means(values, 20_000, rng())
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=rng(1))
    assert ours.shape == (20_000,)
    assert ours.mean() == pytest.approx(values.mean(), abs=0.002)
    assert ours.std() == pytest.approx(theirs.standard_error, rel=0.02)
    assert interval(ours) == pytest.approx(tuple(theirs.confidence_interval), abs=0.006)


def test_the_bootstrap_in_chunks_is_of_the_same_law(monkeypatch):
    values = rng(5).choice([-1.0, 0.0, 1.0], 100)
    monkeypatch.setattr("optiq.evals.stats._CHUNK_COUNTS", 30)
    small = bootstrap_means(values, 5_000, rng())
    assert small.shape == (5_000,)
    assert small.std() == pytest.approx(values.std() / 10, rel=0.05)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_p_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)
    for p, p_holm in zip(p_values, adjusted, strict=True):
        assert p <= p_holm <= min(1.0, len(p_values) * p)


def test_the_standard_error_is_that_of_the_strata():
    parts = [rng(n).normal(size=size) for n, size in enumerate((50, 400))]
    expected = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 2
    assert standard_error(parts) == pytest.approx(expected)


def test_items_that_all_agree_leave_an_error_of_one_item():
    assert standard_error([np.zeros(100)]) == pytest.approx(0.01)
    assert standard_error([np.zeros(1)]) == 1.0


def test_the_detectable_difference_has_its_power():
    draws = rng().normal(detectable(1.0), 1.0, 100_000)
    assert (draws > 1.959964).mean() == pytest.approx(0.8, abs=0.005)
