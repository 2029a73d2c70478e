"""How two models' next-token distributions differ, position by position.

In numpy on all back ends: its exponentials are an order of magnitude faster than MLX's on the CPU,
and it works on a few megabytes at a time whatever the vocabulary is.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optiq.backend import mx

FloatArray = npt.NDArray[np.float32]

_CHUNK_VALUES = 1 << 20
_LARGE = 60.0
_CLUSTERS_OF_ONE = 8


class Divergence(NamedTuple):
    """Two distributions over the same positions.

    Attributes:
        kl: (n, T) KL(p || q) in nats.
        agree: (n, T) whether both have the same most likely token.
        nll_p: (n, T - 1) negative log-likelihood of the next token under p, in nats.
        nll_q: likewise under q.
    """

    kl: FloatArray
    agree: npt.NDArray[np.bool_]
    nll_p: FloatArray
    nll_q: FloatArray


def divergence(p_logits: mx.array, q_logits: mx.array, tokens: mx.array) -> Divergence:
    """Compare the distributions of two models on the same windows.

    Args:
        p_logits: (n, T, V) of the reference; the softmax is taken in float32.
        q_logits: (n, T, V) of the other model.
        tokens: (n, T) the windows: position t predicts token t + 1.

    Returns:
        KL at all T positions, likelihoods at the T - 1 whose next token is in the window. NaN where
        logits are.

    Cost: a few float32 arrays of 1M values a core beside the logits, whatever T and V are.
    """
    shape, vocab = tokens.shape, p_logits.shape[-1]
    p, q = (np.asarray(x.astype(mx.float32)).reshape(-1, vocab) for x in (p_logits, q_logits))
    following = np.roll(np.array(tokens), -1, axis=1).reshape(-1)
    step = max(1, _CHUNK_VALUES // vocab)
    chunks = [slice(start, start + step) for start in range(0, len(p), step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda rows: _compared(p[rows], q[rows], following[rows]), chunks)
        columns = [np.concatenate(part).reshape(shape) for part in zip(*parts, strict=True)]
    kl, agree, nll_p, nll_q = columns
    return Divergence(kl, agree, nll_p[:, :-1], nll_q[:, :-1])


def _compared(
    p: FloatArray, q: FloatArray, following: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.generic], ...]:
    """KL, agreement and both likelihoods of (rows, V) logits.

    KL is free of the cancellation in sum p log(p / q): with d = log(q / p) less its mean under p,
    KL = log(1 + E[exp(d) - 1 - d]), whose terms are all positive, so that 1e-8 still has its digits
    in float32. Where exp(d) would overflow, KL is large and the plain sum is taken.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weights, log_norm = _softmax(p)
        d = q - p
        mean = np.einsum("rv,rv->r", weights, d)
        d -= mean[:, None]
        excess = np.einsum("rv,rv->r", weights, np.expm1(d) - d)
        kl = np.log1p(excess)
        large = d.max(axis=-1) > _LARGE
        if large.any():
            kl[large] = _softmax(q[large])[1] - log_norm[large] - mean[large]
    rows = np.arange(len(p))
    nll_p = log_norm - p[rows, following]
    nll_q = log_norm + mean + kl - q[rows, following]
    return kl, p.argmax(axis=-1) == q.argmax(axis=-1), nll_p, nll_q


def _softmax(logits: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Probabilities (rows, V) and the log of their normalizer (rows,)."""
    peak = logits.max(axis=-1)
    weights = np.exp(logits - peak[:, None])
    total = weights.sum(axis=-1)
    weights /= total[:, None]
    return weights, peak + np.log(total)


class Estimate(NamedTuple):
    """A mean with its standard error."""

    mean: float
    stderr: float


def clustered_mean(values: FloatArray) -> Estimate:
    """Mean over all positions, with a standard error clustered by window.

    Args:
        values: (N, T), a window a row. Positions of one window are not independent; windows are. A
            single window is split into eight runs of positions, which take the windows' place.

    Reference: ratio estimator of survey sampling, sqrt(C / (C - 1) sum (s_c - m n_c)^2) / sum n_c.
    """
    if len(values) > 1:
        clusters = list(values)
    else:
        clusters = np.array_split(values[0], min(_CLUSTERS_OF_ONE, values.shape[1]))
    sums = np.array([cluster.sum(dtype=np.float64) for cluster in clusters])
    counts = np.array([cluster.size for cluster in clusters], dtype=np.float64)
    mean = sums.sum() / counts.sum()
    squares = ((sums - mean * counts) ** 2).sum() * len(clusters) / (len(clusters) - 1)
    return Estimate(float(mean), float(np.sqrt(squares) / counts.sum()))
