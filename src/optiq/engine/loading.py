"""A model directory -> a target with its weights in memory, in the form that fits the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from optiq.backend import is_cpu, is_cuda, memory_bytes, mx, nn, tree_flatten
from optiq.configs import parse_size
from optiq.engine import ranks
from optiq.engine.packed_linear import with_packed_linears
from optiq.engine.target import Gemma4Target, Target, TreeTarget, kv_note, vocabulary_of
from optiq.errors import UsageError
from optiq.events import Emit, Notice, no_emit
from optiq.models.families import check_standalone, family_of
from optiq.models.families.gemma4 import Gemma4, ImageMask
from optiq.models.load import load_tree
from optiq.upstream import dense_float32

_SHARE = 0.8  # of the memory, for weights
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that is ready to write.

    Attributes:
        target: the model.
        tree: its modules.
        config: its config.json.
        dtype: of its activations.
        size_bytes: of its weights in memory.
    """

    target: Target
    tree: nn.Module
    config: dict[str, Any]
    dtype: mx.Dtype
    size_bytes: int


def open_target(
    path: Path,
    *,
    memory_limit: str | None = None,
    image_mask: ImageMask | None = None,
    kv_bits: int | None = None,
    emit: Emit = no_emit,
) -> Opened:
    """The model of a directory, source or artifact.

    On the CPU its weights are dense float32 where they fit, else packed with float32 scales. On
    CUDA its quantized layers are those of `packed_linear`. Of several ranks each has its part.

    Args:
        path: the directory.
        memory_limit: most bytes of weights, `8GB`; default: four fifths of the memory.
        image_mask: see `Gemma4`.
        kv_bits: of keys and values, see `SequenceCache`.
        emit: receives a notice of the form chosen, and of the layers that `kv_bits` is for.

    Raises:
        UsageError: if it is no model, drafts for another one, or is larger than the limit.
        UnsupportedModel: if its caches are of a kind that the engine does not know, or `kv_bits`
            cannot be had.
    """
    tree, config = load_tree(path)
    check_standalone(config)
    own = parse_size(memory_limit) if memory_limit else int(_SHARE * memory_bytes())
    limit = ranks.least(own)
    tree = _resident(tree, config, path, limit, emit)
    family = family_of(config)
    target: Target
    if family is not None and not family.drafter:
        target = Gemma4Target(Gemma4(tree, config, image_mask), kv_bits)
    else:
        target = TreeTarget(tree, vocabulary_of(config), kv_bits)
    target.make_cache()  # a kind that is not known is refused now
    if kv_bits is not None:
        emit(Notice(kv_note(target, kv_bits)))
    mx.eval(tree.parameters())
    return Opened(target, tree, config, _dtype(tree), _bytes(tree))


def _resident(
    tree: nn.Module, config: dict[str, Any], path: Path, limit: int, emit: Emit
) -> nn.Module:
    """The tree in the form that it will have in memory."""
    dense = _FLOAT32 * _num_weights(tree)
    if not is_cpu():
        ranks.shard(tree, config)
        _check(_bytes(tree), path, limit)
        return with_packed_linears(tree) if is_cuda() else tree
    if dense <= limit:
        emit(Notice(f"weights are dense float32, {dense / 1e9:.2f} GB"))
        tree = dense_float32(tree)
        ranks.shard(tree, config)  # dense weights divide where groups of packed ones do not
        return tree
    tree.set_dtype(mx.float32)
    ranks.shard(tree, config)
    _check(_bytes(tree), path, limit)
    emit(
        Notice(
            f"weights stay packed with float32 scales, {_bytes(tree) / 1e9:.2f} GB: dense float32 "
            f"would take {dense / 1e9:.2f} GB of {limit / 1e9:.2f}; this is slow",
            "warning",
        )
    )
    return tree


def _check(size_bytes: int, path: Path, limit: int) -> None:
    if size_bytes > limit:
        raise UsageError(
            f"the weights of {path} take {size_bytes / 1e9:.2f} GB in memory, and "
            f"{limit / 1e9:.2f} GB are allowed; convert it to fewer bits, or raise --memory-limit"
        )


def _parameters(tree: nn.Module) -> dict[str, mx.array]:
    flat: Any = tree_flatten(tree.parameters())
    return dict(flat)


def _bytes(tree: nn.Module) -> int:
    return sum(value.nbytes for value in _parameters(tree).values())


def _num_weights(tree: nn.Module) -> int:
    """Weights of this rank, about, as many as they are when nothing is packed."""
    flat = _parameters(tree)
    modules = dict(tree.named_modules())
    total = 0
    for name, value in flat.items():
        module = modules.get(name.rpartition(".")[0])
        bits = getattr(module, "bits", None)
        size = value.size // (ranks.count() if ".layers." in name else 1)
        if bits is None:
            total += size
        elif name.endswith(".weight"):
            total += size * 32 // bits
        elif not name.endswith((".scales", ".biases")):
            total += size
    return total


def _dtype(tree: nn.Module) -> mx.Dtype:
    """The dtype of norms, which is that of the activations."""
    vectors = [value.dtype for value in _parameters(tree).values() if value.ndim == 1]
    floats = [dtype for dtype in vectors if mx.issubdtype(dtype, mx.floating)]
    return floats[0] if floats else mx.float32
