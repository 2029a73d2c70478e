"""What the final rounding will leave of the min/max rounding error, measured on sampled rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from optiq.artifacts import GROUP_SIZES, ModuleInfo, QuantOption, Rounding, menu
from optiq.backend import is_cpu, mx
from optiq.models.taps import Call
from optiq.numerics.gram import damped, gram
from optiq.quant.quantizers import device, gptq, rtn, search
from optiq.quant.quantizers.base import FloatArray, Inputs, weighted_error

SAMPLE_ROWS = 192
_MAX_COLUMNS = 2048


class GramStore:
    """Gram matrices of the matrices of one block; matrices that read the same array share one.

    Sums keep their rounding errors in a second array, so that they do not depend on the order of
    the terms: error feedback amplifies a difference in the last bit, and processes that share a run
    must agree.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[mx.array, mx.array]] = []
        self._of: dict[str, int] = {}

    def add(self, calls: list[Call]) -> None:
        """Add the inputs of one micro-batch; call it with every micro-batch of the block."""
        fresh: dict[int, int] = {}
        added: set[tuple[int, int]] = set()
        for call in calls:
            if call.lookup:
                continue
            key = id(call.x)
            if call.path not in self._of:
                if key not in fresh:
                    fresh[key] = len(self._sums)
                    zero = mx.zeros((call.x.shape[-1],) * 2)
                    self._sums.append((zero, zero))
                self._of[call.path] = fresh[key]
            slot = self._of[call.path]
            if (slot, key) not in added:
                self._sums[slot] = _added(self._sums[slot], gram(call.x))
                added.add((slot, key))
        mx.eval(self._sums)

    def gather(self, group: mx.distributed.Group) -> None:
        """Take in the sums of the other processes, which have seen the same matrices."""
        for slot, parts in enumerate(self._sums):
            totals, rests = (mx.distributed.all_gather(part[None], group=group) for part in parts)
            total = (mx.zeros_like(parts[0]), rests.sum(axis=0))
            for other in totals:
                total = _added(total, other)
            self._sums[slot] = total
            mx.eval(total)

    def groups(self) -> Iterator[tuple[list[str], mx.array]]:
        """(paths, Gram matrix) of every shared input, in order of first use."""
        for slot, (total, rest) in enumerate(self._sums):
            yield [path for path, index in self._of.items() if index == slot], total + rest

    def clear(self) -> None:
        """Forget everything."""
        self._sums, self._of = [], {}


def _added(total: tuple[mx.array, mx.array], new: mx.array) -> tuple[mx.array, mx.array]:
    """A sum and what rounding took from it, with one more term.

    Reference: two-sum of Knuth, The Art of Computer Programming 2, 4.2.2.
    """
    high, rest = total
    s = high + new
    part = s - high
    return s, rest + ((high - (s - part)) + (new - part))


def _sample(weight: mx.array, columns: mx.array) -> FloatArray:
    rows = weight.reshape(-1, weight.shape[-1])
    count = min(SAMPLE_ROWS, rows.shape[0])
    picked = np.linspace(0, rows.shape[0] - 1, count).round().astype(np.int64)
    return np.array(rows[mx.array(picked)][:, columns].astype(mx.float32))


def _sampled_columns(in_dims: int) -> mx.array:
    """All columns, or of a long row evenly spaced runs of whole groups, 2048 columns in all.

    Error feedback over a part of the columns leaves a little more error than over all of them; the
    cost of factorizing the inputs would grow with the cube of their number.
    """
    if in_dims <= _MAX_COLUMNS:
        return mx.arange(in_dims)
    run = max(size for size in GROUP_SIZES if in_dims % size == 0)
    starts = np.linspace(0, in_dims // run - 1, _MAX_COLUMNS // run).round().astype(np.int64) * run
    return mx.array((starts[:, None] + np.arange(run)).reshape(-1))


def rounding_ratios(
    infos: Sequence[ModuleInfo],
    weights: Sequence[mx.array],
    matrix: mx.array,
    rounding: Rounding,
    dtype: str,
) -> dict[str, FloatArray]:
    """Weighted error of a rounding over that of min/max rounding, by module and option.

    Args:
        infos: modules that read the same inputs.
        weights: their weights, in the source dtype.
        matrix: Gram matrix of the inputs, (in, in).
        rounding: the rounding convert will use.
        dtype: stored dtype of scales and biases.

    Returns:
        By path, one ratio for every option of `artifacts.menu`, in its order.

    Cost: one factorization, and the rounding of at most 192 rows x 2048 columns a module at every
        option.
    """
    options = menu(infos[0].in_dims)
    if rounding == "rtn" or not options:
        return {info.path: np.ones(len(options), np.float32) for info in infos}
    columns = _sampled_columns(infos[0].in_dims)
    gram_matrix = np.array(matrix[columns][:, columns])
    samples = [_sample(weight, columns) for weight in weights]
    errors = host_errors if is_cpu() else device.sampled_errors
    before, after = errors(np.concatenate(samples), options, gram_matrix, rounding, dtype)
    found, start = {}, 0
    for info, sample in zip(infos, samples, strict=True):
        part = slice(start, start + len(sample))
        start = part.stop
        sums = [
            (float(a[part].sum()), float(b[part].sum())) for a, b in zip(after, before, strict=True)
        ]
        found[info.path] = np.array([a / b if b > 0 else 1.0 for a, b in sums], np.float32)
    return found


def host_errors(
    rows: FloatArray,
    options: Sequence[QuantOption],
    gram_matrix: FloatArray,
    rounding: Rounding,
    dtype: str,
) -> tuple[FloatArray, FloatArray]:
    """What `device.sampled_errors` gives, in numpy; options of one group size share a GPTQ run."""
    inputs = Inputs(gram_matrix)
    weighing = damped(gram_matrix, gptq.DAMPING)
    plain = [rtn.quantize(rows, option, inputs, dtype).weights() for option in options]
    before = np.stack([weighted_error(rows, dense, weighing) for dense in plain])
    packed = [search.quantize(rows, option, inputs, dtype) for option in options]
    if rounding == "search":
        return before, np.stack([weighted_error(rows, p.weights(), weighing) for p in packed])
    back = gptq.feedback(gram_matrix)
    after = np.empty_like(before)
    for size in sorted({option.group_size for option in options}):
        at = [n for n, option in enumerate(options) if option.group_size == size]
        levels = [np.full(len(rows), 2 ** options[n].bits - 1, np.float32) for n in at]
        scales = np.concatenate([packed[n].scales for n in at])
        biases = np.concatenate([packed[n].biases for n in at])
        repeated = np.concatenate([rows] * len(at))
        _, error = gptq.assign(repeated, scales, biases, np.concatenate(levels), back)
        after[at] = error.reshape(len(at), -1)
    return before, after
