"""Round to nearest on the min/max grid, with codes recomputed on the stored scale and bias."""

from __future__ import annotations

from optiq.artifacts import QuantOption
from optiq.backend import mx
from optiq.numerics.affine import encode, grouped, minmax_grid
from optiq.quant.quantizers.base import Inputs, Packed


def quantize(w: mx.array, option: QuantOption, inputs: Inputs, dtype: mx.Dtype) -> Packed:  # noqa: ARG001  needs no inputs
    """The grid of `mx.quantize`; codes are nearest on the grid as stored, not as computed."""
    groups = grouped(w, option.group_size)
    grid = minmax_grid(groups, option.bits, dtype)
    return Packed(encode(groups, grid, option.bits), grid, option.bits)
