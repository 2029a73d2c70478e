"""Caches against a forward pass without any, for every kind of past."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.backend import mx
from optiq.engine.kv_cache import KINDS, KeyValueCache, SequenceCache
from optiq.errors import EngineFailure, UnsupportedModel
from optiq.upstream import ArraysCache, CacheList, KVCache, RotatingKVCache
from tests.engine import CONFIGS, read, tiny_target, uncached
from tests.tiny import VOCAB

CLOSE = 2e-4
ALL = sorted(CONFIGS)


def apart(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


@st.composite
def edits(draw):
    """Tokens, and parts of them to read, each with how many of its last are wrong at first."""
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
    parts, at = [], 0
    while at < len(tokens):
        size = draw(st.integers(1, min(9, len(tokens) - at)))
        parts.append((size, draw(st.integers(0, 5))))
        at += size
    return tokens, parts


def test_every_kind_of_mlx_lm_is_tried():
    found = {type(layer) for kind in ALL for layer in _leaves(tiny_target(kind))}
    assert found | {CacheList} == set(KINDS)


def _leaves(target):
    model = getattr(target.model, "_model", target.model)
    for layer in model.make_cache() if hasattr(model, "make_cache") else [KVCache()]:
        yield from layer.caches if isinstance(layer, CacheList) else [layer]


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=25)
@given(edit=edits())
def test_parts_and_rejected_drafts_leave_no_trace(kind, edit):
    """Read in parts, with wrong tokens behind each that are taken back."""
    target = tiny_target(kind)
    tokens, parts = edit
    expected = uncached(target, tokens)
    cache, found, at = target.make_cache(), [], 0
    for size, wrong in parts:
        point = cache.checkpoint()
        part = tokens[at : at + size]
        found.append(read(target, cache, [*part, *[7] * wrong])[:size])
        left = cache.back_to(point, at + size)
        if left < at + size:
            read(target, cache, tokens[left : at + size])
        at += size
        assert cache.length == at
    assert apart(mx.concatenate(found), expected) < CLOSE


@pytest.mark.parametrize("kind", ALL)
def test_wrong_tokens_that_stay_do_leave_a_trace(kind):
    """The check above can fail."""
    target = tiny_target(kind)
    tokens = list(range(20, 36))
    cache = target.make_cache()
    read(target, cache, [*tokens[:8], 7])
    found = read(target, cache, tokens[8:])
    assert apart(found, uncached(target, tokens)[8:]) > 100 * CLOSE


@pytest.mark.parametrize("kind", ALL)
def test_side_by_side(kind):
    """Sequences of many lengths join, go on together, and part again."""
    target = tiny_target(kind)
    texts = [[(5 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate((1, 4, 13, 30))]
    alone = [target.make_cache() for _ in texts]
    for text, cache in zip(texts, alone, strict=True):
        read(target, cache, text)
    batch = SequenceCache.join(alone)
    for step in range(9):
        column = mx.array([[(step + i) % VOCAB] for i in range(len(texts))])
        logits = target.logits(target.states(column, batch))[:, 0]
        for i, text in enumerate(texts):
            text.append((step + i) % VOCAB)
            assert apart(logits[i], uncached(target, text)[-1]) < CLOSE
    for i, text in enumerate(texts):
        own = batch.row(i, len(text))
        assert apart(read(target, own, [11, 12]), uncached(target, [*text, 11, 12])[-2:]) < CLOSE


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("left", [(1, 2), (0, 3), (0, 1, 2, 3)])
def test_some_leave_and_others_join(kind, left):
    target = tiny_target(kind)
    texts = [[(5 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate((1, 4, 13, 30))]
    joined = SequenceCache.join([_cache_of(target, text) for text in texts])
    for step in range(3):
        column = mx.array([[(step + i) % VOCAB] for i in range(len(texts))])
        mx.eval(target.logits(target.states(column, joined)))
        for i, text in enumerate(texts):
            text.append((step + i) % VOCAB)
    late = [7, 9, 9, 3, 5, 1]
    batch = SequenceCache.join([joined.rows(left), _cache_of(target, late)])
    kept = [*(texts[i] for i in left), late]
    for step in range(9):
        column = mx.array([[(step + 2 * i) % VOCAB] for i in range(len(kept))])
        logits = target.logits(target.states(column, batch))[:, 0]
        for i, text in enumerate(kept):
            text.append((step + 2 * i) % VOCAB)
            assert apart(logits[i], uncached(target, text)[-1]) < CLOSE


def _cache_of(target, text):
    cache = target.make_cache()
    read(target, cache, text)
    return cache


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_of_a_batch_go_back_by_different_numbers(window):
    rng = np.random.default_rng(0)
    data = mx.array(rng.normal(size=(2, 1, 12, 3)).astype(np.float32))
    cache = KeyValueCache.join([_filled(window, data[i : i + 1], n) for i, n in enumerate((9, 6))])
    cache.trim([1, 3])
    assert cache.lengths == [8, 3]
    for index, length in enumerate(cache.lengths):
        keys, values = cache.rows([index]).last(min(3, length))
        kept = data[index, :, length - keys.shape[2] : length]
        assert apart(keys[0], kept) == 0
        assert apart(values[0], 2 * kept) == 0


def _filled(window, data, count):
    cache = KeyValueCache(window, slack=3)
    for at in range(count):
        cache.update_and_fetch(data[:, :, at : at + 1], 2 * data[:, :, at : at + 1])
    return cache


def test_long_sequences_keep_a_window_and_no_more():
    cache = KeyValueCache(window=8, slack=4)
    one = mx.ones((1, 1, 1, 2))
    for _ in range(3000):
        cache.update_and_fetch(one, one)
    assert cache.lengths == [3000]
    assert cache.nbytes < 2 * 2 * 4 * 600
    cache.trim([4])
    assert cache.last(8)[0].shape[2] == 8
    with pytest.raises(EngineFailure, match="make it with more slack"):
        cache.trim([2000])


def test_states_are_kept_as_they_were():
    """MLX writes into arrays in place; a checkpoint must not see it."""
    cache = SequenceCache([ArraysCache(1)])
    cache.states[0][0] = mx.zeros((1, 4))
    point = cache.checkpoint()
    cache.states[0][0][:, 1] = 5
    cache.length = 3
    assert cache.back_to(point, 2) == 0
    assert cache.states[0][0].tolist() == [[0, 0, 0, 0]]


class StrangeCache(KVCache):
    """A kind of a later mlx-lm."""


@pytest.mark.parametrize("wrap", [lambda x: x, CacheList])
def test_a_kind_that_is_not_known_is_refused_by_name(wrap):
    with pytest.raises(UnsupportedModel, match="StrangeCache"):
        SequenceCache([KVCache(), wrap(StrangeCache())])


def test_a_window_that_keeps_its_first_tokens_is_refused():
    with pytest.raises(UnsupportedModel, match="first 4 tokens"):
        SequenceCache([RotatingKVCache(max_size=8, keep=4)])
