"""What every quantizer takes and returns.

Rounding runs in numpy on all back ends: it is a chain of cheap steps over small groups and columns,
which a GPU spends on launches, and its factorizations are LAPACK's. Rows are independent, so they
are shared out to threads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from optiq.artifacts import QuantOption

FloatArray = npt.NDArray[np.float32]
_EPS = np.float32(1e-7)
_FLOAT16_MAX = np.float32(65504)


def stored(values: FloatArray, dtype: str) -> FloatArray:
    """Values rounded to the dtype they are stored in (to nearest, ties to even), as float32."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of a matrix, which weigh its rounding errors.

    Attributes:
        gram: X^T X, (in, in) float32; the identity when nothing is known.
    """

    gram: FloatArray

    @property
    def diagonal(self) -> FloatArray:
        """Power of each input, (in,), never zero."""
        power = np.diag(self.gram)
        floor = 1e-6 * max(float(power.mean()), 1e-12)
        return np.maximum(power, floor).astype(np.float32)


class Packed(NamedTuple):
    """A quantized matrix before packing.

    Attributes:
        codes: (rows, in) uint8.
        scales: (rows, in / group_size) float32, exact in the stored dtype.
        biases: likewise.
    """

    codes: npt.NDArray[np.uint8]
    scales: FloatArray
    biases: FloatArray

    def weights(self) -> FloatArray:
        """Dense float32 weights, (rows, in)."""
        rows, groups = self.scales.shape
        codes = self.codes.reshape(rows, groups, -1).astype(np.float32)
        codes *= self.scales[..., None]
        codes += self.biases[..., None]
        return codes.reshape(rows, -1)


class Quantizer(Protocol):
    """Rounds the rows of a matrix to an option's format."""

    def __call__(self, w: FloatArray, option: QuantOption, inputs: Inputs, dtype: str) -> Packed:
        """Round a matrix.

        Args:
            w: (rows, in) float32.
            option: an affine option whose group size divides `in`.
            inputs: statistics of the inputs.
            dtype: stored dtype of scales and biases.
        """
        ...


def minmax_grid(groups: FloatArray, bits: int, dtype: str) -> tuple[FloatArray, FloatArray]:
    """Scale and bias of every group as `mx.quantize` chooses them: they span it and hold zero."""
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    from_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), _EPS)
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    zero = np.rint(edge / scale)
    scale = np.where(zero != 0, edge / np.where(zero != 0, zero, 1), scale)
    bias = np.where(zero != 0, edge, 0)
    return stored(scale.astype(np.float32), dtype), stored(bias.astype(np.float32), dtype)


def encode(groups: FloatArray, scales: FloatArray, biases: FloatArray, bits: int) -> FloatArray:
    """Nearest codes of (..., group_size) groups, as float32 whole numbers."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = groups - biases[..., None]
    codes *= inverse[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 2**bits - 1, out=codes)


def nearest(w: FloatArray, scales: FloatArray, biases: FloatArray, option: QuantOption) -> Packed:
    """Nearest codes of a (rows, in) matrix on a given grid."""
    groups = w.reshape(w.shape[0], -1, option.group_size)
    codes = encode(groups, scales, biases, option.bits)
    return Packed(codes.reshape(w.shape).astype(np.uint8), scales, biases)


def weighted_error(w: FloatArray, rounded: FloatArray, gram: FloatArray) -> FloatArray:
    """Squared error of the outputs of each row: d H d^T of its error d, (rows,)."""
    d = w - rounded
    error: FloatArray = np.einsum("ij,ij->i", d @ gram, d)
    return error


T = TypeVar("T")


def row_slices(rows: int, chunk: int) -> list[slice]:
    """Slices of at most `chunk` rows that cover all."""
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def over_rows(rows: int, chunk: int, work: Callable[[slice], T]) -> list[T]:
    """`work` on slices of at most `chunk` rows, in threads; results in order.

    For elementwise work: products have the threads of the BLAS already.
    """
    slices = row_slices(rows, chunk)
    if len(slices) == 1:
        return [work(slices[0])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, slices))
