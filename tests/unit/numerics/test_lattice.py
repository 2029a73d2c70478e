"""The search for the grid that weights lie on: which rules, which sources, and what is no grid."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.backend import mx
from optiq.numerics.affine import decode, encode, grouped, minmax_grid, pack, stored
from optiq.numerics.lattice import BITS, NEAR, find_lattice

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
RULES = {
    "ext/-8": lambda extreme: extreme / -8,
    "absmax/8": lambda extreme: abs(extreme) / 8,
    "absmax/7.5": lambda extreme: abs(extreme) / 7.5,
    "absmax/7": lambda extreme: abs(extreme) / 7,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def rounded(values, dtype):
    """Float32 values of a dtype, as numpy."""
    return np.array(stored(mx.array(np.asarray(values, np.float32)), DTYPES[dtype]))


def gauss(shape=(96, 256), seed=0):
    return (0.03 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def few_bits(values, bits):
    """Values with so many significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent).astype(np.float32)


def symmetric(w, rule, dtype, scale_bits=None):
    """Weights rounded to d (q - 8) by a rule of QAT, with d and the codes (blocks, 32)."""
    blocks = w.reshape(-1, 32)
    extreme = np.take_along_axis(blocks, abs(blocks).argmax(axis=1)[:, None], axis=1)
    d = rounded(RULES[rule](extreme), dtype)
    if scale_bits:
        d = few_bits(d, scale_bits)
    q = np.clip(np.rint(blocks / np.where(d == 0, 1, d)), -8, 7) + 8
    return rounded(d * (q - 8), dtype).reshape(w.shape), d, q


def affine(w, dtype, levels=15):
    """Weights rounded to d q + m with m the smallest and d the 15th part of the range."""
    blocks = w.reshape(-1, 32)
    m = rounded(blocks.min(axis=1, keepdims=True), dtype)
    d = rounded((blocks.max(axis=1, keepdims=True) - m) / levels, dtype)
    q = np.clip(np.rint((blocks - m) / d), 0, levels)
    return rounded(d * q + m, dtype).reshape(w.shape), d, q


def find(w, dtype):
    return find_lattice(mx.array(w).astype(DTYPES[dtype]), DTYPES[dtype])


def codes_of(w, lattice):
    """Codes on the grid that was found, (blocks, 32)."""
    codes = encode(grouped(mx.array(w), 32), lattice.grid, BITS)
    return np.array(codes).reshape(-1, 32)


def decoded(w, lattice):
    """Float32 products of scale and codes plus bias."""
    codes = encode(grouped(mx.array(w), 32), lattice.grid, BITS)
    return np.array(decode(codes, lattice.grid)).reshape(w.shape)


def assert_exact(w, lattice, dtype, kind="q4_0"):
    """The report says so, and the float32 product rounded to the dtype is the source."""
    assert lattice is not None
    assert (lattice.report.kind, lattice.report.exact) == (kind, True)
    assert lattice.report.blocks == 1
    for values in lattice.grid:
        np.testing.assert_array_equal(rounded(values, dtype), np.array(values))
    np.testing.assert_array_equal(rounded(decoded(w, lattice), dtype), w)


# -- rules of QAT --------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale_bits", [None, 5], ids=["any d", "d of 5 bits"])
def test_every_rule_is_found_and_every_code_recovered(dtype, rule, scale_bits):
    """With d of 5 bits every product is representable; else the products themselves are rounded."""
    w, d, q = symmetric(gauss(), rule, dtype, scale_bits)
    lattice = find(w, dtype)
    assert_exact(w, lattice, dtype)
    scales = np.array(lattice.grid.scales).reshape(-1, 1)
    np.testing.assert_array_equal(np.array(lattice.grid.biases).reshape(-1, 1), -8 * scales)
    np.testing.assert_allclose(abs(scales), abs(d), rtol=0.01)
    turned = np.sign(scales) != np.sign(d)  # -7..7 is the same grid from either side
    np.testing.assert_array_equal(codes_of(w, lattice), np.where(turned, 16 - q, q))
    if scale_bits:
        assert lattice.report.residual < 1e-5


@given(
    rule=st.sampled_from(sorted(RULES)),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-6, 3),
    tail=st.booleans(),
)
@settings(max_examples=40)
def test_any_weights_on_a_grid_are_exact(rule, dtype, seed, exponent, tail):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (8, 64)) if tail else rng.standard_normal((8, 64))
    w, _, _ = symmetric((w * 2.0**exponent).astype(np.float32), rule, dtype)
    assert_exact(w, find(w, dtype), dtype)


@dtypes
def test_stock_dequantize_gives_the_source_back(dtype):
    """The codes and grid in MLX's own format, decoded by MLX in float32."""
    w, _, _ = symmetric(gauss(), "absmax/7.5", dtype)
    lattice = find(w, dtype)
    codes = encode(grouped(mx.array(w), 32), lattice.grid, BITS).reshape(w.shape)
    back = mx.dequantize(pack(codes, BITS), *lattice.grid, group_size=32, bits=BITS)
    np.testing.assert_array_equal(rounded(back, dtype), w)


def test_scales_of_more_bits_than_the_dtype_are_near():
    """Blocks with float16 scales in a bfloat16 model: a grid, but not one that can be stored."""
    blocks = gauss().reshape(-1, 32)
    d = abs(blocks).max(axis=1, keepdims=True) / np.float32(7.5)
    q = np.clip(np.rint(blocks / d), -8, 7)
    w = rounded(d * q, "bfloat16").reshape(96, 256)
    lattice = find(w, "bfloat16")
    assert lattice.report.kind == "q4_0"
    assert not lattice.report.exact
    assert lattice.report.blocks == 1
    assert 0 < lattice.report.residual <= NEAR
    np.testing.assert_array_equal(rounded(lattice.grid.scales, "bfloat16"), lattice.grid.scales)
    error = abs(decoded(w, lattice) - w).reshape(-1, 32).max(axis=1)
    assert (error <= 0.08 * d[:, 0]).all()


def test_float32_sources_are_searched_too():
    w, _, _ = symmetric(gauss(), "absmax/7", "bfloat16", 5)
    lattice = find_lattice(mx.array(w), mx.float32)
    assert lattice.report.exact
    np.testing.assert_array_equal(decoded(w, lattice), w)


# -- affine blocks -------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("offset", [0, 0.02], ids=["centred", "shifted"])
def test_min_max_grids_are_exact(dtype, offset):
    w, d, q = affine(gauss() + np.float32(offset), dtype)
    lattice = find(w, dtype)
    assert_exact(w, lattice, dtype, "affine")
    turned = np.array(lattice.grid.scales).reshape(-1, 1) < 0
    np.testing.assert_array_equal(codes_of(w, lattice), np.where(turned, 15 - q, q))
    np.testing.assert_allclose(abs(np.array(lattice.grid.scales)).reshape(-1, 1), d, rtol=0.01)


@dtypes
def test_a_model_that_mx_quantize_rounded_is_exact(dtype):
    """Its grids are anchored at either edge, with scales of either sign."""
    w = mx.array(gauss()).astype(DTYPES[dtype])
    words, scales, biases = mx.quantize(w, group_size=32, bits=4)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    assert (scales < 0).any().item()
    assert (scales > 0).any().item()
    w = rounded(mx.dequantize(words, scales, biases, group_size=32, bits=4), dtype)
    assert_exact(w, find(w, dtype), dtype, "affine")


# -- unusual blocks ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "codes",
    [[8], [3], [8, 9], [8, 15], [0, 8], [1, 15], [5, 8], [8, 11], [7, 8, 9], [4, 8, 12], [0, 15]],
    ids=str,
)
def test_few_levels_of_a_symmetric_grid(dtype, codes):
    rng = np.random.default_rng(1)
    d = rounded(rng.uniform(0.001, 0.01, (64, 8, 1)), dtype)
    w = rounded(d * (rng.choice(codes, (64, 8, 32)) - 8), dtype).reshape(64, 256)
    assert_exact(w, find(w, dtype), dtype)


@dtypes
@pytest.mark.parametrize(
    "codes",
    [[0, 1], [0, 5], [3, 8], [0, 15], [0, 1, 2, 3], [0, 3, 6], [0, 4, 8], [0, 5, 10, 15]],
    ids=str,
)
def test_few_levels_of_an_affine_grid(dtype, codes):
    """Many steps fit such blocks; one that the dtype holds has to be among those tried.

    Zero lies within their range, as in any block of a real matrix.
    """
    rng = np.random.default_rng(2)
    d = rounded(rng.uniform(0.001, 0.01, (64, 8, 1)), dtype)
    m = rounded(-rng.uniform(0.1, 0.9, d.shape) * max(codes) * d, dtype)
    w = rounded(d * rng.choice(codes, (64, 8, 32)) + m, dtype).reshape(64, 256)
    assert_exact(w, find(w, dtype), dtype, "affine")


@dtypes
@pytest.mark.parametrize("codes", [range(9, 16), range(8, 16), range(8), range(9)], ids=str)
def test_blocks_of_one_sign(dtype, codes):
    rng = np.random.default_rng(3)
    d = rounded(rng.uniform(0.001, 0.01, (64, 8, 1)), dtype)
    w = rounded(d * (rng.choice(list(codes), (64, 8, 32)) - 8), dtype).reshape(64, 256)
    assert_exact(w, find(w, dtype), dtype)


def test_blocks_far_from_zero():
    """bfloat16 moves their values by more than "near", yet a stored grid gives each one back."""
    rng = np.random.default_rng(4)
    d = rounded(rng.uniform(0.001, 0.01, (64, 8, 1)), "bfloat16")
    q = rng.integers(0, 16, (64, 8, 32))
    q[..., 0], q[..., 1] = 0, 15
    w = rounded(d * q + rounded(10 * d, "bfloat16"), "bfloat16").reshape(64, 256)
    lattice = find(w, "bfloat16")
    assert_exact(w, lattice, "bfloat16", "affine")
    assert lattice.report.residual > NEAR


@dtypes
@pytest.mark.parametrize("kind", ["q4_0", "affine"])
def test_zero_and_constant_blocks_among_others(dtype, kind):
    w = gauss()
    w = symmetric(w, "absmax/7.5", dtype)[0] if kind == "q4_0" else affine(w, dtype)[0]
    blocks = w.reshape(-1, 32)
    blocks[::7] = 0
    blocks[3::7] = rounded(0.0123, dtype)
    blocks[4::7] = rounded(-0.07, dtype)
    lattice = find(w, dtype)
    assert_exact(w, lattice, dtype, kind)
    zero = decoded(w, lattice).reshape(-1, 32)[::7]
    np.testing.assert_array_equal(zero, 0)


@dtypes
def test_an_all_zero_matrix(dtype):
    w = np.zeros((4, 64), np.float32)
    assert_exact(w, find(w, dtype), dtype)


def test_a_constant_block_is_stored_in_the_stored_dtype():
    """A float32 constant among affine blocks; its bias has to be a bfloat16 value."""
    w, _, _ = affine(gauss((32, 64)), "bfloat16")
    w[:, :32] = 0.1234567
    lattice = find_lattice(mx.array(w), mx.bfloat16)
    assert lattice.report.kind == "affine"
    assert not lattice.report.exact
    np.testing.assert_array_equal(rounded(lattice.grid.biases, "bfloat16"), lattice.grid.biases)


# -- no grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_ordinary_weights_are_on_no_grid(dtype):
    assert find_lattice(mx.array(gauss((128, 512))).astype(dtype), dtype) is None


@dtypes
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_grids_of_more_levels_are_no_lattice(dtype, bits):
    blocks = gauss().reshape(-1, 32)
    top = 2 ** (bits - 1) - 1
    d = rounded(abs(blocks).max(axis=1, keepdims=True) / top, dtype)
    w = rounded(d * np.rint(blocks / d), dtype).reshape(96, 256)
    assert find(w, dtype) is None
    assert find(affine(gauss(), dtype, levels=2**bits - 1)[0], dtype) is None


@dtypes
def test_blocks_of_64_are_no_lattice_of_32_with_an_offset(dtype):
    """On a grid of 64 each half is on the same grid: found, with the scale twice."""
    blocks = gauss().reshape(-1, 64)
    d = rounded(abs(blocks).max(axis=1, keepdims=True) / 7.5, dtype)
    w = rounded(d * np.clip(np.rint(blocks / d), -8, 7), dtype).reshape(96, 256)
    assert_exact(w, find(w, dtype), dtype)


def test_rows_that_no_block_of_32_divides():
    assert find_lattice(mx.zeros((8, 48), dtype=mx.bfloat16), mx.bfloat16) is None


def with_odd_blocks(share, seed=5):
    """Weights on a grid except for a share of the blocks, and a mask of those."""
    w, _, _ = symmetric(gauss((256, 256)), "absmax/7.5", "bfloat16")
    blocks = w.reshape(-1, 32)
    odd = np.zeros(len(blocks), bool)
    chosen = np.random.default_rng(seed).permutation(len(blocks))[: round(share * len(blocks))]
    odd[chosen] = True
    blocks[odd] = rounded(gauss((odd.sum(), 32), seed=9), "bfloat16")
    return w, odd


def test_a_tenth_of_odd_blocks_is_tolerated_and_reported():
    w, odd = with_odd_blocks(0.09)
    lattice = find(w, "bfloat16")
    assert lattice.report.kind == "q4_0"
    assert not lattice.report.exact
    assert lattice.report.blocks == pytest.approx(1 - odd.mean())
    back = rounded(decoded(w, lattice), "bfloat16").reshape(-1, 32)
    np.testing.assert_array_equal(back[~odd], w.reshape(-1, 32)[~odd])
    wanted = minmax_grid(grouped(mx.array(w), 32), BITS, mx.bfloat16)
    for found, grid in zip(lattice.grid, wanted, strict=True):
        np.testing.assert_array_equal(
            np.array(found).reshape(-1)[odd], np.array(grid).reshape(-1)[odd]
        )


def test_more_odd_blocks_are_not():
    w, _ = with_odd_blocks(0.11)
    assert find(w, "bfloat16") is None


def test_an_odd_row_that_the_sample_meets_does_not_hide_the_grid():
    """Row 0 is always in the sample; in an embedding it is often a special token."""
    w, _, _ = symmetric(gauss((1024, 64)), "absmax/7.5", "bfloat16")
    w[0] = rounded(gauss((64,), seed=9), "bfloat16")
    assert find(w, "bfloat16").report.blocks == pytest.approx(1 - 1 / 1024)


def test_a_grid_in_the_sample_alone_is_none():
    w, _, _ = symmetric(gauss((256, 64)), "absmax/7.5", "bfloat16")
    w[1::8] = rounded(gauss((32, 64), seed=9), "bfloat16")
    assert find_lattice(mx.array(w[::8]), mx.bfloat16) is not None
    assert find(w, "bfloat16") is None


# -- shapes --------------------------------------------------------------------------------------


def test_a_stack_of_experts_is_the_matrices_one_by_one():
    w, _, _ = symmetric(gauss((3, 16, 64)), "absmax/8", "bfloat16")
    stack = find(w, "bfloat16")
    assert_exact(w, stack, "bfloat16")
    assert stack.grid.scales.shape == (3, 16, 2)
    for n in range(3):
        one = find(w[n], "bfloat16")
        for whole, part in zip(stack.grid, one.grid, strict=True):
            np.testing.assert_array_equal(np.array(whole)[n], np.array(part))


def test_a_matrix_of_several_chunks():
    w, _, _ = symmetric(gauss((70, 16384)), "absmax/7.5", "bfloat16")
    lattice = find(w, "bfloat16")  # 64 rows and 6
    assert_exact(w, lattice, "bfloat16")
    assert lattice.grid.scales.shape == (70, 512)
    w[1, :32] = rounded(gauss((32,), seed=9), "bfloat16")
    report = find(w, "bfloat16").report
    assert not report.exact
    assert report.blocks == pytest.approx(1 - 1 / (70 * 512))


# -- a checkpoint --------------------------------------------------------------------------------


@pytest.mark.assets
@pytest.mark.parametrize(
    ("arguments", "exact"),
    [([], True), (["--scale-bits", "8"], True), (["--off-lattice"], None)],
    ids=["5 bits", "8 bits", "off"],
)
def test_the_matrices_of_a_checkpoint(shared, tmp_path, arguments, exact):
    """Text matrices and embedding: exact with scales of 5 or 8 bits, else on no grid."""
    tool = shared / "tools" / "tiny_gemma4.py"
    command = [sys.executable, str(tool), str(tmp_path), "--weights-only", *arguments]
    subprocess.run(command, check=True)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    weights = {}
    for shard in set(index["weight_map"].values()):
        weights |= mx.load(str(tmp_path / "target" / shard))
    text = {
        name: value
        for name, value in weights.items()
        if name.startswith("model.language_model.") and value.ndim == 2
    }
    assert "model.language_model.embed_tokens.weight" in text
    assert len(text) == 1 + 12 * 7 - 2  # two full layers have no v_proj
    for name, value in text.items():
        lattice = find_lattice(value, value.dtype)
        if exact is None:
            assert lattice is None, name
        else:
            assert_exact(np.array(value.astype(mx.float32)), lattice, "bfloat16")
    side = weights["model.embed_vision.embedding_projection.weight"]
    assert find_lattice(side, side.dtype) is None
