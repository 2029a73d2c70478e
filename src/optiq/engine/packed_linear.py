"""Quantized linear layers for CUDA, where the kernels of MLX suit few shapes.

`quantized_matmul` takes a time that grows with the batch when it is given (B, 1, K), and needs more
for two to seven rows than for eight. For some hundred rows it is faster to unpack the weights and
multiply densely. On Metal and the CPU nothing of this holds, and the layers stay as they are.
"""

from __future__ import annotations

from typing import Any, cast

from optiq.backend import mx, nn, tree_unflatten

_TILE = 8
_DENSE_FROM = {8: 512}  # rows from which the dense product is faster, by bits
_DENSE_FROM_ELSE = 256
_PAD_FROM = {5: 3, 6: 3}  # rows from which eight are faster, by bits
_PAD_FROM_ELSE = 2


class PackedLinear(nn.QuantizedLinear):
    """A quantized linear layer that folds, pads or unpacks, whichever is fastest on CUDA."""

    def __call__(self, x: mx.array) -> mx.array:
        """The product (..., output) of (..., input), with the bias if there is one."""
        y = product(self, x)
        return y + self["bias"] if "bias" in self else y


class PackedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding that is a `PackedLinear` where it is the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., vocabulary) of states (..., hidden)."""
        return product(self, x)


class PackedAllToSharded(nn.QuantizedAllToShardedLinear):
    """A `PackedLinear` of which every rank gives its part of the output."""

    def __call__(self, x: mx.array) -> mx.array:
        """The product (..., output of this rank) of (..., input), with the bias."""
        y = product(self, x)
        return y + self["bias"] if "bias" in self else y


class PackedShardedToAll(nn.QuantizedShardedToAllLinear):
    """A `PackedLinear` of which every rank reads its part of the input."""

    def __call__(self, x: mx.array) -> mx.array:
        """The product (..., output) of (..., input of this rank), summed, with the bias."""
        y = mx.distributed.all_sum(product(self, x), group=self.group)
        return y + self["bias"] if "bias" in self else y


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: PackedLinear,
    nn.QuantizedEmbedding: PackedEmbedding,
    nn.QuantizedAllToShardedLinear: PackedAllToSharded,
    nn.QuantizedShardedToAllLinear: PackedShardedToAll,
}


def product(layer: Any, x: mx.array) -> mx.array:  # noqa: ANN401  a quantized module
    """Product x W^T with the quantized weights of a layer.

    Args:
        layer: holds `weight`, `scales`, `biases`, `group_size`, `bits` and `mode`.
        x: (..., input).

    Cost: for the dense product, the unpacked weights for as long as it takes.

    Reference: the limits come from times measured on an H200 (docs/log.md). Padding moves the
    output by up to 0.5% in bf16, because another kernel runs.
    """
    rows = x.size // x.shape[-1]
    packed = (layer["weight"], layer["scales"], layer.get("biases"))
    form = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if rows == 1:  # nothing to fold; every call more is felt when one sequence writes
        return mx.quantized_matmul(x, *packed, transpose=True, **form)
    folded = x.reshape(rows, x.shape[-1])
    if rows >= _DENSE_FROM.get(layer.bits, _DENSE_FROM_ELSE):
        out = folded @ mx.dequantize(*packed, **form, dtype=x.dtype).T
    else:
        if _PAD_FROM.get(layer.bits, _PAD_FROM_ELSE) <= rows < _TILE:
            folded = mx.pad(folded, [(0, _TILE - rows), (0, 0)])
        out = mx.quantized_matmul(folded, *packed, transpose=True, **form)[:rows]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def with_packed_linears(tree: nn.Module) -> nn.Module:
    """The tree with its quantized linears and embeddings replaced; arrays are shared, not copied.

    Subclasses of MLX's layers, and kinds of layers that are not MLX's own, stay as they are.
    """
    replaced = [
        (path, _as(_FASTER[type(module)], module))
        for path, module in tree.named_modules()
        if type(module) in _FASTER
    ]
    tree.update_modules(cast(dict[str, Any], tree_unflatten(replaced)))
    return tree


def _as(kind: type[nn.Module], module: Any) -> nn.Module:  # noqa: ANN401  a quantized module
    """A layer of another class with the attributes and arrays of a module."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name, value in vars(module).items():
        if not name.startswith("_"):
            setattr(made, name, value)
    for name, value in module.items():
        made[name] = value
    made.freeze()
    return made
