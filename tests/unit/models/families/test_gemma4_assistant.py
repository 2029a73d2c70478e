"""Gemma-4's drafter against PyTorch, in float32."""

import itertools

import numpy as np
import pytest

from optiq.backend import mx
from optiq.errors import UnsupportedModel, UsageError
from optiq.models.families import build_tree, check_standalone, normalized
from optiq.models.families.gemma4 import KeyValues
from optiq.models.families.gemma4_assistant import Drafting, Gemma4Drafter
from optiq.models.load import open_source
from optiq.models.modules import find_modules
from tests.gemma4 import ASSISTANT, INFO, LIMIT, apart, assistant, inputs, reference, source, target

OWN_LIMIT = 5e-3
CASES = [
    (name, entry) for name, info in INFO["drafter"].items() for entry in sorted(info["entries"])
]


def drafter(entry):
    """A drafter with the visible keys and the position of an entry of the reference."""
    keys, base = entry.removeprefix("sliding_keys_").split("/position_n-")
    return Gemma4Drafter(assistant(), target(), Drafting(int(base), int(keys)))


def stored(name, leaf):
    return mx.array(reference()[f"drafter/{name}/{leaf}"])[None]


def three(model, token, hidden, shared, count):
    return list(itertools.islice(model.drafts(token, hidden, shared, count), 3))


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_drafts_from_the_stored_state(name, entry):
    model = drafter(entry)
    ids, _ = inputs(INFO["drafter"][name]["prompt_of"])
    keys = model.drafting.sliding_keys
    shared = {
        "sliding_attention": KeyValues(
            stored(name, "sliding_keys")[:, :, -keys:], stored(name, "sliding_values")[:, :, -keys:]
        ),
        "full_attention": KeyValues(stored(name, "full_keys"), stored(name, "full_values")),
    }
    found = three(model, ids[-1], stored(name, "hidden")[None], shared, len(ids))
    expected = reference()[f"drafter/{name}/{entry}/logits"]
    projected = reference()[f"drafter/{name}/{entry}/projected"]
    for step, draft in enumerate(found):
        assert apart(draft.logits[0, 0], expected[step]) <= LIMIT
        assert apart(draft.hidden[0, 0], projected[step]) <= LIMIT
    tokens = [int(draft.logits.argmax().item()) for draft in found]
    assert tokens == reference()[f"drafter/{name}/{entry}/tokens"].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(("name", "entry"), CASES)
def test_drafts_from_our_own_state(name, entry, chunk):
    model = drafter(entry)
    ids, features = inputs(INFO["drafter"][name]["prompt_of"])
    cache = model.target.make_cache(slack=4)
    *_, state = model.target.prefill(ids[:-1], cache, features, chunk)
    found = three(model, ids[-1], state[:, -1:], model.shared(cache), len(ids))
    expected = reference()[f"drafter/{name}/{entry}/logits"]
    for step, draft in enumerate(found):
        assert apart(draft.logits[0, 0], expected[step]) <= OWN_LIMIT


def test_the_default_is_the_last_place_and_the_window():
    model = Gemma4Drafter(assistant(), target())
    ids, _ = inputs("text/over_two_windows")
    cache = model.target.make_cache()
    *_, state = model.target.prefill(ids[:-1], cache)
    shared = model.shared(cache)
    assert shared["sliding_attention"].keys.shape[2] == model.target.window == 16
    assert shared["full_attention"].keys.shape[2] == len(ids) - 1
    (first, *_) = three(model, ids[-1], state[:, -1:], shared, len(ids))
    expected = reference()["drafter/beyond_window/sliding_keys_16/position_n-1/logits"][0]
    assert apart(first.logits[0, 0], expected) <= OWN_LIMIT


def test_more_keys_than_the_cache_has_are_refused():
    model = Gemma4Drafter(assistant(), target(), Drafting(sliding_keys=17))
    ids, _ = inputs("text/over_two_windows")
    cache = model.target.make_cache()
    for token in ids:
        model.target.hidden(mx.array([[token]]), cache)
    with pytest.raises(UsageError, match="keeps 16 of 39 tokens"):
        model.shared(cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone_hidden_size": 64}, "hidden size of the target is 64 in the drafter and 128"),
        ({"vocab_size": 320}, "vocabulary is 320 in the drafter and 512"),
        ({"head_dim": 64}, "head size of the sliding_attention layers is 64 in the drafter and 32"),
        ({"global_head_dim": 32}, "head size of the full_attention layers is 32 in the drafter"),
        ({"num_key_value_heads": 4}, "KV heads of the sliding_attention layers is 4"),
        ({"num_global_key_value_heads": 2}, "KV heads of the full_attention layers is 2"),
    ],
)
def test_a_drafter_of_another_target(change, words):
    config = dict(source(ASSISTANT).config)
    config = config | change if "backbone_hidden_size" in change else config
    config["text_config"] = config["text_config"] | change
    with pytest.raises(UsageError, match=words):
        Gemma4Drafter(build_tree(config), target())


def test_a_drafter_alone_is_refused():
    with pytest.raises(UsageError, match="load the target and pass it as drafter="):
        check_standalone(source(ASSISTANT).config)
    check_standalone(source().config)


def test_what_can_be_quantized_in_a_drafter():
    modules = source(ASSISTANT).modules
    assert len(modules) == 23
    assert [m.path for m in modules if m.tied] == ["model.embed_tokens"]
    assert {m.role for m in modules} == {"linear", "embedding"}


def test_configs_of_drafters():
    raw = source(ASSISTANT).config
    text = {k: v for k, v in raw["text_config"].items() if k != "num_kv_shared_layers"}
    bare = {k: v for k, v in raw.items() if k != "backbone_hidden_size"} | {"text_config": text}
    made = normalized(bare)
    assert made["backbone_hidden_size"] == 3840
    assert made["text_config"]["num_kv_shared_layers"] == 4
    older = normalized(bare | {"model_type": "gemma4_assistant"})
    assert older["backbone_hidden_size"] == 1536
    with pytest.raises(UnsupportedModel, match="2048 centroids do not share a vocabulary of 512"):
        normalized(raw | {"use_ordered_embeddings": True})
    with pytest.raises(UnsupportedModel, match="per-layer inputs, experts or wide MLPs"):
        normalized(raw | {"text_config": text | {"hidden_size_per_layer_input": 8}})


def test_the_head_of_centroids():
    """Tokens of the best centroids have the logits of the whole head, all others less."""
    sizes = {"num_centroids": 16, "centroid_intermediate_top_k": 3}
    config = normalized(source(ASSISTANT).config | {"use_ordered_embeddings": True} | sizes)
    random = np.random.default_rng(1)
    order = random.permutation(512).astype(np.int32)
    model = build_tree(config)
    centroids = random.normal(size=(16, 64)).astype(np.float32)
    weights = {k: v.astype(mx.float32) for k, v in source(ASSISTANT).weights().items()}
    weights["masked_embedding.centroids.weight"] = mx.array(centroids)
    weights["masked_embedding.token_ordering"] = mx.array(order)
    model.load_weights(list(weights.items()), strict=True)
    h = mx.array(random.normal(size=(2, 1, 64)).astype(np.float32))
    found = np.array(model._logits(h))[:, 0]
    whole = np.array(model.model.embed_tokens.as_linear(h))[:, 0]
    scores = np.array(h)[:, 0] @ centroids.T
    for row in range(2):
        best = np.argsort(-scores[row])[:3]
        ids = order.reshape(16, 32)[best].reshape(-1)
        np.testing.assert_allclose(found[row, ids], whole[row, ids], rtol=1e-4, atol=1e-5)
        others = np.setdiff1d(np.arange(512), ids)
        assert found[row, others].max() < found[row, ids].min()
    assert "masked_embedding.centroids" in {m.path for m in find_modules(model, config)}


def test_a_stored_copy_of_the_head_is_left_out(tmp_path):
    folder = tmp_path / "assistant"
    folder.mkdir()
    for file in ASSISTANT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert open_source(str(folder)).parameters == source(ASSISTANT).parameters
