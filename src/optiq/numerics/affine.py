"""The affine format of MLX: a code q of b bits stands for `scale * q + bias`, both per group.

Weights are float32 here, grouped as (..., num_groups, group_size); scales and biases are float32
arrays that hold values of the stored dtype exactly.
"""

from __future__ import annotations

from typing import NamedTuple

from optiq.backend import mx

_EPS = 1e-7


class Grid(NamedTuple):
    """Scale and bias of every group: (..., num_groups) float32, exact in the stored dtype."""

    scales: mx.array
    biases: mx.array


def grouped(w: mx.array, group_size: int) -> mx.array:
    """(..., in) -> (..., in / group_size, group_size)."""
    return w.reshape(*w.shape[:-1], w.shape[-1] // group_size, group_size)


def stored(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """Values rounded to the dtype they are stored in, as float32."""
    return values.astype(dtype).astype(mx.float32)


def minmax_grid(groups: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    """The grid `mx.quantize` makes: it spans the group, and zero lies on it.

    Args:
        groups: (..., num_groups, group_size) float32.
        bits: bits of a code.
        dtype: stored dtype of scales and biases.
    """
    high, low = groups.max(axis=-1), groups.min(axis=-1)
    return anchored_grid(low, high, bits, dtype)


def anchored_grid(low: mx.array, high: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    """A grid over [low, high] whose larger edge is exact and which holds zero, as `mx.quantize`."""
    levels = 2**bits - 1
    from_low = mx.abs(low) > mx.abs(high)
    scale = mx.maximum((high - low) / levels, _EPS)
    scale = mx.where(from_low, scale, -scale)
    edge = mx.where(from_low, low, high)
    zero = mx.round(edge / scale)
    has_zero = zero != 0
    scale = mx.where(has_zero, edge / mx.where(has_zero, zero, 1), scale)
    bias = mx.where(has_zero, edge, 0)
    return Grid(stored(scale, dtype), stored(bias, dtype))


def encode(groups: mx.array, grid: Grid, bits: int) -> mx.array:
    """Nearest codes on a grid: float32 whole numbers, shaped like `groups`."""
    scale = grid.scales[..., None]
    inverse = mx.where(scale == 0, 0, 1 / mx.where(scale == 0, 1, scale))
    return mx.clip(mx.round((groups - grid.biases[..., None]) * inverse), 0, 2**bits - 1)


def decode(codes: mx.array, grid: Grid) -> mx.array:
    """Weights of codes: `scale * q + bias`, float32, shaped like `codes`."""
    return codes * grid.scales[..., None] + grid.biases[..., None]


def round_trip(groups: mx.array, grid: Grid, bits: int) -> mx.array:
    """Weights after rounding to the nearest codes."""
    return decode(encode(groups, grid, bits), grid)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., in) of any numeric dtype -> uint32 (..., in * bits / 32) in MLX's layout.

    The layout is a little-endian stream of bits: 32 codes fill `bits` words.
    """
    words = codes.astype(mx.uint32).reshape(*codes.shape[:-1], codes.shape[-1] // 32, 32)
    out = [mx.zeros(words.shape[:-1], dtype=mx.uint32) for _ in range(bits)]
    for position in range(32):
        word, offset = divmod(position * bits, 32)
        code = words[..., position]
        out[word] = out[word] | (code << offset)
        if offset + bits > 32:
            out[word + 1] = out[word + 1] | (code >> (32 - offset))
    packed = mx.stack(out, axis=-1)
    return packed.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 32)


def unpack(packed: mx.array, bits: int) -> mx.array:
    """The inverse of `pack`: uint32 (..., words) -> uint32 codes (..., words * 32 / bits)."""
    words = packed.reshape(*packed.shape[:-1], packed.shape[-1] // bits, bits)
    codes = []
    for position in range(32):
        word, offset = divmod(position * bits, 32)
        code = words[..., word] >> offset
        if offset + bits > 32:
            code = code | (words[..., word + 1] << (32 - offset))
        codes.append(code & (2**bits - 1))
    return mx.stack(codes, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 32 // bits)
