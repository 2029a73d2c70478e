"""The affine format against `mx.quantize` and `mx.dequantize`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.artifacts import BITS, GROUP_SIZES
from optiq.backend import is_cpu, mx
from optiq.numerics.affine import (
    Grid,
    anchored_grid,
    decode,
    encode,
    grouped,
    minmax_grid,
    pack,
    round_trip,
    stored,
    unpack,
)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}
# The CPU computes as `mx.quantize` does; elsewhere products may be fused into sums.
ULPS = 0 if is_cpu() else 1

dtypes = pytest.mark.parametrize("dtype", DTYPES)
all_bits = pytest.mark.parametrize("bits", BITS)
all_groups = pytest.mark.parametrize("group_size", GROUP_SIZES)


def random_weights(seed, dtype, scale=0.03, shape=(16, 256)):
    """Weights that the dtype holds; the first two rows have one sign."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    w[0], w[1] = abs(w[0]), -abs(w[1])
    return mx.array(w * np.float32(scale)).astype(DTYPES[dtype])


def assert_within_ulps(found, wanted, dtype, ulps=ULPS):
    """Values of a dtype differ by at most that many steps of it."""
    found, wanted = np.array(found), np.array(wanted.astype(mx.float32))
    step = np.exp2(np.floor(np.log2(np.maximum(abs(wanted), 1e-30))) - MANTISSA_BITS[dtype])
    assert (abs(found - wanted) <= ulps * step).all()


def float32(array):
    return array.astype(mx.float32)


def same(a, b):
    return np.array_equal(np.array(a), np.array(b))


# -- packing -------------------------------------------------------------------------------------


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 3), words=st.integers(1, 4), data=st.data())
@settings(max_examples=60)
def test_unpack_inverts_pack(bits, rows, words, data):
    size = rows * words * 32
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size))
    codes = np.array(values, np.uint32).reshape(rows, words * 32)
    packed = pack(mx.array(codes), bits)
    assert packed.dtype == mx.uint32
    assert packed.shape == (rows, words * bits)
    assert same(unpack(packed, bits), codes)


@all_bits
def test_pack_takes_codes_of_any_dtype_and_keeps_leading_axes(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 64))
    wanted = pack(mx.array(codes.astype(np.uint32)), bits)
    assert wanted.shape == (2, 3, 2 * bits)
    for kind in (np.uint8, np.float32):
        assert same(pack(mx.array(codes.astype(kind)), bits), wanted)


@all_bits
def test_the_layout_is_a_little_endian_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 64)
    number = sum(int(code) << (bits * n) for n, code in enumerate(codes))
    data = number.to_bytes(64 * bits // 8, "little")
    assert np.array(pack(mx.array(codes), bits)).tobytes() == data


@all_bits
@all_groups
def test_mlx_reads_our_words_as_we_do(bits, group_size):
    """`mx.dequantize` of the packed codes is `decode`, bit for bit in float32."""
    rng = np.random.default_rng(bits)
    codes = mx.array(rng.integers(0, 2**bits, (8, 256)).astype(np.uint32))
    shape = (8, 256 // group_size)
    grid = Grid(*(mx.array(rng.standard_normal(shape).astype(np.float32)) for _ in "sb"))
    wanted = decode(grouped(float32(codes), group_size), grid).reshape(codes.shape)
    found = mx.dequantize(
        pack(codes, bits), grid.scales, grid.biases, group_size=group_size, bits=bits
    )
    if is_cpu():
        assert same(found, wanted)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-6, atol=1e-6)


@all_bits
def test_we_read_the_words_of_mlx(bits):
    w = random_weights(bits, "float32")
    words, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    codes = grouped(float32(unpack(words, bits)), 64)
    wanted = mx.dequantize(words, scales, biases, group_size=64, bits=bits)
    found = decode(codes, Grid(scales, biases)).reshape(w.shape)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-6, atol=1e-7)


# -- grids ---------------------------------------------------------------------------------------


@dtypes
@all_bits
@all_groups
def test_the_grid_is_that_of_mx_quantize(dtype, bits, group_size):
    for scale in (1e-6, 0.03, 100):
        w = random_weights(bits, dtype, scale)
        _, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
        grid = minmax_grid(grouped(float32(w), group_size), bits, DTYPES[dtype])
        assert_within_ulps(grid.scales, scales, dtype)
        assert_within_ulps(grid.biases, biases, dtype)


@dtypes
@all_bits
def test_extreme_values_get_the_grid_of_mx_quantize(dtype, bits):
    """The largest and the smallest weights of each dtype, alone and beside ordinary ones."""
    largest = {"float32": 1e37, "bfloat16": 1e37, "float16": 6e4}[dtype]
    smallest = {"float32": 1e-37, "bfloat16": 1e-37, "float16": 6e-8}[dtype]
    rows = np.zeros((8, 64), np.float32)
    rows[0] = np.linspace(-largest, largest, 64)
    rows[1] = np.linspace(0, largest, 64)
    rows[2] = np.linspace(-smallest, smallest, 64)
    rows[3] = np.linspace(-1, 1, 64)
    rows[3, 7] = largest
    rows[4, 5] = smallest
    rows[5] = 1e-7
    rows[6] = np.linspace(1000, 1001, 64)
    w = mx.array(rows).astype(DTYPES[dtype])
    words, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    groups = grouped(float32(w), 64)
    grid = minmax_grid(groups, bits, DTYPES[dtype])
    assert np.isfinite(np.array(grid)).all()
    assert_within_ulps(grid.scales, scales, dtype)
    assert_within_ulps(grid.biases, biases, dtype)
    codes = np.array(encode(groups, grid, bits))
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@dtypes
@all_bits
def test_constant_groups_are_exact_and_zeros_stay_zero(dtype, bits):
    values = [0.0, 1.0, -1.0, 0.03, -0.03, 3e-5, 1000.0, -6e4]
    w = stored(mx.array(np.repeat(np.float32(values)[:, None], 32, axis=1)), DTYPES[dtype])
    groups = grouped(w, 32)
    grid = minmax_grid(groups, bits, DTYPES[dtype])
    assert same(round_trip(groups, grid, bits), groups)


@dtypes
def test_grids_hold_values_of_the_stored_dtype(dtype):
    grid = minmax_grid(grouped(float32(random_weights(0, dtype)), 64), 4, DTYPES[dtype])
    for values in grid:
        assert values.dtype == mx.float32
        assert same(stored(values, DTYPES[dtype]), values)


@given(
    bits=st.sampled_from(BITS),
    low=st.floats(-100, 100, width=32),
    width=st.floats(2**-6, 100, width=32),
)
@settings(max_examples=100)
def test_an_anchored_grid_holds_the_larger_edge_and_zero(bits, low, width):
    high = float(np.float32(low) + np.float32(width))
    grid = anchored_grid(mx.array([low]), mx.array([high]), bits, mx.float32)
    edge = low if abs(low) > abs(high) else high
    scale, bias = (float(values.item()) for values in grid)
    if bias:
        assert bias == edge
        assert bias / scale == pytest.approx(round(bias / scale), rel=1e-5)
    if low <= 0 <= high:
        codes = encode(mx.array([[[0.0]]]), Grid(grid.scales[None], grid.biases[None]), bits)
        back = decode(codes, grid).item()
        assert back == pytest.approx(0, abs=1e-5 * abs(edge))


# -- codes ---------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from(BITS),
    scale=st.floats(-2, 2, width=32),
    bias=st.floats(-10, 10, width=32),
    values=st.lists(st.floats(-50, 50, width=32), min_size=32, max_size=32),
)
@settings(max_examples=100)
def test_codes_are_nearest(bits, scale, bias, values):
    """No other code is nearer than by float rounding; with a zero scale the code is 0."""
    if abs(scale) < 1e-6:
        scale = 0.0
    w = np.array(values, np.float32)
    grid = Grid(mx.array([scale]), mx.array([bias]))
    codes = np.array(encode(mx.array(w[None]), grid, bits))[0]
    assert (codes == codes.round()).all()
    assert ((codes >= 0) & (codes <= 2**bits - 1)).all()
    assert scale or not codes.any()
    levels = np.arange(2**bits) * np.float64(scale) + bias
    best = abs(w[:, None] - levels).min(axis=1)
    found = abs(w - levels[codes.astype(int)])
    assert (found <= best + 1e-4).all()


@dtypes
@all_bits
@all_groups
def test_codes_on_the_stored_grid_are_never_worse_than_those_of_mx_quantize(
    dtype, bits, group_size
):
    """MLX computes codes with the float32 scale and stores it rounded afterwards."""
    w = random_weights(7 * bits, dtype)
    words, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    groups = grouped(float32(w), group_size)
    grid = minmax_grid(groups, bits, DTYPES[dtype])
    theirs = Grid(float32(scales), float32(biases))
    theirs_back = decode(grouped(float32(unpack(words, bits)), group_size), theirs)
    ours, before = (
        np.array(((back - groups) ** 2).sum(axis=-1), np.float64)
        for back in (round_trip(groups, grid, bits), theirs_back)
    )
    assert (ours <= before * (1 + 1e-5)).all()


def test_recomputed_codes_pay_at_eight_bits():
    w = random_weights(0, "bfloat16", shape=(64, 512))
    words, scales, biases = mx.quantize(w, group_size=64, bits=8)
    theirs = mx.dequantize(words, float32(scales), float32(biases), group_size=64, bits=8)
    groups = grouped(float32(w), 64)
    ours = round_trip(groups, minmax_grid(groups, 8, mx.bfloat16), 8).reshape(w.shape)
    before, after = (((x - float32(w)) ** 2).mean().item() for x in (theirs, ours))
    assert after < 0.7 * before
