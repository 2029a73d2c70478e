"""Gram matrices of a block's inputs, and the ratios of rounding errors measured with them."""

import numpy as np
import pytest

from optiq.artifacts import ModuleInfo, menu
from optiq.backend import mx
from optiq.models.taps import Call
from optiq.numerics.gram import damped
from optiq.quant.grams import GramStore
from optiq.quant.quantizers import device, gptq, rtn, search
from optiq.quant.quantizers.base import Inputs
from optiq.quant.ratios import (
    SAMPLE_ROWS,
    host_errors,
    rounding_errors,
    squared_lookups,
    squared_sums,
)


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


def errors_of(infos, values, rounding, matrix=None):
    return rounding_errors(
        infos, values, mild() if matrix is None else matrix, rounding, "bfloat16"
    )


def ratio(sampled, size=128, seed=2):
    """What `squared_sums` makes of random gradients and inputs."""
    rng = np.random.default_rng(seed)
    g = mx.array(rng.standard_normal((60, 2, int(sampled.rows[-1]) + 1)).astype(np.float32))
    x = mx.array(rng.standard_normal((60, 2, size)).astype(np.float32))
    before, after = squared_sums(sampled, g, x)
    return after / before


def test_with_min_max_rounding_there_is_nothing_to_compare():
    assert errors_of(*modules(8, 16), "rtn") == {}


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_errors_are_those_of_the_rounding_itself(rounding):
    """With few rows all are sampled, so the errors are those of `quantize`."""
    infos, values = modules(48, 24)
    found = errors_of(infos, values, rounding)
    inputs = Inputs(np.array(mild()))
    final = {"search": search, "gptq": gptq}[rounding]
    for info, value in zip(infos, values, strict=True):
        w, sampled = np.array(value.astype(mx.float32)), found[info.path]
        np.testing.assert_array_equal(sampled.rows, np.arange(info.shape[0]))
        for n, option in enumerate(menu(128)):
            for quantize, errors in ((rtn, sampled.before), (final, sampled.after)):
                wanted = w - quantize.quantize(w, option, inputs, "bfloat16").weights()
                given = np.array(errors[:, n])
                # another number of rows is another kernel: a code at a boundary goes either way
                assert np.mean(np.abs(given - wanted) > 1e-6) < 0.01


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_the_final_rounding_has_less_weighted_error(rounding):
    infos, values = modules(40, 300)
    weighing = damped(np.array(mild()), gptq.DAMPING)
    for sampled in errors_of(infos, values, rounding).values():
        before, after = (
            np.einsum("noc,cd,nod->o", d, weighing, d)
            for d in (np.array(sampled.before), np.array(sampled.after))
        )
        assert (after <= before * (1 + 1e-3)).all()


def test_sums_are_those_of_the_gradient_of_every_row():
    (info,), (value,) = modules(300)
    sampled = errors_of([info], [value], "search")["m0"]
    rng = np.random.default_rng(5)
    g = rng.standard_normal((3, 7, 300)).astype(np.float32)
    x = rng.standard_normal((3, 7, 128)).astype(np.float32)
    gradient = np.einsum("ktr,ktc->krc", g.astype(np.float64), x)[:, sampled.rows]
    for found, errors in zip(
        squared_sums(sampled, mx.array(g), mx.array(x)),
        (sampled.before, sampled.after),
        strict=True,
    ):
        s = np.einsum("knc,noc->kno", gradient, np.array(errors, np.float64))
        np.testing.assert_allclose(found, (s**2).sum(axis=(0, 1)), rtol=1e-4)


def test_sums_of_slices_add_up():
    (info,), (value,) = modules(300)
    sampled = errors_of([info], [value], "search")["m0"]
    rng = np.random.default_rng(5)
    g = mx.array(rng.standard_normal((3, 7, 300)).astype(np.float32))
    x = mx.array(rng.standard_normal((3, 7, 128)).astype(np.float32))
    whole = squared_sums(sampled, g, x)
    parts = [squared_sums(sampled, g[..., at : at + 100], x, at) for at in (0, 100, 200)]
    outside = squared_sums(sampled, g[..., :5], x, 1000)
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-4)
    np.testing.assert_array_equal(outside, 0)


def test_sums_of_lookups_are_those_of_the_rows_that_are_sampled_and_used():
    (info,), (value,) = modules(300)
    rows = np.array([3, 40, 41, 299])
    (sampled,) = rounding_errors([info], [value], mild(), "gptq", "bfloat16", rows).values()
    np.testing.assert_array_equal(sampled.rows, rows)
    used = np.array([0, 3, 41, 200, 299])
    gradient = np.random.default_rng(5).standard_normal((len(used), 128)).astype(np.float32)
    both = [1, 2, 4], [0, 2, 3]  # where the common rows are in each
    for found, errors in zip(
        squared_lookups(sampled, mx.array(gradient), used),
        (sampled.before, sampled.after),
        strict=True,
    ):
        s = np.einsum("nc,noc->no", gradient[both[0]], np.array(errors, np.float64)[both[1]])
        np.testing.assert_allclose(found, (s**2).sum(axis=0), rtol=1e-4)
    for none in squared_lookups(sampled, mx.array(gradient[:2]), np.array([1, 7])):
        np.testing.assert_array_equal(none, 0)


def test_a_sample_stands_for_the_matrix():
    """The ratio on 192 rows is near that on 1000."""
    infos, (value,) = modules(1000)
    sampled = ratio(errors_of(infos, [value], "search")["m0"])
    parts = [value[n : n + SAMPLE_ROWS] for n in range(0, 1000, SAMPLE_ROWS)]
    part_infos = [ModuleInfo(f"p{n}", "linear", p.shape) for n, p in enumerate(parts)]
    whole = [ratio(found) for found in errors_of(part_infos, parts, "search").values()]
    np.testing.assert_allclose(sampled, np.mean(whole, axis=0), rtol=0.15)


def test_a_stack_of_experts_is_sampled_over_all_experts():
    info = ModuleInfo("experts", "expert", (4, 16, 128))
    flat = weights(0, 64)
    found = errors_of([info], [flat.reshape(4, 16, 128)], "search")
    wanted = errors_of([ModuleInfo("flat", "linear", (64, 128))], [flat], "search")
    np.testing.assert_array_equal(found["experts"].after, wanted["flat"].after)


def test_a_long_row_is_sampled_in_whole_groups():
    info = ModuleInfo("long", "linear", (4, 4096))
    matrix = mx.eye(2048)
    sampled = errors_of([info], [weights(0, 4, 4096)], "search", matrix)["long"]
    columns = np.array(sampled.columns).reshape(-1, 128)
    assert columns.size == 2048
    np.testing.assert_array_equal(columns % 128, np.broadcast_to(np.arange(128), columns.shape))
    assert sampled.after.shape == (4, len(menu(4096)), 2048)


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_only_options_of_the_menu(rounding):
    info, odd = ModuleInfo("m", "linear", (8, 96)), ModuleInfo("odd", "linear", (8, 40))
    found = errors_of([info], [weights(0, 8, 96)], rounding, mx.eye(96))
    assert found["m"].after.shape == (8, len(menu(96)), 96) == (8, 6, 96)
    assert errors_of([odd], [weights(0, 8, 40)], rounding, mx.eye(40)) == {}


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_the_device_finds_what_the_host_finds(rounding):
    rows = np.random.default_rng(7).standard_t(5, (24, 256)).astype(np.float32)
    x = np.random.default_rng(8).standard_normal((1024, 256)).astype(np.float32)
    given = (rows, menu(256), (x.T @ x).astype(np.float32), rounding, "bfloat16")
    mx.disable_compile()  # for the CPU it takes a compiler that the machine may not have
    try:
        found = device.sampled_errors(*given)
    finally:
        mx.enable_compile()
    for ours, wanted in zip(found, host_errors(*given), strict=True):
        for a, b in zip(ours, wanted, strict=True):
            # a code at a boundary goes either way, and the columns after it with it
            assert float((a * a).sum() / (b * b).sum()) == pytest.approx(1, rel=0.02)
            assert float((mx.abs(a - b) > 1e-3).mean()) < 0.02
