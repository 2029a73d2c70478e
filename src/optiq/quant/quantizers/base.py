"""What every quantizer takes and returns."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from optiq.artifacts import QuantOption
from optiq.backend import mx
from optiq.numerics.affine import Grid, decode


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of a matrix, which weigh its rounding errors.

    Attributes:
        gram: X^T X, (in, in) float32; the identity when nothing is known.
    """

    gram: mx.array

    @property
    def diagonal(self) -> mx.array:
        """Power of each input, (in,), never zero."""
        power = mx.diag(self.gram)
        return mx.maximum(power, 1e-6 * mx.maximum(power.mean(), 1e-12))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized matrix before packing.

    Attributes:
        codes: (rows, in / group_size, group_size) float32 whole numbers.
        grid: scales and biases, (rows, in / group_size).
        bits: bits of a code.
    """

    codes: mx.array
    grid: Grid
    bits: int

    def weights(self) -> mx.array:
        """Dense float32 weights, (rows, in)."""
        return decode(self.codes, self.grid).reshape(self.codes.shape[0], -1)


class Quantizer(Protocol):
    """Rounds the rows of a matrix to an option's format."""

    def __call__(
        self, w: mx.array, option: QuantOption, inputs: Inputs, dtype: mx.Dtype
    ) -> Packed:
        """Round a matrix.

        Args:
            w: (rows, in) float32.
            option: an affine option whose group size divides `in`.
            inputs: statistics of the inputs.
            dtype: stored dtype of scales and biases.
        """
        ...


def weighted_error(w: mx.array, rounded: mx.array, gram: mx.array) -> mx.array:
    """d H d^T of each row's error d: (rows,) float32; the squared error of the outputs."""
    d = w - rounded
    return ((d @ gram) * d).sum(axis=-1)
