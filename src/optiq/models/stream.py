"""Run a model block by block, forwards and backwards, with one block of weights in memory.

The model's own `__call__` drives: each block of its `layers` list is replaced by a slot that loads
the block, runs it over all sequences in micro-batches, writes the outputs to the work directory and
drops the weights. What a slot returns to the model is poison (NaN of the right shape, no memory),
because the true outputs are on disk: an array that reaches a later block through code between the
blocks is then NaN, and refused by name instead of being given a wrong gradient.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optiq.artifacts import write_atomic
from optiq.backend import compute_dtype, mx, nn
from optiq.errors import EngineFailure, UnsupportedModel, UsageError
from optiq.models.load import Source
from optiq.models.taps import Call, tapped

_BATCH_TOKENS = 1024


class _Slot:
    """Stands in for a block in the model's list; forwards the attributes that models read."""

    def __init__(self, block: nn.Module, index: int, drive: Callable[..., Any]) -> None:
        self._block, self._index, self._drive = block, index, drive

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  any block's signature
        return self._drive(self._index, args, kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  any block's attribute
        return getattr(self._block, name)


@dataclasses.dataclass(frozen=True)
class Link:
    """Where an input of a block comes from.

    Attributes:
        kind: `out` (output `leaf` of block `index`), `pro` (array `leaf` computed before the blocks)
            or `const` (array `leaf` that carries no gradient, such as a mask).
    """

    kind: str
    index: int
    leaf: int


@dataclasses.dataclass
class BlockCall:
    """How the model calls one block, as JSON-able trees in which links stand for arrays."""

    args: Any
    kwargs: Any
    result: Any
    result_shapes: list[tuple[list[int], str]]

    def links(self) -> list[Link]:
        """Links of all differentiable inputs, each once."""
        found: list[Link] = []
        _walk((self.args, self.kwargs), found.append)
        return [
            link for n, link in enumerate(found) if link.kind != "const" and link not in found[:n]
        ]


def _walk(tree: Any, visit: Callable[[Link], None]) -> None:  # noqa: ANN401  a nested tree
    if isinstance(tree, Link):
        visit(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _walk(item, visit)
    elif isinstance(tree, dict):
        for item in tree.values():
            _walk(item, visit)


def _map(tree: Any, leaf: Callable[[Any], Any]) -> Any:  # noqa: ANN401  a nested tree
    """Rebuild a tree of lists, tuples and dicts with every other node replaced."""
    if isinstance(tree, tuple):
        return tuple(_map(item, leaf) for item in tree)
    if isinstance(tree, list):
        return [_map(item, leaf) for item in tree]
    if isinstance(tree, dict):
        return {key: _map(item, leaf) for key, item in tree.items()}
    return leaf(tree)


def _encode(tree: Any) -> Any:  # noqa: ANN401  a nested tree
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


def _decode(node: dict[str, Any]) -> Any:  # noqa: ANN401  a nested tree
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


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _block_list(model: nn.Module) -> tuple[str, list[Any]]:
    layers = list(getattr(model, "layers", ()))
    for path, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, list) and len(value) == len(layers) > 0:
                if all(a is b for a, b in zip(value, layers, strict=True)):
                    return (f"{path}.{key}" if path else key), value
    raise UnsupportedModel("this model has no list of blocks that optiq can stream")


class StreamedModel:
    """A source run block by block over one batch of sequences.

    Args:
        source: where weights come from.
        tokens: (N, T) int32, the calibration or held-out windows, all of one length.
        work: directory for the activations between blocks; a finished block found there is not run
            again, so a killed run goes on where it stopped.
        overrides: dense weights that replace those of the source, by parameter name.

    Cost: memory of one block, one boundary of N x T hidden states and one micro-batch.
    """

    def __init__(
        self,
        source: Source,
        tokens: mx.array,
        work: Path,
        overrides: Callable[[str, mx.array], mx.array] | None = None,
    ) -> None:
        self.source, self.tokens, self.work = source, tokens, work
        self.dtype = compute_dtype(source.dtype)
        self._overrides = overrides
        self.model = source.model()
        self.model.train()  # expert indices are kept out of the gradient only in training mode
        self.prefix, self._list = _block_list(self.model)
        self._blocks = list(self._list)
        self.num_blocks = len(self._blocks)
        self.calls: list[BlockCall] = []
        self.num_sequences, self.window = tokens.shape
        self.batch = max(1, _BATCH_TOKENS // self.window)
        work.mkdir(parents=True, exist_ok=True)

    # -- weights ---------------------------------------------------------------------------------

    def _prepared(self, name: str, value: mx.array) -> mx.array:
        if self._overrides is not None:
            value = self._overrides(name, value)
        return value.astype(self.dtype) if _is_float(value) else value

    def _load(self, module: nn.Module, prefix: str, keep: Callable[[str], bool]) -> None:
        """Load the parameters under a prefix and check that they are finite."""
        chosen = {
            name.removeprefix(prefix): self._prepared(name, value)
            for name, value in self.source.weights().items()
            if name.startswith(prefix) and keep(name)
        }
        finite = [mx.isfinite(value).all() for value in chosen.values()]
        mx.eval(list(chosen.values()), finite)
        for name, ok in zip(chosen, finite, strict=True):
            if not ok.item():
                raise UsageError(f"'{prefix}{name}' of {self.source.info.name} holds NaN or inf")
        module.load_weights(list(chosen.items()), strict=False)

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights in memory; `drop_block` frees them."""
        block = self._blocks[index]
        self._load(block, f"{self.prefix}.{index}.", lambda _: True)
        return block

    def drop_block(self, index: int) -> None:
        """Replace the weights of a block by lazy ones."""
        prefix = f"{self.prefix}.{index}."
        lazy = [(n.removeprefix(prefix), v) for n, v in self.source.weights().items()]
        names = {n for n in self.source.weights() if n.startswith(prefix)}
        self._blocks[index].load_weights(
            [(n, v) for n, v in lazy if f"{prefix}{n}" in names], strict=False
        )
        mx.clear_cache()

    def load_ends(self) -> nn.Module:
        """The model with everything outside its blocks in memory: embeddings, norms and head."""
        self._load(self.model, "", lambda name: not name.startswith(f"{self.prefix}."))
        return self.model

    def drop_ends(self) -> None:
        """Replace what `load_ends` loaded by lazy arrays."""
        outside = [
            (name, value)
            for name, value in self.source.weights().items()
            if not name.startswith(f"{self.prefix}.")
        ]
        self.model.load_weights(outside, strict=False)
        mx.clear_cache()

    # -- driving ---------------------------------------------------------------------------------

    def _drive(self, tokens: mx.array, drive: Callable[..., Any]) -> mx.array:
        """Call the model with `drive(index, args, kwargs)` in place of its blocks."""
        self._list[:] = [_Slot(block, i, drive) for i, block in enumerate(self._blocks)]
        try:
            result: mx.array = self.model(tokens)
        finally:
            self._list[:] = self._blocks
        return result

    def _poison(self, index: int, size: int) -> tuple[Any, list[Any]]:
        """What a slot returns: the result tree with NaN arrays, and those arrays by leaf."""
        call = self.calls[index]
        leaves: list[Any] = []
        for shape, dtype in call.result_shapes:
            kind = getattr(mx, dtype)
            full = [size, *shape[1:]] if shape and shape[0] == self.num_sequences else shape
            fill = float("nan") if mx.issubdtype(kind, mx.floating) else 0
            leaves.append(mx.broadcast_to(mx.array(fill, dtype=kind), full))
        tree = _map(call.result, lambda x: leaves[x.leaf] if isinstance(x, Link) else x)
        return tree, leaves

    def _file(self, index: int) -> Path:
        return self.work / f"block_{index:04d}.safetensors"

    def _save_calls(self) -> None:
        text = json.dumps(
            [
                [_encode(c.args), _encode(c.kwargs), _encode(c.result), c.result_shapes]
                for c in self.calls
            ]
        )
        write_atomic(self.work / "calls.json", text.encode())

    def _load_calls(self) -> list[BlockCall]:
        path = self.work / "calls.json"
        if not path.is_file():
            return []
        return [
            BlockCall(_decode(a), _decode(k), _decode(r), s)
            for a, k, r, s in json.loads(path.read_text())
        ]

    def forward(
        self,
        visit: Callable[[list[Call]], None] | None = None,
        done: Callable[[int, nn.Module], None] | None = None,
    ) -> None:
        """Run all blocks over all sequences; outputs go to the work directory.

        Args:
            visit: called after each micro-batch of a block with the recorded calls of its matrices
                (inputs only).
            done: called at the end of a block with its index and the block, weights loaded. Neither
                is called for blocks that an earlier run finished.
        """
        self.load_ends()
        stored = self._load_calls()
        self.calls = []
        known: dict[int, Link] = {}
        alive: list[Any] = []
        constants: dict[str, mx.array] = {}
        saved = [0]

        def link_of(value: Any) -> Any:  # noqa: ANN401  any leaf
            if not isinstance(value, mx.array):
                return value
            if id(value) in known:
                return known[id(value)]
            if _is_float(value) and mx.isnan(value).any().item():
                raise UnsupportedModel(
                    f"an input of block {len(self.calls)} is computed between the blocks from "
                    "earlier ones; optiq does not follow that"
                )
            link = Link("pro" if _is_float(value) else "const", len(self.calls), len(constants))
            known[id(value)] = link
            alive.append(value)
            constants[f"{link.kind}.{link.leaf}"] = value
            return link

        def drive(index: int, args: Any, kwargs: Any) -> Any:  # noqa: ANN401  any block
            linked = [_map(args, link_of), _map(kwargs, link_of)]
            if index < len(stored) and self._file(index).is_file():
                self.calls.append(stored[index])
            else:
                if len(constants) > saved[0]:
                    self._write(self.work / "prologue.safetensors", constants)
                    saved[0] = len(constants)
                self.calls.append(BlockCall(linked[0], linked[1], None, []))
                self._run_block(index, visit, done)
                self._save_calls()
            tree, leaves = self._poison(index, self.num_sequences)
            for n, leaf in enumerate(leaves):
                known[id(leaf)] = Link("out", index, n)
            alive.extend(leaves)
            return tree

        self._drive(self.tokens, drive)
        if len(self.calls) != self.num_blocks:
            raise UnsupportedModel("this model does not call each of its blocks once")
        self.drop_ends()

    def _run_block(
        self,
        index: int,
        visit: Callable[[list[Call]], None] | None,
        done: Callable[[int, nn.Module], None] | None,
    ) -> None:
        block = self.load_block(index)
        call = self.calls[index]
        arrays = self._inputs(call)
        outputs: list[list[mx.array]] = []
        with tapped(block, f"{self.prefix}.{index}.", self.source.modules) as taps:
            for rows in self.batches():
                taps.start(gradients=False)
                result = self._call(block, call, arrays, rows)
                leaves: list[mx.array] = []
                call.result = _map(result, lambda x, seen=leaves: _collect(x, seen))
                mx.eval(leaves)
                outputs.append(leaves)
                if visit is not None:
                    visit(taps.calls)
        if done is not None:
            done(index, block)
        merged = [self._merge(pieces) for pieces in zip(*outputs, strict=True)]
        call.result_shapes = [(list(m.shape), str(m.dtype).rpartition(".")[2]) for m in merged]
        self._write(self._file(index), {f"o{n}": m for n, m in enumerate(merged)})
        self.drop_block(index)

    def _merge(self, pieces: Sequence[mx.array]) -> mx.array:
        if pieces[0].ndim > 1 and sum(p.shape[0] for p in pieces) == self.num_sequences:
            return mx.concatenate(list(pieces))
        return pieces[0]

    def _write(self, path: Path, arrays: dict[str, mx.array]) -> None:
        temporary = path.with_suffix(".part.safetensors")
        try:
            mx.save_safetensors(str(temporary), arrays)
        except RuntimeError as error:
            temporary.unlink(missing_ok=True)
            raise EngineFailure(f"{path} cannot be written: {error}; free disk space") from None
        temporary.replace(path)

    def batches(self) -> Iterator[slice]:
        """Slices of sequences that make a micro-batch."""
        for start in range(0, self.num_sequences, self.batch):
            yield slice(start, min(start + self.batch, self.num_sequences))

    def _inputs(self, call: BlockCall) -> dict[Link, mx.array]:
        found: list[Link] = []
        _walk((call.args, call.kwargs), found.append)
        return {link: self.fetch(link) for link in dict.fromkeys(found)}

    def fetch(self, link: Link) -> mx.array:
        """The array a link stands for, lazily read from the work directory."""
        if link.kind == "out":
            return mx.load(str(self._file(link.index)))[f"o{link.leaf}"]
        return mx.load(str(self.work / "prologue.safetensors"))[f"{link.kind}.{link.leaf}"]

    def _slice(self, link: Link, array: mx.array, rows: slice) -> mx.array:
        batched = array.ndim > 0 and array.shape[0] == self.num_sequences
        if link.kind == "const":
            batched = batched and array.ndim > 2
        return array[rows] if batched else array

    def _call(
        self, block: nn.Module, call: BlockCall, arrays: dict[Link, mx.array], rows: slice
    ) -> Any:  # noqa: ANN401  any block's result
        def pick(x: Any) -> Any:  # noqa: ANN401  any leaf
            return self._slice(x, arrays[x], rows) if isinstance(x, Link) else x

        return block(*_map(call.args, pick), **_map(call.kwargs, pick))

    # -- backwards -------------------------------------------------------------------------------

    def backward(
        self,
        index: int,
        cotangents: dict[Link, mx.array],
        visit: Callable[[slice, list[Call]], None],
    ) -> None:
        """Pull cotangents through a block.

        Args:
            index: the block.
            cotangents: (N, ...) by link; those of the block's outputs are taken out, those of its
                inputs are added in.
            visit: called for each micro-batch with the calls of the block's matrices: inputs `x`
                and cotangents `g` of the outputs.
        """
        block = self.load_block(index)
        call = self.calls[index]
        arrays = self._inputs(call)
        links = call.links()
        live = [n for n in range(len(call.result_shapes)) if Link("out", index, n) in cotangents]
        pulled: list[list[mx.array]] = []
        with tapped(block, f"{self.prefix}.{index}.", self.source.modules) as taps:
            for rows in self.batches():
                taps.start(gradients=True)

                def run(*inputs: mx.array, rows: slice = rows) -> list[mx.array]:
                    given = dict(zip(links, inputs, strict=True))

                    def pick(x: Any) -> Any:  # noqa: ANN401  any leaf
                        if not isinstance(x, Link):
                            return x
                        return given[x] if x in given else self._slice(x, arrays[x], rows)

                    result = block(*_map(call.args, pick), **_map(call.kwargs, pick))
                    leaves: list[mx.array] = []
                    _map(result, lambda x: _collect(x, leaves))
                    return [leaves[n] for n in live]

                primals = [self._slice(link, arrays[link], rows) for link in links]
                seeds = [cotangents[Link("out", index, n)][rows] for n in live]
                _, grads = mx.vjp(run, primals, seeds)
                mx.eval(grads)
                pulled.append(list(grads))
                visit(rows, taps.calls)
        for n in live:
            del cotangents[Link("out", index, n)]
        for link, pieces in zip(links, zip(*pulled, strict=True), strict=True):
            total = mx.concatenate(list(pieces))
            cotangents[link] = cotangents[link] + total if link in cotangents else total
        mx.eval(list(cotangents.values()))
        self.drop_block(index)

    def outputs(self) -> list[Link]:
        """Links of the floating outputs of the last block, which the head reads."""
        last = self.num_blocks - 1
        shapes = self.calls[last].result_shapes
        return [
            Link("out", last, n)
            for n, (_, dtype) in enumerate(shapes)
            if mx.issubdtype(getattr(mx, dtype), mx.floating)
        ]

    def logits(self, rows: slice, outputs: Sequence[mx.array]) -> mx.array:
        """What the model makes of the last block's outputs: (n, T, V); the ends must be loaded.

        Args:
            rows: the sequences.
            outputs: arrays for `outputs()`, sliced to those rows.
        """
        size = len(range(*rows.indices(self.num_sequences)))
        last = self.num_blocks - 1
        given = {link.leaf: array for link, array in zip(self.outputs(), outputs, strict=True)}

        def drive(index: int, args: Any, kwargs: Any) -> Any:  # noqa: ANN401, ARG001  any block
            tree, leaves = self._poison(index, size)
            if index < last:
                return tree
            return _map(
                self.calls[last].result,
                lambda x: given.get(x.leaf, leaves[x.leaf]) if isinstance(x, Link) else x,
            )

        return self._drive(self.tokens[rows], drive)

    def prologue(self, rows: slice, links: Sequence[Link]) -> list[mx.array]:
        """The arrays computed before the blocks for some sequences, as a differentiable function."""
        size = len(range(*rows.indices(self.num_sequences)))
        found: dict[Link, mx.array] = {}

        def drive(index: int, args: Any, kwargs: Any) -> Any:  # noqa: ANN401  any block
            call = self.calls[index]
            for tree, given in ((call.args, args), (call.kwargs, kwargs)):
                _pair(tree, given, found)
            return self._poison(index, size)[0]

        self._drive(self.tokens[rows], drive)
        return [found[link] for link in links]

    def close(self) -> None:
        """Delete the activations."""
        shutil.rmtree(self.work, ignore_errors=True)


def _collect(value: Any, leaves: list[mx.array]) -> Any:  # noqa: ANN401  any leaf
    if not isinstance(value, mx.array):
        return value
    leaves.append(value)
    return Link("out", -1, len(leaves) - 1)


def _pair(tree: Any, given: Any, found: dict[Link, mx.array]) -> None:  # noqa: ANN401  nested trees
    if isinstance(tree, Link):
        if tree.kind == "pro":
            found[tree] = given
    elif isinstance(tree, (list, tuple)):
        for a, b in zip(tree, given, strict=True):
            _pair(a, b, found)
    elif isinstance(tree, dict):
        for key in tree:
            _pair(tree[key], given[key], found)
