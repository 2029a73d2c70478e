"""Range search and weighted least squares: the best grid of every group, in the stored dtype."""

from __future__ import annotations

import numpy as np

from optiq.artifacts import QuantOption
from optiq.quant.quantizers.base import (
    FloatArray,
    Inputs,
    Packed,
    encode,
    minmax_grid,
    nearest,
    over_rows,
    stored,
)

_CHUNK_WEIGHTS = 1 << 17
FITS = 2
SHRINK = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
    5: (1.0, 0.96, 0.92, 0.88),
    6: (1.0, 0.97, 0.94),
    8: (1.0, 0.98),
}


class _Weighted:
    """Groups, the weights of their errors, and the sums that do not change during the search."""

    def __init__(self, groups: FloatArray, h: FloatArray) -> None:
        self.groups = groups
        self.h = np.ascontiguousarray(np.broadcast_to(h, groups.shape))
        self.total = self.h.sum(axis=-1)
        self.hw = self.h * groups
        self.mean = self.hw.sum(axis=-1) / self.total

    def error(self, codes: FloatArray, scale: FloatArray, bias: FloatArray) -> FloatArray:
        """Weighted squared error of every group; overwrites the codes."""
        codes *= scale[..., None]
        codes += bias[..., None]
        codes -= self.groups
        codes *= codes
        result: FloatArray = np.einsum("...j,...j->...", codes, self.h)
        return result

    def fit(self, codes: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
        """Weighted least squares of weights on codes; the bias is fitted to the stored scale."""
        mean_q = np.einsum("...j,...j->...", codes, self.h) / self.total
        mean_qw = np.einsum("...j,...j->...", codes, self.hw) / self.total
        mean_qq = np.einsum("...j,...j,...j->...", codes, codes, self.h) / self.total
        var = np.maximum(mean_qq - mean_q * mean_q, 0)
        cov = mean_qw - mean_q * self.mean
        scale = np.divide(cov, var, out=np.zeros_like(cov), where=var > 1e-9)
        scale = stored(scale, dtype)
        return scale, stored(self.mean - scale * mean_q, dtype)


def search_grid(
    groups: FloatArray, h: FloatArray, bits: int, dtype: str
) -> tuple[FloatArray, FloatArray]:
    """Scale and bias with the least weighted squared error of those tried.

    The min/max grid is among them, so the result is never worse than that.

    Args:
        groups: (rows, num_groups, group_size) float32.
        h: (num_groups, group_size) weights, the powers of the inputs.
        bits: bits of a code.
        dtype: stored dtype of scales and biases.

    Cost: some 15 passes over the weights for each of 2 to 6 ranges.
    """
    data = _Weighted(groups, h)
    scales, biases = minmax_grid(groups, bits, dtype)
    best = data.error(encode(groups, scales, biases, bits), scales, biases)
    high, low = groups.max(axis=-1), groups.min(axis=-1)
    middle, half = (high + low) / 2, (high - low) / 2
    for shrink in SHRINK[bits]:
        scale = (half * (2 * shrink / (2**bits - 1))).astype(np.float32)
        bias = (middle - half * shrink).astype(np.float32)
        for _ in range(FITS):
            scale, bias = data.fit(encode(groups, scale, bias, bits), dtype)
            error = data.error(encode(groups, scale, bias, bits), scale, bias)
            better = error < best
            np.copyto(best, error, where=better)
            np.copyto(scales, scale, where=better)
            np.copyto(biases, bias, where=better)
    return scales, biases


def searched(
    w: FloatArray, option: QuantOption, inputs: Inputs, dtype: str
) -> tuple[FloatArray, FloatArray]:
    """`search_grid` for a (rows, in) matrix."""
    h = inputs.diagonal.reshape(-1, option.group_size)

    def work(rows: slice) -> tuple[FloatArray, FloatArray]:
        groups = w[rows].reshape(-1, *h.shape)
        return search_grid(groups, h, option.bits, dtype)

    parts = over_rows(w.shape[0], max(1, _CHUNK_WEIGHTS // w.shape[1]), work)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def quantize(w: FloatArray, option: QuantOption, inputs: Inputs, dtype: str) -> Packed:
    """Nearest codes on the searched grid."""
    return nearest(w, *searched(w, option, inputs, dtype), option)
