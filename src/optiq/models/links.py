"""What crosses the borders of blocks: links that stand for arrays, and calls made with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel

Tree: TypeAlias = Any
"""Lists, tuples and dicts around leaves."""


@dataclasses.dataclass(frozen=True)
class Link:
    """Where an array that crosses the border of a block comes from.

    Attributes:
        kind: `out`, a floating output of a block; `pro`, a floating array made before the blocks,
            one row a sequence; both carry gradients. `aux`, another output of a block; `const`,
            another array made before the blocks, such as a mask or a table of positions.
        index: the block that gave it; for `pro` and `const` the block that took it first.
        leaf: its number there.
        batched: whether its first axis is the sequences.
    """

    kind: str
    index: int
    leaf: int
    batched: bool = True

    @property
    def is_output(self) -> bool:
        """Whether a block gave it."""
        return self.kind in {"out", "aux"}

    @property
    def is_differentiable(self) -> bool:
        """Whether it carries a gradient."""
        return self.kind in {"out", "pro"}


def map_tree(leaf: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """A tree of the same form, with `leaf` of every leaf and of those at its place in `others`."""
    if isinstance(tree, (list, tuple)):
        items = [map_tree(leaf, *group) for group in zip(tree, *others, strict=True)]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, dict):
        return {key: map_tree(leaf, tree[key], *(o[key] for o in others)) for key in tree}
    return leaf(tree, *others)


def links_in(tree: Tree) -> Iterator[Link]:
    """Every link in a tree, in order."""
    if isinstance(tree, Link):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from links_in(item)


def _encode(tree: Tree) -> dict[str, Any]:
    """JSON form of a tree of links and plain values.

    Raises:
        UnsupportedModel: if something else is in it.
    """
    if isinstance(tree, Link):
        return {"link": dataclasses.astuple(tree)}
    if isinstance(tree, tuple):
        return {"tuple": [_encode(item) for item in tree]}
    if isinstance(tree, list):
        return {"list": [_encode(item) for item in tree]}
    if isinstance(tree, dict):
        return {"dict": {key: _encode(item) for key, item in tree.items()}}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"value": tree}
    raise UnsupportedModel(
        f"a block of this model takes or returns a {type(tree).__name__}, which optiq cannot follow"
    )


def _decode(node: dict[str, Any]) -> Tree:
    ((kind, value),) = node.items()
    if kind == "link":
        return Link(*value)
    if kind == "tuple":
        return tuple(_decode(item) for item in value)
    if kind == "list":
        return [_decode(item) for item in value]
    if kind == "dict":
        return {key: _decode(item) for key, item in value.items()}
    return value


@dataclasses.dataclass
class BlockCall:
    """How the model calls one block: trees in which links stand for arrays.

    Attributes:
        args: positional arguments.
        kwargs: named arguments.
        result: what comes back.
        shapes: shape for all sequences and dtype of each array in `result`, by leaf.
    """

    args: Tree
    kwargs: Tree
    result: Tree = None
    shapes: list[tuple[list[int], str]] = dataclasses.field(default_factory=list)

    def inputs(self) -> list[Link]:
        """Links of all arrays it takes, each once."""
        return list(dict.fromkeys(links_in((self.args, self.kwargs))))

    def links(self) -> list[Link]:
        """Links of all differentiable inputs, each once."""
        return [link for link in self.inputs() if link.is_differentiable]

    def outputs(self) -> list[Link]:
        """Links of all arrays it returns, by leaf."""
        return sorted(links_in(self.result), key=lambda link: link.leaf)

    def encode(self) -> list[Any]:
        """JSON form.

        Raises:
            UnsupportedModel: if the block takes or returns more than arrays and plain values.
        """
        return [_encode(self.args), _encode(self.kwargs), _encode(self.result), self.shapes]

    @classmethod
    def decode(cls, form: list[Any]) -> BlockCall:
        """From its JSON form."""
        args, kwargs, result, shapes = form
        pairs = [(shape, dtype) for shape, dtype in shapes]
        return cls(_decode(args), _decode(kwargs), _decode(result), pairs)

    def settle(self, outputs: dict[Link, mx.array]) -> None:
        """Put the outputs for all sequences, by leaf, in the place of those of a micro-batch."""
        links = list(outputs)
        self.result = map_tree(lambda x: links[x.leaf] if isinstance(x, Link) else x, self.result)
        self.shapes = [
            (list(array.shape), str(array.dtype).rpartition(".")[2]) for array in outputs.values()
        ]

    def stand_ins(self, size: int, fill: Fill) -> Tree:
        """The result with made-up arrays, for `size` sequences."""
        return map_tree(
            lambda x: self.stand_in(x, size, fill) if isinstance(x, Link) else x, self.result
        )

    def stand_in(self, link: Link, size: int, fill: Fill) -> mx.array:
        """One array of `stand_ins`."""
        shape, dtype = self.shapes[link.leaf]
        full = (size, *shape[1:]) if link.batched else tuple(shape)
        return fill(full, getattr(mx, dtype), link)


Fill: TypeAlias = Callable[[tuple[int, ...], mx.Dtype, Link], mx.array]


def is_float(array: mx.array) -> bool:
    """Whether its numbers are floating."""
    return bool(mx.issubdtype(array.dtype, mx.floating))


def poison(shape: tuple[int, ...], dtype: mx.Dtype, _link: Link | None = None) -> mx.array:
    """NaN (0 where there is none) of a shape, in the memory of one number."""
    fill = float("nan") if mx.issubdtype(dtype, mx.floating) else 0
    return mx.broadcast_to(mx.array(fill, dtype=dtype), shape)


def noise(shape: tuple[int, ...], dtype: mx.Dtype, link: Link) -> mx.array:
    """Numbers that only this link has, the same each time; 1 where they are not floating."""
    if not mx.issubdtype(dtype, mx.floating):
        return mx.ones(shape, dtype=dtype)
    return mx.random.normal(shape, dtype, key=mx.random.key(1_000_003 * link.index + link.leaf))


def collected(result: Tree) -> tuple[Tree, list[mx.array]]:
    """The form of a block's result, with the leaf numbers of its arrays, and the arrays."""
    leaves: list[mx.array] = []

    def collect(value: Any) -> Any:  # noqa: ANN401  any leaf
        if not isinstance(value, mx.array):
            return value
        leaves.append(value)
        return Link("out", -1, len(leaves) - 1)

    return map_tree(collect, result), leaves


def run_block(block: nn.Module, call: BlockCall, given: dict[Link, mx.array]) -> Tree:
    """What a block returns for these arrays."""
    args, kwargs = map_tree(
        lambda x: given[x] if isinstance(x, Link) else x, (call.args, call.kwargs)
    )
    return block(*args, **kwargs)


def merged_outputs(
    index: int, outputs: list[list[mx.array]], sizes: list[int]
) -> dict[Link, mx.array]:
    """Outputs of a block for all sequences, by link.

    Args:
        index: the block.
        outputs: its arrays, by micro-batch.
        sizes: sequences of each micro-batch.

    Raises:
        UnsupportedModel: if one has no row for each sequence, unless it holds the same whole
            numbers each time.
    """
    merged = {}
    for leaf, parts in enumerate(zip(*outputs, strict=True)):
        batched = all(part.shape[:1] == (size,) for part, size in zip(parts, sizes, strict=True))
        floating = is_float(parts[0])
        same = floating or all(mx.array_equal(part, parts[0]).item() for part in parts)
        if not batched and (floating or not same):
            raise UnsupportedModel(
                f"block {index} of this model returns an array of shape {list(parts[0].shape)}, "
                "which has no row for each sequence; optiq does not follow that"
            )
        link = Link("out" if floating else "aux", index, leaf, batched)
        merged[link] = mx.concatenate(list(parts)) if batched else parts[0]
    return merged


class Tracer:
    """Finds where the arrays come from that a model gives its blocks, in one call of the model.

    Arrays are known by identity. They are held, so no identity is given out again.

    Args:
        calls: of the blocks so far; grows while the model runs.
        num_sequences: rows of the call.
        num_witness: rows of the witness: another number.
    """

    def __init__(self, calls: list[BlockCall], num_sequences: int, num_witness: int) -> None:
        self._calls = calls
        self._sizes = num_sequences, num_witness
        self._met: dict[int, tuple[mx.array, mx.array, Link]] = {}

    def learn(self, linked: Tree, given: Tree) -> None:
        """Note the arrays of a tree, from the tree of their links."""
        map_tree(lambda x, y: self._add(y, x) if isinstance(x, Link) else None, linked, given)

    def _add(self, array: mx.array, link: Link) -> None:
        self._met[id(array)] = (array, array[...], link)

    def trace(self, given: Tree, witness: Tree) -> tuple[Tree, dict[Link, mx.array]]:
        """The next block's arguments with links in place of arrays, and the arrays met first.

        Args:
            given: arguments that the model gives, where outputs of earlier blocks are poison.
            witness: arguments of the same call with another number of sequences, beginning with
                the same, where outputs of earlier blocks are noise.

        Raises:
            UnsupportedModel: if an array comes from code between the blocks, or has neither one row
                for each sequence nor the same shape for any number of them.
        """
        fresh: dict[Link, mx.array] = {}

        def link_of(value: Any, other: Any) -> Any:  # noqa: ANN401  any leaf
            if not isinstance(value, mx.array):
                return value
            if id(value) not in self._met:
                link = self._new_link(len(fresh), value, other)
                self._add(value, link)
                fresh[link] = value
            elif self._is_changed(value, other):
                raise self.unknown()
            return self._met[id(value)][2]

        return map_tree(link_of, given, witness), fresh

    def unknown(self) -> UnsupportedModel:
        """The error for what cannot be followed."""
        return UnsupportedModel(
            f"an input of block {len(self._calls)} is computed between the blocks from the output "
            "of earlier ones; optiq does not follow that"
        )

    def _is_changed(self, value: mx.array, witness: mx.array) -> bool:
        """Whether the model wrote over an array in place since it was met."""
        _, before, link = self._met[id(value)]
        if link.is_output:
            noisy = self._calls[link.index].stand_in(link, self._sizes[1], noise)
            return not mx.array_equal(witness, noisy).item()
        return not mx.array_equal(value, before, equal_nan=is_float(value)).item()

    def _new_link(self, leaf: int, value: mx.array, witness: mx.array) -> Link:
        """A link for an array that no block gave."""
        index, floating = len(self._calls), is_float(value)
        shapes = tuple(value.shape), tuple(witness.shape)
        batched = shapes == tuple((size, *value.shape[1:]) for size in self._sizes)
        if not batched and shapes[0] != shapes[1]:
            raise UnsupportedModel(
                f"block {index} of this model takes an array of shape {list(value.shape)}, which "
                "has no row for each sequence; optiq does not follow that"
            )
        if floating:
            sound = not mx.isnan(value).any().item()
        else:
            pair = (value[:1], witness[:1]) if batched else (value, witness)
            sound = bool(mx.array_equal(*pair).item())
        if not sound:
            raise self.unknown()
        return Link("pro" if batched and floating else "const", index, leaf, batched)
