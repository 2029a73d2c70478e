"""Gemma-4's forward pass against PyTorch, in float32."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.backend import mx
from optiq.errors import UsageError
from optiq.models.families.gemma4 import Gemma4, chunks, last_keys, same_image
from optiq.models.load import open_source
from tests.gemma4 import INFO, LIMIT, apart, inputs, prefilled, reference, source, target, tree
from tests.tiny import tiny_checkpoint

TEXT = [f"text/{name}" for name in INFO["text"]]
IMAGE = [f"image/{name}" for name in INFO["image"]]
CHUNKS = [1, 7, 16, 64]


@pytest.mark.parametrize("case", TEXT + IMAGE)
def test_logits_without_a_cache(case):
    model = target()
    ids, features = inputs(case)
    logits = model.logits(model.hidden(mx.array([ids]), None, features))[0]
    assert apart(logits, reference()[f"{case}/logits"]) <= LIMIT


@pytest.mark.parametrize("slack", [0, 5])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", TEXT + IMAGE)
def test_logits_through_the_cache(case, chunk, slack):
    assert apart(prefilled(target(), case, chunk, slack), reference()[f"{case}/logits"]) <= LIMIT


@pytest.mark.parametrize("mask", ["all", "causal"])
@pytest.mark.parametrize("case", IMAGE)
def test_the_other_masks(case, mask):
    """What others compute, and not what the reference is."""
    model = target(mask)
    ids, features = inputs(case)
    logits = model.logits(model.hidden(mx.array([ids]), None, features))[0]
    assert apart(logits[-1], reference()[f"{case}/last_logits_{mask}"]) <= LIMIT
    assert apart(logits, reference()[f"{case}/logits"]) > 0.5


def test_sequences_of_a_batch_are_those_alone():
    """Two prompts of one length with images at different places."""
    ids, features = inputs("image/one_short")
    other = [ids[0], *ids[-2:], *ids[1:-2]]
    model = target()
    both = model.hidden(mx.array([ids, other]), None, mx.concatenate([features, features]))
    for row, tokens in zip(both, (ids, other), strict=True):
        alone = model.hidden(mx.array([tokens]), None, features)[0]
        assert apart(row, np.array(alone)) <= 1e-4


@pytest.mark.parametrize("name", list(INFO["greedy"]))
def test_greedy_tokens(name):
    """Through the cache, with and without the tokens that the checkpoint suppresses."""
    model = target()
    ids, features = inputs(INFO["greedy"][name]["prompt_of"])
    for suppressed, key in ((INFO["suppress_tokens"], ""), ([], "_without_suppression")):
        cache = model.make_cache()
        *_, state = model.prefill(ids, cache, features)
        found = []
        for _ in range(32):
            row = np.array(model.logits(state[:, -1:])[0, 0])
            row[suppressed] = -np.inf
            found.append(int(row.argmax()))
            state = model.hidden(mx.array([found[-1:]]), cache)
        assert found == reference()[f"greedy/{name}/tokens{key}"].tolist()


def test_the_mask_is_that_of_the_config():
    config = source().config
    assert Gemma4(tree(), config).image_mask == "sliding"
    plain = config | {"text_config": config["text_config"] | {"use_bidirectional_attention": None}}
    assert Gemma4(tree(), plain).image_mask == "causal"


@pytest.mark.parametrize("count", [0, 5, 7])
def test_features_and_image_tokens_must_match(count):
    ids, _ = inputs("image/one_short")
    model = target()
    features = mx.zeros((count, 128))
    with pytest.raises(UsageError, match=f"6 image tokens and {count} image features"):
        model.hidden(mx.array([ids]), None, features)
    with pytest.raises(UsageError, match=f"6 image tokens and {count} image features"):
        list(model.prefill(ids, model.make_cache(), features))


def test_image_tokens_without_features_are_refused_in_a_prompt():
    ids, _ = inputs("image/one_short")
    model = target()
    with pytest.raises(UsageError, match="6 image tokens and 0 image features"):
        list(model.prefill(ids, model.make_cache()))


def test_another_family_is_refused(tiny_source):
    with pytest.raises(UsageError, match="is no Gemma-4 tree"):
        Gemma4(tiny_source.model(), tiny_source.config)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}],
    ids=["per-layer inputs and shared keys", "plain"],
)
def test_the_text_models_of_mlx_lm(tmp_path, overrides):
    """E2B and E4B have inputs for every layer and layers without keys of their own."""
    opened = open_source(str(tiny_checkpoint(tmp_path, "gemma4_text", **overrides)))
    model = opened.model()
    model.set_dtype(mx.float32)
    ours = Gemma4(model, opened.config)
    tokens = mx.array(np.random.default_rng(0).integers(0, 320, (2, 40)))
    expected = np.array(model(tokens))
    assert apart(ours.logits(ours.hidden(tokens)), expected) <= 1e-5
    cache = ours.make_cache()
    parts = [ours.hidden(tokens[:, at : at + 9], cache) for at in range(0, 40, 9)]
    assert apart(ours.logits(mx.concatenate(parts, axis=1)), expected) <= 1e-4


# -- images and chunks ---------------------------------------------------------------------------


def test_tokens_of_one_image():
    row = mx.array([[False, True, True, False, True], [True, True, False, False, True]])
    expected = np.zeros((2, 5, 5), bool)
    expected[0, 1:3, 1:3] = expected[0, 4, 4] = True
    expected[1, :2, :2] = expected[1, 4, 4] = True
    np.testing.assert_array_equal(np.array(same_image(row)), expected)


@given(st.lists(st.sampled_from([1, 2, 9]), max_size=40), st.integers(1, 12))
def test_chunks_are_whole_and_never_split_an_image(tokens, size):
    parts = chunks(tokens, size, 9)
    assert [token for part in parts for token in tokens[part]] == tokens
    for part in parts:
        assert part.stop > part.start
        assert tokens[part.start - 1 : part.start + 1] != [9, 9]
        if part.stop - part.start > size:
            assert set(tokens[part]) == {9}


def test_chunks_are_as_long_as_they_may_be():
    tokens = [1, 1, 9, 9, 9, 1, 9, 9, 1]
    assert chunks(tokens, 4, 9) == [slice(0, 2), slice(2, 6), slice(6, 9)]
    assert chunks(tokens, 2, 9) == [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 8), slice(8, 9)]
    assert chunks(tokens, 4, None) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    with pytest.raises(UsageError, match="at least 1 token, not 0"):
        chunks(tokens, 0, 9)


# -- keys of a cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("slack", [0, 4])
def test_the_last_keys_of_a_cache_come_in_order(chunk, slack):
    model = target()
    ids, _ = inputs("text/over_two_windows")
    full, rotating = (model.make_cache(s) for s in (1000, slack))
    for cache in (full, rotating):
        list(model.prefill(ids, cache, None, chunk))
        model.hidden(mx.array([ids[:1]]), cache)
    for kind, index in model.shared_layers().items():
        everything = np.array(last_keys(full[index], None).keys)
        assert everything.shape[2] == len(ids) + 1
        found = last_keys(rotating[index], model.window)
        np.testing.assert_allclose(
            np.array(found.keys), everything[:, :, -model.window :], atol=1e-4
        )
        if kind == "sliding_attention":
            kept = model.window + slack
            with pytest.raises(UsageError, match=rf"keeps \d+ of {len(ids) + 1} tokens"):
                last_keys(rotating[index], 1000)
            assert last_keys(rotating[index], kept).keys.shape[2] == kept
