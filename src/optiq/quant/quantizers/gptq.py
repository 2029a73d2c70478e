"""GPTQ with static groups: searched grids, codes chosen column by column with error feedback."""

from __future__ import annotations

from typing import NamedTuple

from optiq.artifacts import QuantOption
from optiq.backend import mx
from optiq.numerics.affine import Grid, encode, grouped
from optiq.numerics.gram import damped, inverse_factor
from optiq.quant.quantizers.base import Inputs, Packed, weighted_error
from optiq.quant.quantizers.search import searched

DAMPING = 0.01
_BLOCK = 32


class Feedback(NamedTuple):
    """How the error of one column moves the columns after it.

    Attributes:
        order: columns by falling input power, (in,).
        factor: upper factor of the inverse Gram in that order, (in, in).
    """

    order: mx.array
    factor: mx.array


def feedback(gram: mx.array) -> Feedback:
    """Order and factor for a Gram matrix; shared by all matrices that read the same inputs.

    Cost: one factorization (numerics.gram.inverse_factor).
    """
    order = mx.argsort(-mx.diag(gram))
    return Feedback(order, inverse_factor(gram[order][:, order], DAMPING))


def assign(
    w: mx.array, scales: mx.array, biases: mx.array, levels: mx.array, back: Feedback
) -> mx.array:
    """Codes of every column, chosen in order with the errors of earlier columns fed forward.

    Args:
        w: (rows, in) float32.
        scales: (rows, in) scale of every weight.
        biases: (rows, in) bias of every weight.
        levels: largest code, scalar or (rows,), so that rows of several widths run together.
        back: order and factor of the inputs.

    Returns:
        (rows, in) float32 whole numbers.

    Cost: rows * in^2 multiply-adds, a few array operations a column.
    Reference: GPTQ (arXiv 2210.17323); differs: grids are fixed before, so columns may be taken in
        any order without moving a group.
    """
    order, factor = back
    rest = w.T[order]
    s, b = scales.T[order], biases.T[order]
    inverse = mx.where(s == 0, 0, 1 / mx.where(s == 0, 1, s))
    codes = []
    for start in range(0, w.shape[1], _BLOCK):
        size = min(_BLOCK, w.shape[1] - start)
        block = rest[:size]
        errors = []
        for j in range(size):
            at = start + j
            column = block[0]
            q = mx.clip(mx.round((column - b[at]) * inverse[at]), 0, levels)
            error = (column - (q * s[at] + b[at])) / factor[at, at]
            codes.append(q)
            errors.append(error)
            if j + 1 < size:
                block = block[1:] - factor[at, at + 1 : start + size][:, None] * error
        rest = rest[size:] - factor[start : start + size, start + size :].T @ mx.stack(errors)
        mx.eval(rest, codes[-size:])
    return mx.stack(codes)[mx.argsort(order)].T


def expand(values: mx.array, group_size: int) -> mx.array:
    """(rows, num_groups) -> (rows, in): every weight's own scale or bias."""
    return mx.repeat(values, group_size, axis=-1)


def quantize_with(
    w: mx.array, option: QuantOption, inputs: Inputs, dtype: mx.Dtype, back: Feedback
) -> Packed:
    """GPTQ with a given factor; a row keeps the searched codes where these are better."""
    grid = searched(w, option, inputs, dtype)
    nearest = encode(grouped(w, option.group_size), grid, option.bits)
    levels = mx.array(float(2**option.bits - 1))
    size = option.group_size
    codes = assign(w, expand(grid.scales, size), expand(grid.biases, size), levels, back)
    fed = Packed(grouped(codes, size), grid, option.bits)
    plain = Packed(nearest, grid, option.bits)
    gram = damped(inputs.gram, DAMPING)
    better = weighted_error(w, fed.weights(), gram) <= weighted_error(w, plain.weights(), gram)
    return Packed(mx.where(better[:, None, None], fed.codes, plain.codes), grid, option.bits)


def quantize(w: mx.array, option: QuantOption, inputs: Inputs, dtype: mx.Dtype) -> Packed:
    """Searched grids, then codes with error feedback over the whole row."""
    return quantize_with(w, option, inputs, dtype, feedback(inputs.gram))


__all__ = ["Feedback", "Grid", "assign", "expand", "feedback", "quantize", "quantize_with"]
