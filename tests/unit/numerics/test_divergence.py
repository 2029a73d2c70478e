"""Divergence against a float64 oracle, and the clustered standard error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.backend import mx
from optiq.numerics import divergence as module
from optiq.numerics.divergence import clustered_mean, divergence


def oracle(p, q, tokens):
    """KL, agreement and likelihoods in float64."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    log_p = p - np.logaddexp.reduce(p, axis=-1, keepdims=True)
    log_q = q - np.logaddexp.reduce(q, axis=-1, keepdims=True)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    index = tokens[:, 1:, None]
    nll_p, nll_q = (-np.take_along_axis(x[:, :-1], index, -1)[..., 0] for x in (log_p, log_q))
    return kl, p.argmax(-1) == q.argmax(-1), nll_p, nll_q


def logits(seed, noise, shape=(2, 9, 50), scale=4.0):
    rng = np.random.default_rng(seed)
    p = (scale * rng.standard_normal(shape)).astype(np.float32)
    q = (p + noise * rng.standard_normal(shape)).astype(np.float32)
    tokens = rng.integers(0, shape[-1], shape[:2], dtype=np.int32)
    return p, q, tokens


def compare(p, q, tokens):
    return divergence(mx.array(p), mx.array(q), mx.array(tokens))


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 1e-2, 0.3, 3.0, 40.0]))
def test_equals_the_oracle(seed, noise):
    p, q, tokens = logits(seed, noise)
    found, wanted = compare(p, q, tokens), oracle(p, q, tokens)
    np.testing.assert_allclose(found.kl, wanted[0], rtol=2e-3, atol=1e-12)
    np.testing.assert_array_equal(found.agree, wanted[1])
    rounding = 8 * np.finfo(np.float32).eps * max(abs(p).max(), abs(q).max())
    np.testing.assert_allclose(found.nll_p, wanted[2], rtol=0, atol=rounding)
    np.testing.assert_allclose(found.nll_q, wanted[3], rtol=0, atol=rounding)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("noise", [1e-3, 0.3, 3.0, 40.0])
def test_top_tokens_and_tails_equal_the_oracle(noise):
    p, q, tokens = logits(3, noise, (2, 9, 300))
    found = compare(p, q, tokens)
    p, q = softmax(p), softmax(q)
    np.testing.assert_array_equal(found.top_p, p.argmax(-1))
    np.testing.assert_array_equal(found.top_q, q.argmax(-1))
    np.testing.assert_allclose(found.sure_p, p.max(-1), rtol=1e-4)
    np.testing.assert_allclose(found.sure_q, q.max(-1), rtol=1e-3)
    tail = p < module.TAIL
    assert tail.any(axis=-1).all()
    np.testing.assert_allclose(found.tail_p, (p * tail).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found.tail_q, (q * tail).sum(-1), rtol=1e-3, atol=1e-7)


def test_tokens_may_hold_the_one_that_follows():
    p, q, tokens = logits(0, 0.3)
    whole = compare(p, q, tokens)
    parts = [compare(p[:, :4], q[:, :4], tokens[:, :5]), compare(p[:, 4:], q[:, 4:], tokens[:, 4:])]
    for name, column in whole._asdict().items():
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(joined, column)


def test_a_mean_over_some_positions_is_clustered_by_window():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(5, 12)).astype(np.float32)
    member = rng.uniform(size=(5, 12)) < 0.5
    member[3] = False
    found = clustered_mean(values, member)
    rows = [values[i][member[i]].astype(np.float64) for i in (0, 1, 2, 4)]
    count = sum(map(len, rows))
    mean = sum(map(np.sum, rows)) / count
    squares = sum((row.sum() - mean * len(row)) ** 2 for row in rows)
    assert found.mean == pytest.approx(mean)
    assert found.stderr == pytest.approx(np.sqrt(squares * 4 / 3) / count)
    assert clustered_mean(values, np.ones_like(member)) == pytest.approx(clustered_mean(values))
    one = np.zeros_like(member)
    one[2, 3] = True
    assert clustered_mean(values, one).mean == pytest.approx(values[2, 3])
    assert np.isnan(clustered_mean(values, one).stderr)
    one[2, 4] = True
    assert clustered_mean(values, one).stderr > 0


def test_a_tiny_kl_keeps_its_digits():
    p, q, tokens = logits(0, 1e-4, (4, 16, 2000))
    wanted = oracle(p, q, tokens)[0].mean()
    assert wanted < 1e-8
    assert compare(p, q, tokens).kl.mean() == pytest.approx(wanted, rel=1e-2)


def test_ratios_that_overflow_float32():
    p, q, tokens = logits(0, 0.0)
    q[..., 0] += 500
    np.testing.assert_allclose(compare(p, q, tokens).kl, oracle(p, q, tokens)[0], rtol=1e-4)


def test_equal_logits_have_no_divergence():
    p, _, tokens = logits(1, 0.0)
    found = compare(p, p + 3, tokens)
    assert (abs(found.kl) < 1e-12).all()
    assert found.agree.all()


def test_chunks_over_positions_change_nothing(monkeypatch):
    p, q, tokens = logits(2, 0.3)
    whole = compare(p, q, tokens)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 50 * 4)  # chunks of 4 positions, the last of 2
    for a, b in zip(whole, compare(p, q, tokens), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_half_precision_logits_are_read_in_float32():
    p, q, tokens = logits(3, 0.3)
    p16, q16 = (mx.array(x).astype(mx.bfloat16) for x in (p, q))
    wanted = oracle(*(np.array(x.astype(mx.float32)) for x in (p16, q16)), tokens)[0]
    found = divergence(p16, q16, mx.array(tokens)).kl
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-9)


def test_stderr_is_that_of_window_means():
    values = np.random.default_rng(0).standard_normal((12, 30)).astype(np.float32)
    found = clustered_mean(values)
    means = values.mean(axis=1, dtype=np.float64)
    assert found.mean == pytest.approx(means.mean())
    assert found.stderr == pytest.approx(means.std(ddof=1) / np.sqrt(12))


def test_stderr_does_not_shrink_with_repeated_positions():
    values = np.random.default_rng(0).standard_normal((12, 30)).astype(np.float32)
    assert clustered_mean(np.repeat(values, 5, axis=1)).stderr == pytest.approx(
        clustered_mean(values).stderr
    )


@pytest.mark.parametrize("length", [5, 16, 21])
def test_a_single_window_still_has_a_stderr(length):
    values = np.arange(length, dtype=np.float32)[None]
    found = clustered_mean(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr > 0
