"""Range search and weighted least squares: the best grid of every group, in the stored dtype."""

from __future__ import annotations

from optiq.artifacts import QuantOption
from optiq.backend import mx
from optiq.numerics.affine import Grid, decode, encode, grouped, minmax_grid, stored
from optiq.quant.quantizers.base import Inputs, Packed

_CHUNK = 1 << 20
_SHRINK = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
    5: (1.0, 0.96, 0.92, 0.88),
    6: (1.0, 0.97, 0.94),
    8: (1.0, 0.98),
}


def _fit(groups: mx.array, h: mx.array, codes: mx.array, dtype: mx.Dtype) -> Grid:
    """Weighted least squares of weights on codes; the bias is fitted again to the stored scale."""
    total = mx.broadcast_to(h.sum(axis=-1), codes.shape[:-1])
    hq, hw = h * codes, h * groups
    mean_q, mean_w = hq.sum(axis=-1) / total, hw.sum(axis=-1) / total
    var = (hq * codes).sum(axis=-1) / total - mean_q * mean_q
    cov = (hq * groups).sum(axis=-1) / total - mean_q * mean_w
    scale = stored(mx.where(var > 1e-9, cov / mx.maximum(var, 1e-9), 0), dtype)
    return Grid(scale, stored(mean_w - scale * mean_q, dtype))


def _error(groups: mx.array, h: mx.array, grid: Grid, bits: int) -> mx.array:
    d = groups - decode(encode(groups, grid, bits), grid)
    return (h * d * d).sum(axis=-1)


def search_grid(groups: mx.array, h: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    """Grid with the least weighted squared error of those tried, never worse than min/max.

    Args:
        groups: (rows, num_groups, group_size) float32.
        h: (num_groups, group_size) weights, the powers of the inputs.
        bits: bits of a code.
        dtype: stored dtype of scales and biases.

    Cost: some 15 passes over the weights for each of 2 to 6 ranges.
    """
    grid = minmax_grid(groups, bits, dtype)
    best = _error(groups, h, grid, bits)
    high, low = groups.max(axis=-1), groups.min(axis=-1)
    levels = 2**bits - 1
    for shrink in _SHRINK[bits]:
        middle, half = (high + low) / 2, (high - low) / 2 * shrink
        trial = Grid(2 * half / levels, middle - half)
        for _ in range(2):
            trial = _fit(groups, h, encode(groups, trial, bits), dtype)
            error = _error(groups, h, trial, bits)
            better = error < best
            best = mx.where(better, error, best)
            grid = Grid(
                mx.where(better, trial.scales, grid.scales),
                mx.where(better, trial.biases, grid.biases),
            )
    return grid


def searched(w: mx.array, option: QuantOption, inputs: Inputs, dtype: mx.Dtype) -> Grid:
    """`search_grid` for a (rows, in) matrix, in chunks of rows that stay in the cache."""
    h = grouped(inputs.diagonal, option.group_size)
    rows = max(1, _CHUNK // w.shape[-1])
    grids = []
    for start in range(0, w.shape[0], rows):
        groups = grouped(w[start : start + rows], option.group_size)
        grid = search_grid(groups, h, option.bits, dtype)
        mx.eval(grid)
        grids.append(grid)
    scales = mx.concatenate([grid.scales for grid in grids])
    return Grid(scales, mx.concatenate([grid.biases for grid in grids]))


def quantize(w: mx.array, option: QuantOption, inputs: Inputs, dtype: mx.Dtype) -> Packed:
    """Nearest codes on the searched grid."""
    grid = searched(w, option, inputs, dtype)
    groups = grouped(w, option.group_size)
    return Packed(encode(groups, grid, option.bits), grid, option.bits)
