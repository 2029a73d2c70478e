"""Gram matrices X^T X of a layer's inputs, and the factor that error feedback needs."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from optiq.backend import mx


def gram(x: mx.array) -> mx.array:
    """X^T X in float32 of (..., in) inputs: (in, in)."""
    flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return flat.T @ flat


def damped(gram_matrix: mx.array, damping: float) -> mx.array:
    """The Gram matrix plus `damping` times its mean diagonal; inputs never seen get that alone."""
    diagonal = mx.diag(gram_matrix)
    level = mx.maximum(diagonal.mean(), 1e-12)
    return gram_matrix + mx.eye(gram_matrix.shape[0]) * (damping * level)


def inverse_factor(gram_matrix: mx.array, damping: float) -> mx.array:
    """Upper triangular U with (H + damping)^-1 = U^T U: (in, in) float32.

    Args:
        gram_matrix: H = X^T X, (in, in).
        damping: share of the mean diagonal that is added; raised tenfold until H is definite.

    Cost: one Cholesky factorization and one triangular inverse on the CPU (LAPACK through scipy),
        2/3 in^3 multiply-adds.
    Reference: GPTQ (arXiv 2210.17323), section 3.3. We factor H reversed instead of inverting it:
        the inverse of its upper factor is U.
    """
    while True:
        matrix = np.array(damped(gram_matrix, damping), dtype=np.float32)
        lower, info = scipy.linalg.lapack.spotrf(matrix[::-1, ::-1], lower=1, clean=1)
        if info == 0:
            break
        damping *= 10
    inverse, _ = scipy.linalg.lapack.strtri(lower, lower=1)
    return mx.array(np.ascontiguousarray(inverse[::-1, ::-1]))
