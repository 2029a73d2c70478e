"""How a layer holds keys and values: as they are, or quantized in groups along a head.

What is held is some arrays of (B, heads, columns, any), the same columns in each, so that a cache
cuts, joins and copies columns and need not know what is in them. Attention is given plain arrays,
of one layer at a time. mlx-lm's attention over quantized arrays would save making them, but is
several times slower when a prompt is read, and knows no sinks and no layers that read the keys of
others.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Protocol

from optiq.backend import mx
from optiq.errors import UnsupportedModel

Columns = tuple[mx.array, ...]
"""What is held of some tokens: (B, heads, columns, any) each."""

GROUPS: Final = (64, 32)
"""Numbers that share a scale, the first that divides a head."""

_PARTS: Final = 3  # codes, scales and biases
_CODE_BITS: Final = 32  # of the integers that hold the codes


class Coding(Protocol):
    """Keys and values <-> what is held of them, column by column."""

    def encoded(self, keys: mx.array, values: mx.array) -> Columns:
        """What is held of keys and values: (B, heads, N, dim) each."""
        ...

    def decoded(self, columns: Columns) -> tuple[mx.array, mx.array]:
        """Keys and values."""
        ...


class Plain:
    """Keys and values as the model makes them."""

    def encoded(self, keys: mx.array, values: mx.array) -> Columns:
        """See `Coding`."""
        return keys, values

    def decoded(self, columns: Columns) -> tuple[mx.array, mx.array]:
        """See `Coding`."""
        keys, values = columns
        return keys, values


PLAIN: Final = Plain()


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Codes of some bits, with a scale and a bias for each group of a head.

    A column depends on its own token alone: the same tokens give the same codes in any chunks.

    Attributes:
        bits: of a code, 8 or 4.
    """

    bits: int

    def encoded(self, keys: mx.array, values: mx.array) -> Columns:
        """See `Coding`.

        Raises:
            UnsupportedModel: if no group divides a head.
        """
        return (*self._packed(keys), *self._packed(values))

    def decoded(self, columns: Columns) -> tuple[mx.array, mx.array]:
        """See `Coding`."""
        return self._unpacked(columns[:_PARTS]), self._unpacked(columns[_PARTS:])

    def _packed(self, side: mx.array) -> Columns:
        dim = side.shape[-1]
        group = next((size for size in GROUPS if dim and dim % size == 0), None)
        if group is None:
            raise UnsupportedModel(
                f"this model has attention heads of {dim} numbers, which cannot be held in "
                f"{self.bits} bits: they would have to be a multiple of {min(GROUPS)}; leave out "
                "kv_bits"
            )
        codes, scales, biases = mx.quantize(side, group_size=group, bits=self.bits)
        return codes, scales, biases

    def _unpacked(self, parts: Columns) -> mx.array:
        codes, scales, biases = parts
        group = codes.shape[-1] * _CODE_BITS // self.bits // scales.shape[-1]
        return mx.dequantize(codes, scales, biases, group_size=group, bits=self.bits)


def coding_of(bits: int | None) -> Coding:
    """The coding of so many bits; None for what the model makes."""
    return PLAIN if bits is None else Quantized(bits)
