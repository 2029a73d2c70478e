"""Gram matrices of a block's inputs, and the ratios of rounding errors measured with them."""

import numpy as np
import pytest

from optiq.artifacts import ModuleInfo, menu
from optiq.backend import mx
from optiq.models.taps import Call
from optiq.numerics.gram import damped
from optiq.quant.quantizers import device, gptq, rtn, search
from optiq.quant.quantizers.base import Inputs, weighted_error
from optiq.quant.ratios import SAMPLE_ROWS, GramStore, host_errors, rounding_ratios


def inputs(seed, shape=(2, 5, 64)):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def gram64(*arrays):
    """X^T X in float64 over all arrays."""
    x = np.concatenate([np.array(a, np.float64).reshape(-1, a.shape[-1]) for a in arrays])
    return x.T @ x


def stored(store):
    """Gram matrix of every path."""
    return {path: np.array(matrix) for paths, matrix in store.groups() for path in paths}


# -- the store -----------------------------------------------------------------------------------


def test_sums_over_micro_batches():
    store = GramStore()
    batches = [inputs(seed, (rows, 5, 64)) for seed, rows in enumerate((2, 2, 1))]
    for x in batches:
        store.add([Call("q", x)])
    np.testing.assert_allclose(stored(store)["q"], gram64(*batches), rtol=1e-5, atol=1e-4)


def test_matrices_that_read_one_array_share_a_sum():
    store = GramStore()
    batches = [(inputs(n), inputs(10 + n)) for n in range(3)]
    for x, y in batches:
        store.add([Call("q", x), Call("k", x), Call("o", y), Call("v", x)])
    groups = list(store.groups())
    assert [paths for paths, _ in groups] == [["q", "k", "v"], ["o"]]
    for n, (_, matrix) in enumerate(groups):
        wanted = gram64(*(pair[n] for pair in batches))
        np.testing.assert_allclose(np.array(matrix), wanted, rtol=1e-5, atol=1e-4)


def test_equal_values_in_two_arrays_do_not_share():
    store = GramStore()
    store.add([Call("q", inputs(0)), Call("k", inputs(0))])
    assert [paths for paths, _ in store.groups()] == [["q"], ["k"]]


def test_inputs_of_other_widths_and_dtypes():
    store = GramStore()
    x, y = inputs(0, (3, 32)), inputs(1, (2, 3, 1, 128)).astype(mx.bfloat16)
    store.add([Call("a", x), Call("b", y)])
    found = stored(store)
    np.testing.assert_allclose(found["a"], gram64(x), rtol=1e-5, atol=1e-4)
    wanted = gram64(y.astype(mx.float32))
    np.testing.assert_allclose(found["b"], wanted, rtol=1e-5, atol=1e-4)


def test_lookups_have_no_gram_matrix():
    store = GramStore()
    ids = mx.array([[1, 2, 3]])
    store.add([Call("embed", ids, lookup=True), Call("q", inputs(0))])
    assert list(stored(store)) == ["q"]


def test_clear_forgets():
    store = GramStore()
    store.add([Call("q", inputs(0))])
    store.clear()
    assert list(store.groups()) == []
    store.add([Call("q", inputs(1))])
    np.testing.assert_allclose(stored(store)["q"], gram64(inputs(1)), rtol=1e-5, atol=1e-4)


def test_a_matrix_used_twice_in_a_block_sums_both_inputs():
    store = GramStore()
    batches = [(inputs(n), inputs(10 + n)) for n in range(2)]
    for x, y in batches:
        store.add([Call("shared", x), Call("shared", y)])
    wanted = gram64(*(x for pair in batches for x in pair))
    np.testing.assert_allclose(stored(store)["shared"], wanted, rtol=1e-5, atol=1e-4)


# -- ratios --------------------------------------------------------------------------------------


def weights(seed, rows, size=128):
    noise = np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)
    return mx.array(0.03 * noise).astype(mx.bfloat16)


def mild(size=128):
    """Inputs of different power that are somewhat correlated."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, size)) @ (
        np.eye(size) + 0.3 * rng.standard_normal((size, size)) / np.sqrt(size)
    )
    x *= np.exp(rng.normal(0, 0.5, size))
    return mx.array((x.T @ x).astype(np.float32))


def modules(*rows, size=128):
    infos = [ModuleInfo(f"m{n}", "linear", (count, size)) for n, count in enumerate(rows)]
    return infos, [weights(n, count, size) for n, count in enumerate(rows)]


def test_min_max_rounding_leaves_everything():
    infos, values = modules(8, 16)
    found = rounding_ratios(infos, values, mild(), "rtn", "bfloat16")
    assert set(found) == {"m0", "m1"}
    for ratios in found.values():
        np.testing.assert_array_equal(ratios, np.ones(len(menu(128))))


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_ratios_are_at_most_one(rounding):
    infos, values = modules(40, 300)
    for ratios in rounding_ratios(infos, values, mild(), rounding, "bfloat16").values():
        assert ratios.dtype == np.float32
        assert ratios.shape == (len(menu(128)),)
        assert (ratios > 0).all()
        assert (ratios <= 1 + 1e-3).all()


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_ratios_are_those_of_the_rounding_itself(rounding):
    """With few rows all are sampled, so the ratio is that of the errors of `quantize`."""
    infos, values = modules(48, 24)
    matrix = mild()
    found = rounding_ratios(infos, values, matrix, rounding, "bfloat16")
    inputs = Inputs(np.array(matrix))
    weighing = damped(inputs.gram, gptq.DAMPING)
    final = {"search": search, "gptq": gptq}[rounding]
    for info, value in zip(infos, values, strict=True):
        w = np.array(value.astype(mx.float32))
        for option, ratio in zip(menu(128), found[info.path], strict=True):
            before, after = (
                weighted_error(
                    w, module.quantize(w, option, inputs, "bfloat16").weights(), weighing
                ).sum()
                for module in (rtn, final)
            )
            assert ratio == pytest.approx(after / before, rel=0.02)


def test_a_sample_stands_for_the_matrix():
    """Ratios of 192 rows are near those of 1000."""
    infos, (value,) = modules(1000)
    sampled = rounding_ratios(infos, [value], mild(), "search", "bfloat16")["m0"]
    parts = [value[n : n + SAMPLE_ROWS] for n in range(0, 1000, SAMPLE_ROWS)]
    part_infos = [ModuleInfo(f"p{n}", "linear", p.shape) for n, p in enumerate(parts)]
    whole = rounding_ratios(part_infos, parts, mild(), "search", "bfloat16")
    np.testing.assert_allclose(sampled, np.mean(list(whole.values()), axis=0), rtol=0.1)


def test_matrices_together_are_as_one_by_one():
    infos, values = modules(16, 24)
    together = rounding_ratios(infos, values, mild(), "gptq", "bfloat16")
    for info, value in zip(infos, values, strict=True):
        alone = rounding_ratios([info], [value], mild(), "gptq", "bfloat16")[info.path]
        np.testing.assert_allclose(together[info.path], alone, rtol=0.02)


def test_a_stack_of_experts_is_sampled_over_all_experts():
    info = ModuleInfo("experts", "expert", (4, 16, 128))
    flat = weights(0, 64)
    found = rounding_ratios([info], [flat.reshape(4, 16, 128)], mild(), "search", "bfloat16")
    one = ModuleInfo("flat", "linear", (64, 128))
    wanted = rounding_ratios([one], [flat], mild(), "search", "bfloat16")
    np.testing.assert_array_equal(found["experts"], wanted["flat"])


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_weights_without_error_have_the_ratio_one(rounding):
    info = ModuleInfo("zero", "linear", (8, 128))
    found = rounding_ratios([info], [mx.zeros((8, 128))], mild(), rounding, "bfloat16")
    np.testing.assert_array_equal(found["zero"], 1)


@pytest.mark.parametrize("rounding", ["rtn", "search", "gptq"])
def test_only_options_of_the_menu(rounding):
    info, odd = ModuleInfo("m", "linear", (8, 96)), ModuleInfo("odd", "linear", (8, 40))
    matrix = mx.array(np.eye(96, dtype=np.float32))
    found = rounding_ratios([info], [weights(0, 8, 96)], matrix, rounding, "bfloat16")
    assert found["m"].shape == (len(menu(96)),) == (6,)
    matrix = mx.array(np.eye(40, dtype=np.float32))
    found = rounding_ratios([odd], [weights(0, 8, 40)], matrix, rounding, "bfloat16")
    assert found["odd"].shape == (0,)


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_the_device_finds_what_the_host_finds(rounding):
    rows = np.random.default_rng(7).standard_t(5, (24, 256)).astype(np.float32)
    x = np.random.default_rng(8).standard_normal((1024, 256)).astype(np.float32)
    given = (rows, menu(256), (x.T @ x).astype(np.float32), rounding, "bfloat16")
    mx.disable_compile()  # for the CPU it takes a compiler that the machine may not have
    try:
        before, after = device.sampled_errors(*given)
    finally:
        mx.enable_compile()
    wanted_before, wanted_after = host_errors(*given)
    np.testing.assert_allclose(before, wanted_before, rtol=1e-4)
    # a code at a boundary goes either way, and the columns after it with it
    np.testing.assert_allclose(after.sum(axis=1), wanted_after.sum(axis=1), rtol=0.02)
