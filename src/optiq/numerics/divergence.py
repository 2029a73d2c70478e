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

TAIL = 1e-4
"""A token is in the tail where the reference gives it less than this probability."""
_CHUNK_VALUES = 1 << 20
_LARGE = 60.0
_CLUSTERS_OF_ONE = 8


class Divergence(NamedTuple):
    """Two distributions over the same positions.

    Attributes:
        kl: (n, T) KL(p || q) in nats.
        top_p: (n, T) the most likely token under p.
        top_q: likewise under q.
        sure_p: (n, T) probability of that token under p.
        sure_q: likewise under q.
        tail_p: (n, T) probability that p gives to all tokens to which p gives less than `TAIL`.
        tail_q: probability that q gives to these same tokens.
        nll_p: (n, T - 1) negative log-likelihood of the next token under p, in nats.
        nll_q: likewise under q.
    """

    kl: FloatArray
    top_p: npt.NDArray[np.int64]
    top_q: npt.NDArray[np.int64]
    sure_p: FloatArray
    sure_q: FloatArray
    tail_p: FloatArray
    tail_q: FloatArray
    nll_p: FloatArray
    nll_q: FloatArray

    @property
    def agree(self) -> npt.NDArray[np.bool_]:
        """(n, T) whether both have the same most likely token."""
        return np.asarray(self.top_p == self.top_q)


def divergence(p_logits: mx.array, q_logits: mx.array, tokens: mx.array) -> Divergence:
    """Compare the distributions of two models on the same windows.

    Args:
        p_logits: (n, T, V) of the reference; the softmax is taken in float32.
        q_logits: (n, T, V) of the other model.
        tokens: (n, T) the windows: position t predicts token t + 1; or (n, T + 1), with the token
            that follows.

    Returns:
        All but the likelihoods at all T positions, these where `tokens` has the next token. NaN
        where logits are.

    Cost: a few float32 arrays of 1M values a core beside the logits, whatever T and V are.
    """
    shape, vocab = p_logits.shape[:2], p_logits.shape[-1]
    p, q = (np.asarray(x.astype(mx.float32)).reshape(-1, vocab) for x in (p_logits, q_logits))
    known = np.array(tokens)[:, 1:]
    following = np.zeros(shape, known.dtype)
    following[:, : known.shape[1]] = known
    following = following.reshape(-1)
    step = max(1, _CHUNK_VALUES // vocab)
    chunks = [slice(start, start + step) for start in range(0, len(p), step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda rows: _compared(p[rows], q[rows], following[rows]), chunks)
        columns = [np.concatenate(part).reshape(shape) for part in zip(*parts, strict=True)]
    found = Divergence(*columns)
    num_known = known.shape[1]
    return found._replace(nll_p=found.nll_p[:, :num_known], nll_q=found.nll_q[:, :num_known])


def _compared(
    p: FloatArray, q: FloatArray, following: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.generic], ...]:
    """The columns of `Divergence` for (rows, V) logits.

    KL is free of the cancellation in sum p log(p / q): with d = log(q / p) less its mean under p,
    KL = log(1 + E[exp(d) - 1 - d]), whose terms are all positive, so that 1e-8 still has its digits
    in float32. Where exp(d) would overflow, KL is large and the plain sum is taken.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weights, log_norm = _softmax(p)
        d = q - p
        mean = np.einsum("rv,rv->r", weights, d)
        d -= mean[:, None]
        large = d.max(axis=-1) > _LARGE
        tail = np.where(weights < TAIL, weights, np.float32(0))
        tail_p = tail.sum(axis=-1)
        growth = np.expm1(d)
        tail_q = tail_p + np.einsum("rv,rv->r", tail, growth)
        growth -= d
        excess = np.einsum("rv,rv->r", weights, growth)
        kl = np.log1p(excess)
        tail_q /= 1 + excess
        if large.any():
            other, other_norm = _softmax(q[large])
            kl[large] = other_norm - log_norm[large] - mean[large]
            tail_q[large] = np.where(weights[large] < TAIL, other, 0).sum(axis=-1)
    rows = np.arange(len(p))
    q_norm = log_norm + mean + kl
    top_p, top_q = p.argmax(axis=-1), q.argmax(axis=-1)
    sure_p, sure_q = weights[rows, top_p], np.exp(q[rows, top_q] - q_norm)
    nll_p, nll_q = log_norm - p[rows, following], q_norm - q[rows, following]
    return kl, top_p, top_q, sure_p, sure_q, tail_p, tail_q, nll_p, nll_q


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


def clustered_mean(values: FloatArray, member: npt.NDArray[np.bool_] | None = None) -> Estimate:
    """Mean over all positions, with a standard error clustered by window.

    Args:
        values: (N, T), a window a row. Positions of one window are not independent; windows are. A
            single window is split into eight runs of positions, which take the windows' place.
        member: (N, T) the positions that count, at least one; None for all.

    Returns:
        The mean and its standard error, which is NaN for a single position.

    Reference: ratio estimator of survey sampling, sqrt(C / (C - 1) sum (s_c - m n_c)^2) / sum n_c.
    """
    clusters = list(values)
    if member is not None:
        clusters = [row[of] for row, of in zip(values, member, strict=True) if of.any()]
    if len(clusters) == 1:
        clusters = np.array_split(clusters[0], min(_CLUSTERS_OF_ONE, clusters[0].size))
    if len(clusters) == 1:
        return Estimate(float(clusters[0].mean()), float("nan"))
    sums = np.array([cluster.sum(dtype=np.float64) for cluster in clusters])
    counts = np.array([cluster.size for cluster in clusters], dtype=np.float64)
    mean = sums.sum() / counts.sum()
    squares = ((sums - mean * counts) ** 2).sum() * len(clusters) / (len(clusters) - 1)
    return Estimate(float(mean), float(np.sqrt(squares) / counts.sum()))
