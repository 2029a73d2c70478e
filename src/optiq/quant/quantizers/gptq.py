"""GPTQ with static groups: searched grids, codes chosen column by column with error feedback."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optiq.artifacts import QuantOption
from optiq.numerics.gram import damped, inverse_factor
from optiq.quant.quantizers.base import (
    FloatArray,
    Inputs,
    Packed,
    nearest,
    row_slices,
    weighted_error,
)
from optiq.quant.quantizers.search import searched

DAMPING = 0.01
_BLOCK = 64
_CHUNK_ROWS = 4096


class Feedback(NamedTuple):
    """How the error of one column moves the columns after it.

    Attributes:
        order: columns by falling input power, (in,).
        factor: upper factor of the inverse Gram matrix in that order, (in, in).
    """

    order: npt.NDArray[np.int64]
    factor: FloatArray


def feedback(gram: FloatArray) -> Feedback:
    """Order and factor for a Gram matrix; shared by all matrices that read the same inputs.

    Cost: one factorization (numerics.gram.inverse_factor).
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    return Feedback(order, inverse_factor(gram[order][:, order], DAMPING))


def assign(
    w: FloatArray, scales: FloatArray, biases: FloatArray, levels: FloatArray, back: Feedback
) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """Codes of every column, chosen in order with the errors of earlier columns fed forward.

    Args:
        w: (rows, in) float32.
        scales: (rows, num_groups) scale of every group.
        biases: (rows, num_groups) bias of every group.
        levels: (rows,) largest code, so that rows of several widths run together.
        back: order and factor of the inputs.

    Returns:
        (rows, in) uint8 codes, and (rows,) the weighted error d H d^T of each row, which is the
        sum of the squared steps of the feedback.

    Cost: rows * in^2 multiply-adds.
    Reference: GPTQ (arXiv 2210.17323); differs: grids are fixed before, so columns may be taken in
        any order without moving a group.
    """
    order, factor = back
    group_of = order // (w.shape[1] // scales.shape[1])
    rest = np.ascontiguousarray(w.T[order])
    s, b = scales.T[group_of], biases.T[group_of]
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s != 0)
    codes = np.empty(rest.shape, np.uint8)
    errors = np.empty((_BLOCK, w.shape[0]), np.float32)
    squared = np.zeros(w.shape[0], np.float32)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        for j in range(start, stop):
            q = rest[j] - b[j]
            q *= inverse[j]
            np.rint(q, out=q)
            np.clip(q, 0, levels, out=q)
            codes[j] = q
            error = errors[j - start]
            np.multiply(q, s[j], out=error)
            error += b[j]
            np.subtract(rest[j], error, out=error)
            error /= factor[j, j]
            if j + 1 < stop:
                rest[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        squared += np.einsum("ij,ij->j", errors[: stop - start], errors[: stop - start])
        rest[stop:] -= factor[start:stop, stop:].T @ errors[: stop - start]
    out = np.empty_like(codes)
    out[order] = codes
    return np.ascontiguousarray(out.T), squared


def quantize_with(
    w: FloatArray, option: QuantOption, inputs: Inputs, dtype: str, back: Feedback
) -> Packed:
    """GPTQ with a given factor; a row keeps the nearest codes where these are better."""
    scales, biases = searched(w, option, inputs, dtype)
    plain = nearest(w, scales, biases, option)
    gram = damped(inputs.gram, DAMPING)

    def work(rows: slice) -> npt.NDArray[np.uint8]:
        part = w[rows]
        levels = np.full(part.shape[0], 2**option.bits - 1, np.float32)
        codes, error = assign(part, scales[rows], biases[rows], levels, back)
        before = Packed(plain.codes[rows], scales[rows], biases[rows])
        better = error <= weighted_error(part, before.weights(), gram)
        return np.where(better[:, None], codes, before.codes)

    # one slice after the other: its products are shared out to threads by the BLAS
    parts = [work(rows) for rows in row_slices(w.shape[0], _CHUNK_ROWS)]
    return Packed(np.concatenate(parts), scales, biases)


def quantize(w: FloatArray, option: QuantOption, inputs: Inputs, dtype: str) -> Packed:
    """Searched grids, then codes with error feedback over the whole row."""
    return quantize_with(w, option, inputs, dtype, feedback(inputs.gram))
