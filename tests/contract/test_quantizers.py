"""What every quantizer owes: format, determinism, and errors no worse than min/max rounding's."""

import functools
import importlib
import pkgutil
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.artifacts import BITS, GROUP_SIZES, QuantOption, Rounding, menu
from optiq.backend import mx
from optiq.numerics.gram import damped
from optiq.quant import quantizers
from optiq.quant.quantizers import device
from optiq.quant.quantizers.base import Inputs, Packed
from optiq.quant.quantizers.gptq import DAMPING

HOST = ("rtn", "search", "gptq")
NAMES = (*HOST, *(f"device-{name}" for name in HOST))
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

every_name = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def option(bits, group_size):
    return QuantOption("affine", bits, group_size)


def rounded(values, dtype):
    """Float32 values of a dtype."""
    return np.array(mx.array(values).astype(DTYPES[dtype]).astype(mx.float32))


def quantize(name, w, chosen, inputs, dtype="bfloat16"):
    kind, _, rounding = name.rpartition("-")
    if not kind:
        module = importlib.import_module(f"{quantizers.__name__}.{name}")
        return module.quantize(w, chosen, inputs, dtype)
    known = device.device_inputs(inputs.gram, feedback=rounding == "gptq")
    codes, grid = device.quantize(mx.array(w), chosen, known, dtype, rounding)
    return Packed(np.array(codes), np.array(grid.scales), np.array(grid.biases))


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """MLX compiles for the CPU with the machine's C++ compiler, which may be missing."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def weights(rows=48, size=128, dtype="bfloat16", seed=0):
    """Weights with some heavy tails, in the source dtype."""
    rng = np.random.default_rng(seed)
    return rounded(0.03 * rng.standard_t(5, (rows, size)).astype(np.float32), dtype)


def gauss(rows=256, size=512):
    return rounded(
        0.03 * np.random.default_rng(1).standard_normal((rows, size)).astype(np.float32),
        "bfloat16",
    )


def made_once(gram):
    """Make a Gram matrix once, and let nobody write to it."""

    @functools.cache
    @functools.wraps(gram)
    def once(size):
        found = gram(size).astype(np.float32)
        found.setflags(write=False)
        return found

    return once


@made_once
def identity(size):
    return np.eye(size)


@made_once
def independent(size):
    """Inputs of very different power."""
    return np.diag(np.exp(np.random.default_rng(2).normal(0, 1.5, size)))


@made_once
def correlated(size):
    """Neighbours are alike, as after a convolution."""
    x = np.random.default_rng(3).standard_normal((4 * size, size))
    for column in range(1, size):
        x[:, column] = 0.9 * x[:, column - 1] + 0.44 * x[:, column]
    return x.T @ x


@made_once
def mixed(size):
    """A random mixture with one strong common direction and two loud inputs."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((4 * size, size))
    x = x @ (np.eye(size) + 0.5 * rng.standard_normal((size, size)) / np.sqrt(size))
    x += rng.standard_normal((4 * size, 1)) * rng.standard_normal(size)
    x[:, 3] *= 100
    x[:, size // 2] *= 30
    return x.T @ x


@made_once
def few_tokens(size):
    """Fewer rows of inputs than inputs: singular."""
    x = np.random.default_rng(5).standard_normal((size // 8, size))
    return x.T @ x


@made_once
def unseen(size):
    """A third of the inputs are always zero."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((4 * size, size))
    x[:, rng.permutation(size)[: size // 3]] = 0
    return x.T @ x


@made_once
def nothing(size):
    """No input was ever seen."""
    return np.zeros((size, size))


GRAMS = (identity, independent, correlated, mixed, few_tokens, unseen, nothing)
every_gram = pytest.mark.parametrize("gram", GRAMS, ids=lambda gram: gram.__name__)


def squared_error(w, packed, gram):
    """trace(dW H dW^T) in float64."""
    d = (w - packed.weights()).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", d, gram.astype(np.float64), d))


def objective(name, gram):
    """The matrix that weighs the errors a quantizer minimizes."""
    if name.endswith("gptq"):
        return damped(gram, DAMPING)
    return np.diag(Inputs(gram).diagonal)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_list_is_complete():
    """A new quantizer is held to this contract, and is a choice of `--rounding`."""
    folder = [module.name for module in pkgutil.iter_modules(quantizers.__path__)]
    found = {
        name
        for name in folder
        if hasattr(importlib.import_module(f"{quantizers.__name__}.{name}"), "quantize")
    }
    assert found - {"device"} == set(HOST) == set(get_args(Rounding))


# -- format --------------------------------------------------------------------------------------


@every_name
@every_dtype
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_format(name, dtype, bits, group_size):
    w = weights(12, 256, dtype)
    before = w.copy()
    packed = quantize(name, w, option(bits, group_size), Inputs(independent(256)), dtype)
    np.testing.assert_array_equal(w, before)
    assert packed.codes.dtype == np.uint8
    assert packed.codes.shape == w.shape
    assert packed.codes.max() <= 2**bits - 1
    for values in (packed.scales, packed.biases):
        assert values.dtype == np.float32
        assert values.shape == (12, 256 // group_size)
        np.testing.assert_array_equal(rounded(values, dtype), values)
    codes = packed.codes.reshape(12, -1, group_size).astype(np.float64)
    dense = (codes * packed.scales[..., None] + packed.biases[..., None]).reshape(w.shape)
    np.testing.assert_allclose(packed.weights(), dense, rtol=1e-5, atol=1e-7)
    relative = np.sqrt(np.mean((packed.weights() - w) ** 2) / np.mean(w**2))
    assert relative < 2.0 ** (2 - bits)


@every_name
@pytest.mark.parametrize("chosen", menu(128), ids=lambda chosen: chosen.key)
def test_a_single_row_of_a_single_group(name, chosen):
    w = weights(1, 128)
    packed = quantize(name, w, chosen, Inputs(mixed(128)))
    assert packed.codes.shape == (1, 128)
    assert packed.scales.shape == (1, 128 // chosen.group_size)
    assert np.isfinite(packed.weights()).all()


@every_name
@every_dtype
@pytest.mark.parametrize("bits", BITS)
def test_extreme_groups(name, dtype, bits):
    """Zeros and constants come back as they are; large and tiny weights stay finite."""
    w = np.zeros((6, 64), np.float32)
    w[1] = 0.03
    w[2] = -1
    w[3] = np.linspace(-6e4, 6e4, 64)
    w[4] = np.linspace(-1e-6, 1e-6, 64)
    w[5, 9] = 1
    w = rounded(w, dtype)
    packed = quantize(name, w, option(bits, 32), Inputs(identity(64)), dtype)
    dense = packed.weights()
    np.testing.assert_array_equal(dense[:3], w[:3])
    assert np.isfinite(dense).all()
    assert abs(dense[3] - w[3]).max() <= 1.3 * 12e4 / (2**bits - 1)
    assert abs(dense[4]).max() <= 4e-6
    np.testing.assert_array_equal(dense[5, 32:], 0)
    assert dense[5, 9] == pytest.approx(1, rel=0.3)


# -- errors --------------------------------------------------------------------------------------


@every_name
@every_gram
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_never_worse_than_min_max_on_its_own_objective(name, gram, bits, group_size):
    w, h, chosen = weights(), gram(128), option(bits, group_size)
    weighing = objective(name, h)
    packed = quantize(name, w, chosen, Inputs(h))
    assert np.isfinite(packed.weights()).all()
    plain = squared_error(w, quantize("rtn", w, chosen, Inputs(h)), weighing)
    assert squared_error(w, packed, weighing) <= plain * (1 + 1e-5)


@every_gram
@pytest.mark.parametrize("bits", BITS)
def test_error_feedback_is_never_worse_than_the_searched_grid(gram, bits):
    """Row by row, on the damped Gram matrix."""
    w, h, chosen = weights(), gram(128), option(bits, 64)
    weighing = damped(h, DAMPING)
    searched, fed = (quantize(name, w, chosen, Inputs(h)) for name in ("search", "gptq"))
    for row in range(len(w)):
        one = slice(row, row + 1)
        before, after = (
            squared_error(w[one], type(p)(p.codes[one], p.scales[one], p.biases[one]), weighing)
            for p in (searched, fed)
        )
        assert after <= before * (1 + 1e-4)


@pytest.mark.parametrize("gram", [correlated, mixed, few_tokens], ids=lambda gram: gram.__name__)
@pytest.mark.parametrize("bits", BITS)
def test_error_feedback_pays_on_correlated_inputs(gram, bits):
    """On the Gram matrix itself, over all rows."""
    w, h, chosen = weights(), gram(128), option(bits, 64)
    before, after = (
        squared_error(w, quantize(name, w, chosen, Inputs(h)), h) for name in ("search", "gptq")
    )
    assert after < 0.9 * before


@given(seed=st.integers(0, 2**32 - 1), chosen=st.sampled_from(menu(128)), scale=st.integers(-3, 3))
@settings(max_examples=25)
def test_random_inputs(seed, chosen, scale):
    """Random Gram matrices of any rank and size of the weights."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rng.integers(1, 300), 128)) * np.exp(rng.normal(0, 1, 128))
    h = (x.T @ x).astype(np.float32)
    w = rounded((10.0**scale * rng.standard_normal((8, 128))).astype(np.float32), "bfloat16")
    plain = quantize("rtn", w, chosen, Inputs(h))
    for name in NAMES:
        weighing = objective(name, h)
        error = squared_error(w, quantize(name, w, chosen, Inputs(h)), weighing)
        assert error <= squared_error(w, plain, weighing) * (1 + 1e-5)


def mx_quantize_error(w, chosen):
    """Mean squared error of `mx.quantize`, decoded in float32."""
    group_size, bits = chosen.group_size, chosen.bits
    words, scales, biases = mx.quantize(
        mx.array(w).astype(mx.bfloat16), group_size=group_size, bits=bits
    )
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    back = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    return np.mean((np.array(back) - w) ** 2)


@pytest.mark.parametrize(
    ("name", "bits", "share"),
    [("search", 4, 0.85), ("search", 3, 0.78), ("search", 8, 0.70), ("rtn", 8, 0.70)],
)
def test_gain_over_mx_quantize_on_ordinary_weights(name, bits, share):
    w, chosen = gauss(), option(bits, 64)
    packed = quantize(name, w, chosen, Inputs(identity(512)))
    assert np.mean((packed.weights() - w) ** 2) <= share * mx_quantize_error(w, chosen)


@pytest.mark.parametrize("chosen", menu(512), ids=lambda chosen: chosen.key)
def test_min_max_is_mx_quantize_with_better_codes(chosen):
    w = gauss(32)
    packed = quantize("rtn", w, chosen, Inputs(identity(512)))
    _, scales, biases = mx.quantize(
        mx.array(w).astype(mx.bfloat16), group_size=chosen.group_size, bits=chosen.bits
    )
    np.testing.assert_array_equal(packed.scales, np.array(scales.astype(mx.float32)))
    np.testing.assert_array_equal(packed.biases, np.array(biases.astype(mx.float32)))
    assert np.mean((packed.weights() - w) ** 2) <= 1.00001 * mx_quantize_error(w, chosen)


@pytest.mark.parametrize("name", ["search", "gptq"])
def test_the_power_of_inputs_moves_the_grid(name):
    """A loud input is rounded better than with equal weights."""
    w, chosen = weights(), option(3, 32)
    power = np.ones(128, np.float32)
    power[5] = 1000
    equal, loud = (
        quantize(name, w, chosen, Inputs(np.diag(p))).weights()
        for p in (np.ones(128, np.float32), power)
    )
    assert np.mean((loud - w)[:, 5] ** 2) < 0.3 * np.mean((equal - w)[:, 5] ** 2)


# -- determinism ---------------------------------------------------------------------------------


@every_name
def test_same_bytes_twice(name):
    w, inputs = weights(600, 256), Inputs(correlated(256))
    first, second = (quantize(name, w, option(4, 64), inputs) for _ in range(2))
    assert same(first, second)


@every_name
@pytest.mark.parametrize("chosen", [option(2, 32), option(4, 64), option(8, 128)])
def test_rows_do_not_depend_on_the_rows_beside_them(name, chosen):
    """Rows are shared out in chunks, whose size must not matter.

    Another number of rows is another BLAS kernel, so with error feedback a weight between two codes
    may go the other way.
    """
    w, inputs = weights(600, 256), Inputs(correlated(256))
    whole = quantize(name, w, chosen, inputs)
    parts = [quantize(name, w[rows], chosen, inputs) for rows in np.split(np.arange(600), [1, 77])]
    joined = type(whole)(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if not name.endswith("gptq"):
        assert same(whole, joined)
    assert np.mean(whole.codes != joined.codes) < 0.002
    errors = [squared_error(w, packed, inputs.gram) for packed in (whole, joined)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
