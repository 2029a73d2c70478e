"""Gram matrices X^T X of a layer's inputs, and the factor that error feedback needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from optiq.backend import mx
from optiq.errors import EngineFailure

FloatArray = npt.NDArray[np.float32]


def gram(x: mx.array) -> mx.array:
    """X^T X in float32 of (..., in) inputs: (in, in)."""
    flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return flat.T @ flat


def damped(gram_matrix: FloatArray, damping: float) -> FloatArray:
    """The Gram matrix plus `damping` times its mean diagonal; inputs never seen get that alone."""
    result = gram_matrix.copy()
    diagonal = np.einsum("ii->i", result)
    diagonal += damping * max(float(diagonal.mean()), 1e-12)
    return result


def inverse_factor(gram_matrix: FloatArray, damping: float) -> FloatArray:
    """Upper triangular U with (H + damping)^-1 = U^T U: (in, in) float32.

    Args:
        gram_matrix: H = X^T X, (in, in).
        damping: share of the mean diagonal that is added; raised tenfold until H is definite.

    Raises:
        EngineFailure: if H is not finite: the activations overflowed.

    Cost: one Cholesky factorization and one triangular inverse on the CPU (LAPACK through scipy),
        2/3 in^3 multiply-adds.
    Reference: GPTQ (arXiv 2210.17323), section 3.3. We factor H reversed instead of inverting it:
        the inverse of its upper factor is U.
    """
    if not np.isfinite(gram_matrix).all():
        raise EngineFailure(
            "the inputs of a matrix are not finite on the calibration text; check the source"
        )
    while True:
        matrix = damped(gram_matrix, damping)
        lower, info = scipy.linalg.lapack.spotrf(matrix[::-1, ::-1], lower=1, clean=1)
        if info == 0:
            break
        damping *= 10
    inverse, _ = scipy.linalg.lapack.strtri(lower, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1])
