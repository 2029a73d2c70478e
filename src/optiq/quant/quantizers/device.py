"""The quantizers of this package in MLX, for back ends with a device of their own.

On the CPU numpy in threads is several times faster; beside a GPU it would be nearly all of the
time. Both follow the same steps, and a contract test holds them together. Factorizations are
LAPACK's everywhere, and so are made on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from optiq.artifacts import QuantOption, Rounding
from optiq.backend import mx
from optiq.models.load import DTYPES
from optiq.numerics.affine import Grid, decode, encode, grouped, minmax_grid, round_trip, stored
from optiq.numerics.gram import damped
from optiq.quant.quantizers import gptq
from optiq.quant.quantizers.base import FloatArray, Inputs
from optiq.quant.quantizers.search import FITS, SHRINK

_BLOCK = 64


class DeviceInputs(NamedTuple):
    """Statistics of the inputs of a matrix, on the device.

    Attributes:
        diagonal: power of each input, (in,), never zero.
        weighing: Gram matrix as error feedback sees it, (in, in).
        order: columns by falling input power, (in,); None where there is no feedback.
        factor: upper factor of the inverse Gram matrix in that order, (in, in); likewise.
    """

    diagonal: mx.array
    weighing: mx.array
    order: mx.array | None = None
    factor: mx.array | None = None


def device_inputs(gram: FloatArray, *, feedback: bool) -> DeviceInputs:
    """Statistics of a Gram matrix; with `feedback`, its factorization too (on the host)."""
    diagonal = mx.array(Inputs(gram).diagonal)
    weighing = mx.array(damped(gram, gptq.DAMPING))
    if not feedback:
        return DeviceInputs(diagonal, weighing)
    order, factor = gptq.feedback(gram)
    return DeviceInputs(diagonal, weighing, mx.array(order), mx.array(factor))


def weighted_error(w: mx.array, rounded: mx.array, gram: mx.array) -> mx.array:
    """Squared error of the outputs of each row: d H d^T of its error d, (rows,)."""
    d = w - rounded
    return ((d @ gram) * d).sum(axis=-1)


def _fit(
    groups: mx.array, h: mx.array, grid: Grid, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Weighted least squares on the codes of a grid: slope, mean of the weights, mean code."""
    codes = encode(groups, grid, bits)
    total = h.sum(axis=-1)
    mean_q = (codes * h).sum(axis=-1) / total
    mean_w = (groups * h).sum(axis=-1) / total
    mean_qw = (codes * groups * h).sum(axis=-1) / total
    mean_qq = (codes * codes * h).sum(axis=-1) / total
    var = mx.maximum(mean_qq - mean_q * mean_q, 0)
    cov = mean_qw - mean_q * mean_w
    return mx.where(var > 1e-9, cov / mx.where(var > 1e-9, var, 1), 0), mean_w, mean_q


def _error(groups: mx.array, h: mx.array, grid: Grid, bits: int) -> mx.array:
    """Weighted squared error of every group on a grid."""
    d = round_trip(groups, grid, bits) - groups
    return (d * d * h).sum(axis=-1)


def search_grid(groups: mx.array, h: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    """The grid of `search.search_grid`: the best of those tried, in the stored dtype.

    Args:
        groups: (rows, num_groups, group_size) float32.
        h: (num_groups, group_size) weights, the powers of the inputs.
        bits: bits of a code.
        dtype: stored dtype of scales and biases.
    """
    scales, biases = minmax_grid(groups, bits, dtype)
    best = _error(groups, h, Grid(scales, biases), bits)
    high, low = groups.max(axis=-1), groups.min(axis=-1)
    middle, half = (high + low) / 2, (high - low) / 2
    for shrink in SHRINK[bits]:
        grid = Grid(half * (2 * shrink / (2**bits - 1)), middle - half * shrink)
        for _ in range(FITS):
            slope, mean_w, mean_q = _fit(groups, h, grid, bits)
            scale = stored(slope, dtype)
            grid = Grid(scale, stored(mean_w - scale * mean_q, dtype))
            error = _error(groups, h, grid, bits)
            better = error < best
            best = mx.where(better, error, best)
            scales = mx.where(better, grid.scales, scales)
            biases = mx.where(better, grid.biases, biases)
    return Grid(scales, biases)


@mx.compile
def _assign_column(
    column: mx.array, s: mx.array, b: mx.array, levels: mx.array, pivot: mx.array
) -> tuple[mx.array, mx.array]:
    """Codes of one column, (rows,), and its errors over the pivot of the factor."""
    q = mx.clip(mx.round((column - b) * mx.where(s == 0, 0, 1 / mx.where(s == 0, 1, s))), 0, levels)
    return q, (column - (q * s + b)) / pivot


@mx.compile
def _fed_forward(rest: mx.array, factor_row: mx.array, error: mx.array) -> mx.array:
    return rest - factor_row[:, None] * error


def _assign_block(
    rest: mx.array, s: mx.array, b: mx.array, levels: mx.array, factor: mx.array
) -> tuple[mx.array, mx.array]:
    """Codes and errors of a block of columns: (columns, rows) each."""
    codes, errors = [], []
    for j in range(rest.shape[0]):
        q, error = _assign_column(rest[j], s[j], b[j], levels, factor[j, j])
        rest = _fed_forward(rest, factor[j], error)  # the factor is 0 at the columns that are done
        codes.append(q)
        errors.append(error)
    return mx.stack(codes), mx.stack(errors)


def assign(
    w: mx.array, grids: Sequence[Grid], levels: mx.array, inputs: DeviceInputs
) -> tuple[mx.array, mx.array]:
    """Codes with error feedback, as `gptq.assign`, for stacked rows of several group sizes.

    Args:
        w: (rows, in) float32.
        grids: one grid after the other, (rows of it, num_groups) each; all rows of `w` together.
        levels: (rows,) largest code.
        inputs: with order and factor.

    Returns:
        (rows, in) float32 codes, and (rows,) the weighted error d H d^T of each row.

    Cost: rows * in^2 multiply-adds; three launches a column.
    """
    order, factor = cast(mx.array, inputs.order), cast(mx.array, inputs.factor)
    rest = w.T[order]
    s = mx.concatenate([_spread(grid.scales, order) for grid in grids], axis=1)
    b = mx.concatenate([_spread(grid.biases, order) for grid in grids], axis=1)
    found, squared = [], mx.zeros_like(levels)
    for start in range(0, w.shape[1], _BLOCK):
        at = slice(start, start + _BLOCK)
        codes, errors = _assign_block(rest[:_BLOCK], s[at], b[at], levels, factor[at, at])
        rest = rest[_BLOCK:] - factor[at, start + _BLOCK :].T @ errors
        squared = squared + (errors * errors).sum(axis=0)
        found.append(codes)
        mx.eval(rest, squared, codes)
    return mx.concatenate(found)[mx.argsort(order)].T, squared


def _spread(values: mx.array, order: mx.array) -> mx.array:
    """A value a group -> a value a column, (in, rows) in the order of the feedback."""
    return values.T[order // (order.size // values.shape[1])]


def quantize(
    w: mx.array, option: QuantOption, inputs: DeviceInputs, dtype: str, rounding: Rounding
) -> tuple[mx.array, Grid]:
    """Codes of a matrix, (rows, in) uint8, and their grid.

    Args:
        w: (rows, in) float32.
        option: an affine option whose group size divides `in`.
        inputs: statistics of the inputs; with `gptq` and no factor, the searched grid alone.
        dtype: stored dtype of scales and biases.
        rounding: which rounding.
    """
    groups = grouped(w, option.group_size)
    grid = _grid(groups, option, inputs, dtype, rounding)
    codes = encode(groups, grid, option.bits)
    if rounding != "gptq" or inputs.factor is None:
        return codes.reshape(w.shape).astype(mx.uint8), grid
    before = weighted_error(w, decode(codes, grid).reshape(w.shape), inputs.weighing)
    levels = mx.full((w.shape[0],), 2**option.bits - 1, dtype=mx.float32)
    fed, after = assign(w, [grid], levels, inputs)
    chosen = mx.where((after <= before)[:, None], fed, codes.reshape(w.shape))
    return chosen.astype(mx.uint8), grid


def _grid(
    groups: mx.array, option: QuantOption, inputs: DeviceInputs, dtype: str, rounding: Rounding
) -> Grid:
    if rounding == "rtn":
        return minmax_grid(groups, option.bits, DTYPES[dtype])
    h = grouped(inputs.diagonal, option.group_size)
    return search_grid(groups, h, option.bits, DTYPES[dtype])


def sampled_errors(
    rows: FloatArray,
    options: Sequence[QuantOption],
    gram: FloatArray,
    rounding: Rounding,
    dtype: str,
) -> tuple[list[mx.array], list[mx.array]]:
    """Errors W - Q(W) of rows at every option, by min/max rounding and by the final one.

    Args:
        rows: (rows, in) float32.
        options: affine options.
        gram: Gram matrix of the inputs, (in, in).
        rounding: the final rounding, `search` or `gptq`.
        dtype: stored dtype of scales and biases.

    Returns:
        Two lists of (rows, in) float32 arrays, one an option.
    """
    w, inputs = mx.array(rows), device_inputs(gram, feedback=rounding == "gptq")
    before, codes, grids = [], [], []
    for option in options:
        groups = grouped(w, option.group_size)
        plain = minmax_grid(groups, option.bits, DTYPES[dtype])
        before.append(w - round_trip(groups, plain, option.bits).reshape(w.shape))
        grids.append(_grid(groups, option, inputs, dtype, rounding))
        codes.append(encode(groups, grids[-1], option.bits).reshape(w.shape))
        mx.eval(before[-1], codes[-1], *grids[-1])
    if rounding == "gptq":
        bits = np.repeat([option.bits for option in options], len(rows))
        levels = mx.array((2.0**bits - 1).astype(np.float32))
        fed, errors = assign(mx.tile(w, (len(options), 1)), grids, levels, inputs)
        for n, option in enumerate(options):
            at = slice(n * len(rows), (n + 1) * len(rows))
            dense = decode(grouped(codes[n], option.group_size), grids[n]).reshape(w.shape)
            better = errors[at] <= weighted_error(w, dense, inputs.weighing)
            codes[n] = mx.where(better[:, None], fed[at], codes[n])
    after = [
        w - decode(grouped(q, option.group_size), grid).reshape(w.shape)
        for q, option, grid in zip(codes, options, grids, strict=True)
    ]
    mx.eval(after)
    return before, after
