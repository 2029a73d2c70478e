"""Gram matrices and the factor of their inverse against float64."""

import numpy as np
import pytest

from optiq.backend import mx
from optiq.numerics.gram import damped, gram, inverse_factor


def inputs(rows, size, seed=0, rank=None):
    """Correlated inputs, (rows, size) float32."""
    rng = np.random.default_rng(seed)
    rank = size if rank is None else rank
    x = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, size)) / np.sqrt(rank)
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gram_is_the_sum_of_outer_products(dtype):
    x = mx.array(inputs(60, 32).reshape(3, 20, 32)).astype(dtype)
    exact = np.array(x.astype(mx.float32), np.float64).reshape(60, 32)
    found = gram(x)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), exact.T @ exact, rtol=1e-5, atol=1e-4)


def test_damping_adds_a_share_of_the_mean_diagonal_and_leaves_its_argument():
    h = gram(mx.array(inputs(50, 16)))
    h = np.array(h)
    before = h.copy()
    found = damped(h, 0.1)
    np.testing.assert_array_equal(h, before)
    np.testing.assert_allclose(found - h, 0.1 * np.diag(h).mean() * np.eye(16), atol=1e-4 * h.max())


@pytest.mark.parametrize(
    "h",
    [
        np.eye(48, dtype=np.float32),
        np.array(gram(mx.array(inputs(500, 48)))),
        np.array(gram(mx.array(inputs(500, 48)))) * np.float32(1e-8),
        np.array(gram(mx.array(inputs(500, 48)))) * np.float32(1e8),
        np.array(gram(mx.array(inputs(20, 48)))),
        np.array(gram(mx.array(inputs(500, 48, rank=3)))),
        np.diag(np.r_[np.ones(24), np.zeros(24)]).astype(np.float32),
    ],
    ids=["identity", "full", "small", "large", "few rows", "rank 3", "unseen"],
)
def test_the_factor_gives_the_damped_inverse(h):
    factor = inverse_factor(h, 0.01)
    assert factor.dtype == np.float32
    np.testing.assert_array_equal(factor, np.triu(factor))
    assert (np.diag(factor) > 0).all()
    exact = damped(h, 0.01).astype(np.float64)
    product = factor.astype(np.float64).T @ factor @ exact
    np.testing.assert_allclose(product, np.eye(len(h)), atol=2e-3)


def test_inputs_that_were_never_seen_have_a_finite_factor():
    factor = inverse_factor(np.zeros((8, 8), np.float32), 0.01)
    assert np.isfinite(factor).all()
    np.testing.assert_allclose(factor, factor[0, 0] * np.eye(8), rtol=1e-5)


def test_damping_grows_until_the_matrix_is_definite():
    """Rounding can leave a Gram matrix with eigenvalues below zero."""
    h = np.diag(np.r_[np.full(7, 1.0), -0.05]).astype(np.float32)
    factor = inverse_factor(h, 0.01)
    assert np.isfinite(factor).all()
    wanted = damped(h, 0.1)
    np.testing.assert_allclose(factor.T @ factor @ wanted, np.eye(8), atol=1e-4)
