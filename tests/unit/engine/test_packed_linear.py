"""The quantized layers for CUDA give what MLX's own give, whatever the shape."""

import numpy as np
import pytest

from optiq.backend import mx, nn, tree_flatten
from optiq.engine.packed_linear import (
    PackedAllToSharded,
    PackedEmbedding,
    PackedLinear,
    PackedShardedToAll,
    with_packed_linears,
)
from optiq.models.load import load_tree
from optiq.upstream import make_prompt_cache

SHAPES = [(1, 1), (2, 1), (3, 1), (1, 5), (7, 1), (8, 1), (32, 1), (1, 255), (1, 256), (2, 300)]


def layers(kind, bits, bias=True):
    mx.random.seed(0)
    layer = kind(128, 96, bias=bias) if kind is nn.Linear else kind(96, 128)
    tree = nn.Sequential(layer)
    nn.quantize(tree, 64, bits)
    plain = tree.layers[0]
    with_packed_linears(tree)
    return plain, tree.layers[0]


def close(a, b):
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_layer(bits, shape):
    plain, packed = layers(nn.Linear, bits, bias=shape != (1, 1))
    assert isinstance(packed, PackedLinear)
    x = mx.random.normal((*shape, 128))
    out = packed(x)
    assert out.shape == (*shape, 96)
    close(out, plain(x))


@pytest.mark.parametrize(
    ("sharding", "kind"),
    [("all-to-sharded", PackedAllToSharded), ("sharded-to-all", PackedShardedToAll)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_of_a_rank(sharding, kind, bias):
    plain, _ = layers(nn.Linear, 4, bias)
    tree = nn.Sequential(nn.layers.distributed.shard_linear(plain, sharding))
    packed = with_packed_linears(tree).layers[0]
    assert isinstance(packed, kind)
    for shape in SHAPES:
        x = mx.random.normal((*shape, 128))
        close(packed(x), plain(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tied_head(shape):
    plain, packed = layers(nn.Embedding, 4)
    assert isinstance(packed, PackedEmbedding)
    x = mx.random.normal((*shape, 128))
    close(packed.as_linear(x), plain.as_linear(x))
    ids = mx.array([[1, 95]])
    assert mx.array_equal(packed(ids), plain(ids))


def test_arrays_are_shared():
    plain, packed = layers(nn.Linear, 4)
    for name, value in tree_flatten(plain.parameters()):
        assert packed[name] is value
    assert not packed.trainable_parameters()


def test_only_layers_of_mlx_itself_are_replaced():
    class Own(nn.QuantizedLinear):
        pass

    tree = nn.Sequential(Own(64, 64), nn.Linear(64, 64))
    with_packed_linears(tree)
    assert [type(layer) for layer in tree.layers] == [Own, nn.Linear]


def test_a_whole_model_gives_the_same_logits(gemma_release):
    plain, _ = load_tree(gemma_release.path)
    packed, _ = load_tree(gemma_release.path)
    for tree in (plain, packed):
        tree.set_dtype(mx.float32)
    with_packed_linears(packed)
    kinds = {type(module) for _, module in packed.named_modules()}
    assert PackedLinear in kinds
    assert nn.QuantizedLinear not in kinds
    tokens = mx.array([[2, 5, 7, 11, 13, 17, 19]])
    a, b = (tree(tokens, cache=make_prompt_cache(tree)) for tree in (plain, packed))
    close(a, b)
