"""What the final rounding will leave of the KL of min/max rounding, measured on sampled rows.

The sketch scores min/max rounding of all rows at every option. The final rounding of all rows at
every option would cost as much as converting once an option. So both are done on a few rows of each
matrix, and the ratio of their s^2, summed over probes and rows, scales the scores. Weighing the
errors by the inputs alone would be cheaper but ranks modules worse: error feedback moves errors to
where inputs are weak, and the KL also asks for the gradients and adds over a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optiq.artifacts import GROUP_SIZES, ModuleInfo, QuantOption, Rounding, menu
from optiq.backend import is_cpu, mx
from optiq.numerics.gram import damped
from optiq.quant.quantizers import device, gptq, rtn, search
from optiq.quant.quantizers.base import FloatArray, Inputs, weighted_error

SAMPLE_ROWS = 192
_MAX_COLUMNS = 2048


class Sampled(NamedTuple):
    """Rounding errors W - Q(W) of some rows and columns of a matrix.

    Attributes:
        rows: numbers of the rows, (n,) rising; of a stack of experts, rows of all of them.
        columns: numbers of the columns, (c,); None for all.
        before: errors of min/max rounding, (n, options, c) float32.
        after: errors of the final rounding, likewise.
    """

    rows: npt.NDArray[np.int64]
    columns: mx.array | None
    before: mx.array
    after: mx.array


def sampled_rows(num_rows: int) -> npt.NDArray[np.int64]:
    """Evenly spaced row numbers, at most 192."""
    count = min(SAMPLE_ROWS, num_rows)
    return np.linspace(0, num_rows - 1, count).round().astype(np.int64)


def sampled_columns(in_dims: int) -> mx.array | None:
    """None for all columns, or of a long row evenly spaced runs of whole groups, 2048 in all.

    Error feedback over a part of the columns leaves a little more error than over all of them; the
    cost of factorizing the inputs would grow with the cube of their number.
    """
    if in_dims <= _MAX_COLUMNS:
        return None
    run = max(size for size in GROUP_SIZES if in_dims % size == 0)
    starts = np.linspace(0, in_dims // run - 1, _MAX_COLUMNS // run).round().astype(np.int64) * run
    return mx.array((starts[:, None] + np.arange(run)).reshape(-1))


def at_columns(array: mx.array, columns: mx.array | None) -> mx.array:
    """(..., in) -> (..., c): the array at some columns, or itself for all."""
    return array if columns is None else array[..., columns]


def rounding_errors(
    infos: Sequence[ModuleInfo],
    weights: Sequence[mx.array],
    matrix: mx.array,
    rounding: Rounding,
    dtype: str,
    numbers: npt.NDArray[np.int64] | None = None,
) -> dict[str, Sampled]:
    """Errors of min/max rounding and of the final one, by module.

    Args:
        infos: modules that read the same inputs.
        weights: their weights, in the source dtype.
        matrix: Gram matrix of the inputs at `sampled_columns`, (c, c).
        rounding: the rounding convert will use; with `rtn` there is nothing to compare.
        dtype: stored dtype of scales and biases.
        numbers: of the rows; `sampled_rows` by default.

    Returns:
        By path, errors for every option of `artifacts.menu`, in its order.

    Cost: one factorization, and the rounding of at most 192 rows x 2048 columns a module at every
        option.
    """
    options = menu(infos[0].in_dims)
    if rounding == "rtn" or not options:
        return {}
    columns = sampled_columns(infos[0].in_dims)
    chosen = [sampled_rows(w.size // w.shape[-1]) if numbers is None else numbers for w in weights]
    rows = [
        np.array(at_columns(w.reshape(-1, w.shape[-1])[mx.array(at)], columns).astype(mx.float32))
        for w, at in zip(weights, chosen, strict=True)
    ]
    errors = host_errors if is_cpu() else device.sampled_errors
    given = np.concatenate(rows), options, np.array(matrix), rounding, dtype
    before, after = (mx.stack(parts, axis=1) for parts in errors(*given))
    found, start = {}, 0
    for info, at in zip(infos, chosen, strict=True):
        part = slice(start, start + len(at))
        start = part.stop
        found[info.path] = Sampled(at, columns, before[part], after[part])
    return found


def squared_sums(
    sampled: Sampled, g: mx.array, x: mx.array, first_row: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Sums of s^2 over sequences and sampled rows, for both roundings: (options,) each.

    Args:
        sampled: errors of a matrix.
        g: cotangents of the outputs, (sequences, T, out), for rows from `first_row` on.
        x: inputs, (sequences, T, in).
        first_row: row number of the first output.
    """
    start, stop = np.searchsorted(sampled.rows, (first_row, first_row + g.shape[-1]))
    if start == stop:
        none = np.zeros(sampled.before.shape[1], np.float32)
        return none, none
    own = g[..., mx.array(sampled.rows[start:stop] - first_row)].astype(mx.float32)
    gradient = own.swapaxes(-1, -2) @ at_columns(x, sampled.columns).astype(mx.float32)
    by_row = gradient.swapaxes(0, 1)  # (n, sequences, c)
    before, after = (
        ((by_row @ errors[start:stop].swapaxes(-1, -2)) ** 2).sum(axis=(0, 1))
        for errors in (sampled.before, sampled.after)
    )
    return np.array(before), np.array(after)


def squared_lookups(
    sampled: Sampled, gradient: mx.array, rows: npt.NDArray[np.integer]
) -> tuple[FloatArray, FloatArray]:
    """Sums of s^2 over the sampled rows of a table in one sequence, for both roundings: (options,).

    Args:
        sampled: errors of the table.
        gradient: of the loss by the rows that the sequence uses, (u, in) float32.
        rows: their numbers, (u,).
    """
    _, used, known = np.intersect1d(rows, sampled.rows, return_indices=True)
    own = at_columns(gradient[mx.array(used)], sampled.columns)[..., None]
    before, after = (
        ((errors[mx.array(known)] @ own) ** 2).sum(axis=(0, 2))
        for errors in (sampled.before, sampled.after)
    )
    return np.array(before), np.array(after)


def host_errors(
    rows: FloatArray,
    options: Sequence[QuantOption],
    gram_matrix: FloatArray,
    rounding: Rounding,
    dtype: str,
) -> tuple[list[mx.array], list[mx.array]]:
    """What `device.sampled_errors` gives, in numpy; options of one group size share a GPTQ run."""
    inputs = Inputs(gram_matrix)
    plain = [rtn.quantize(rows, option, inputs, dtype) for option in options]
    before = [mx.array(rows - packed.weights()) for packed in plain]
    final = [search.quantize(rows, option, inputs, dtype) for option in options]
    if rounding == "gptq":
        weighing = damped(gram_matrix, gptq.DAMPING)
        back = gptq.feedback(gram_matrix)
        for size in sorted({option.group_size for option in options}):
            at = [n for n, option in enumerate(options) if option.group_size == size]
            levels = [np.full(len(rows), 2 ** options[n].bits - 1, np.float32) for n in at]
            scales = np.concatenate([final[n].scales for n in at])
            biases = np.concatenate([final[n].biases for n in at])
            repeated = np.concatenate([rows] * len(at))
            codes, error = gptq.assign(repeated, scales, biases, np.concatenate(levels), back)
            for n, fed, left in zip(
                at, np.split(codes, len(at)), np.split(error, len(at)), strict=True
            ):
                better = left <= weighted_error(rows, final[n].weights(), weighing)
                chosen = np.where(better[:, None], fed, final[n].codes)
                final[n] = final[n]._replace(codes=chosen)
    return before, [mx.array(rows - packed.weights()) for packed in final]
