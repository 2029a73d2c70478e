"""Run a model block by block, forwards and backwards, with one block of weights in memory.

The model's own `__call__` drives: each block of its `layers` list is replaced by a slot that loads
the block, runs it over all sequences in micro-batches, writes the outputs to the work directory and
drops the weights. What a slot returns to the model is poison (NaN of the right shape, no memory),
because the true outputs are on disk: an array that reaches a later block through code between the
blocks is then NaN, and refused by name instead of being given a wrong gradient. Before a block
runs, a witness (the same call with another number of sequences, and noise in place of the earlier
outputs) shows which arrays have a row for each sequence, and that outputs came as they were given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from optiq.artifacts import write_atomic
from optiq.backend import (
    compute_dtype,
    is_cpu,
    load_arrays,
    mx,
    nn,
    release_memory,
    save_arrays,
)
from optiq.errors import UnsupportedModel, UsageError
from optiq.models.head import HeadSlices
from optiq.models.links import (
    BlockCall,
    Link,
    Tracer,
    Tree,
    collected,
    is_float,
    map_tree,
    merged_outputs,
    noise,
    poison,
    run_block,
)
from optiq.models.load import Source
from optiq.models.modules import parameters_of
from optiq.models.safetensors_io import disk_failure
from optiq.models.taps import Call, tapped

__all__ = ["BlockCall", "Link", "StreamedModel"]

_BATCH_TOKENS = 1024 if is_cpu() else 4096
_CHECKED = 1 << 25  # numbers whose finiteness is looked at together
_FORMAT = 2  # of the work directory


class _Slot:
    """Stands in for a block in the model's list; forwards the attributes that models read."""

    def __init__(self, block: nn.Module, index: int, drive: Callable[..., Any]) -> None:
        self._block, self._index, self._drive = block, index, drive

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  any block's signature
        return self._drive(self._index, args, kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  any block's attribute
        return getattr(self._block, name)


class _Reached(Exception):
    """Ends a drive at the block whose arguments are wanted."""

    def __init__(self, given: Tree) -> None:
        self.given = given


def _is_finite(value: mx.array) -> bool:
    """Whether no number is NaN or inf; the array is evaluated, and looked at a part at a time."""
    mx.eval(value)
    flat = value.reshape(-1)
    parts = (flat[start : start + _CHECKED] for start in range(0, flat.size, _CHECKED))
    return all(cast(bool, mx.isfinite(part).all().item()) for part in parts)


def _block_list(model: nn.Module) -> tuple[str, list[Any]]:
    layers = list(getattr(model, "layers", ()))
    for path, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, list) and len(value) == len(layers) > 0:
                if all(a is b for a, b in zip(value, layers, strict=True)):
                    return (f"{path}.{key}" if path else key), value
    raise UnsupportedModel("this model has no list of blocks that optiq can stream")


def _rows_of(link: Link, array: mx.array, rows: slice) -> mx.array:
    """The rows of an array if it has rows; always a new Python object, which may be written to."""
    return array[rows] if link.batched else array[...]


class StreamedModel:
    """A source run block by block over one batch of sequences.

    Args:
        source: where weights come from.
        tokens: (N, T) int32, the calibration or held-out windows, all of one length.
        work: directory for the activations between blocks; a finished block found there is not run
            again, so a killed run goes on where it stopped. What another source, other tokens or
            another dtype left there is not used.
        overrides: dense weights that replace those of the source, by parameter name.

    Attributes:
        dtype: of weights and activations; may be set before `forward`.
        batch: sequences in a micro-batch; 1 for a model with experts, so that the rows an expert
            gets in one call are of one sequence.
        calls: how the model calls each block, once `forward` has run.

    Cost: memory of one block, one boundary of N x T hidden states and one micro-batch. The weights
        are opened once for every block and once for the ends, in each pass.
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
        self._drop(self.model, lambda _: True)
        self.prefix, self._list = _block_list(self.model)
        self._blocks = list(self._list)
        self.num_blocks = len(self._blocks)
        self.calls: list[BlockCall] = []
        self.num_sequences, self.window = tokens.shape
        one = tokens[:1]
        self._witness_tokens = one if len(tokens) > 1 else mx.concatenate([one, one])
        has_experts = any(info.role == "expert" for info in source.modules)
        self.batch = 1 if has_experts else max(1, _BATCH_TOKENS // self.window)
        with disk_failure(work):
            work.mkdir(parents=True, exist_ok=True)

    # -- weights ---------------------------------------------------------------------------------

    def _prepared(self, name: str, value: mx.array) -> mx.array:
        if self._overrides is not None:
            value = self._overrides(name, value)
        return value.astype(self.dtype) if is_float(value) else value

    def _load(self, module: nn.Module, prefix: str, keep: Callable[[str], bool]) -> None:
        """Load the parameters under a prefix, one by one, and check that they are finite."""
        weights = self.source.weights()
        chosen: dict[str, mx.array] = {}
        for name in [name for name in weights if keep(name)]:
            value = self._prepared(name, weights.pop(name))
            if not _is_finite(value):
                raise UsageError(
                    f"'{name}' of {self.source.info.name} holds NaN or inf; get the checkpoint "
                    "again, or another one"
                )
            chosen[name.removeprefix(prefix)] = value
        module.load_weights(list(chosen.items()), strict=False)

    def _drop(self, module: nn.Module, keep: Callable[[str], bool]) -> None:
        """Put poison in place of parameters, which frees them."""
        gone = [
            (name, poison(tuple(value.shape), value.dtype))
            for name, value in parameters_of(module).items()
            if keep(name)
        ]
        module.load_weights(gone, strict=False)
        release_memory()

    def _is_end(self, name: str) -> bool:
        return not name.startswith(f"{self.prefix}.")

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights in memory; `drop_block` frees them."""
        block: nn.Module = self._blocks[index]
        prefix = f"{self.prefix}.{index}."
        self._load(block, prefix, lambda name: name.startswith(prefix))
        return block

    def drop_block(self, index: int) -> None:
        """Free the weights of a block; it cannot be used before it is loaded again."""
        self._drop(self._blocks[index], lambda _: True)

    def load_ends(self) -> nn.Module:
        """The model with everything outside its blocks in memory: embeddings, norms and head."""
        self._load(self.model, "", self._is_end)
        return self.model

    def drop_ends(self) -> None:
        """Free what `load_ends` loaded."""
        self._drop(self.model, self._is_end)

    # -- work directory --------------------------------------------------------------------------

    def _file(self, index: int) -> Path:
        """Outputs of a block."""
        return self.work / f"block_{index:04d}.safetensors"

    def _taken_file(self, index: int) -> Path:
        """Arrays made before the blocks that a block is the first to take."""
        return self.work / f"before_{index:04d}.safetensors"

    def _key(self) -> str:
        """What the activations depend on, overrides excepted."""
        shape = tuple(self.tokens.shape)
        about = repr((_FORMAT, self.source.info.fingerprint, shape, str(self.dtype)))
        return hashlib.sha256(
            about.encode() + bytes(memoryview(cast(Any, self.tokens)))
        ).hexdigest()

    def _save_calls(self, calls: Sequence[BlockCall]) -> None:
        text = json.dumps({"key": self._key(), "calls": [call.encode() for call in calls]})
        with disk_failure(self.work):
            write_atomic(self.work / "calls.json", text.encode())

    def _load_calls(self) -> list[BlockCall]:
        """The calls of the blocks that an earlier run finished."""
        path = self.work / "calls.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(stored, dict) or stored.get("key") != self._key():
            return []
        calls = (BlockCall.decode(form) for form in stored["calls"])
        kept = itertools.takewhile(lambda pair: self._file(pair[0]).is_file(), enumerate(calls))
        return [call for _, call in kept]

    def num_finished(self) -> int:
        """Blocks that an earlier run finished, which `forward` will not run again."""
        return len(self._load_calls())

    def forget(self, count: int) -> None:
        """Let `forward` run all but the first `count` blocks again."""
        for index in range(count, self.num_blocks):
            self._file(index).unlink(missing_ok=True)

    def adopt(self, other: StreamedModel, count: int) -> None:
        """Take over the first blocks of another run, so that `forward` begins after them.

        Args:
            other: a run of the same source on the same tokens, forward done.
            count: blocks to take over. They, and what is outside the blocks but for the head, must
                have the same weights here as there.
        """
        with disk_failure(self.work):
            for index in range(count):
                _share(other._file(index), self._file(index))
                if other._taken_file(index).is_file():
                    _share(other._taken_file(index), self._taken_file(index))
        self._save_calls(other.calls[:count])

    def fetch(self, link: Link) -> mx.array:
        """The array a link stands for, lazily read from the work directory."""
        file = self._file if link.is_output else self._taken_file
        return load_arrays(file(link.index))[f"{link.kind}.{link.leaf}"]

    def close(self) -> None:
        """Delete the activations."""
        shutil.rmtree(self.work, ignore_errors=True)

    # -- driving ---------------------------------------------------------------------------------

    def _drive(self, tokens: mx.array, drive: Callable[[int, Tree, Tree], Tree]) -> mx.array:
        """Call the model with `drive(index, args, kwargs)` in place of its blocks."""
        before = list(self._list)
        self._list[:] = [_Slot(block, i, drive) for i, block in enumerate(self._blocks)]
        try:
            result: mx.array = self.model(tokens)
        finally:
            self._list[:] = before
        return result

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

        Raises:
            UnsupportedModel: if the model does more between its blocks than pass on what they
                return, or calls them in another way than each once and in order.
            UsageError: if a weight is not finite.
        """
        self.load_ends()
        stored = self._load_calls()
        self.calls = []
        tracer = Tracer(self.calls, self.num_sequences, self._witness_tokens.shape[0])

        def drive(index: int, args: Tree, kwargs: Tree) -> Tree:
            if index != len(self.calls):
                raise UnsupportedModel("this model does not call each of its blocks once, in order")
            if index < len(stored):
                call = stored[index]
                tracer.learn((call.args, call.kwargs), (args, kwargs))
                self.calls.append(call)
            else:
                self.calls.append(self._traced(args, kwargs, tracer))
                self._run_block(index, visit, done)
                self._save_calls(self.calls)
            stand_ins = self.calls[index].stand_ins(self.num_sequences, poison)
            tracer.learn(self.calls[index].result, stand_ins)
            return stand_ins

        self._drive(self.tokens, drive)
        if len(self.calls) != self.num_blocks:
            raise UnsupportedModel("this model does not call each of its blocks once, in order")
        self._check_head()
        self.drop_ends()

    def _traced(self, args: Tree, kwargs: Tree, tracer: Tracer) -> BlockCall:
        """The call of the next block; arrays that it is the first to take are kept on disk."""
        index = len(self.calls)
        linked, fresh = tracer.trace((args, kwargs), self._witness(tracer))
        call = BlockCall(*linked)
        call.encode()  # refuses what cannot be followed before any work is done
        if fresh:
            save_arrays(self._taken_file(index), _named(fresh))
        return call

    def _witness(self, tracer: Tracer) -> Tree:
        """What the next block is given for other sequences, with noise for earlier outputs."""
        tokens = self._witness_tokens

        def drive(index: int, args: Tree, kwargs: Tree) -> Tree:
            if index == len(self.calls):
                raise _Reached((args, kwargs))
            return self.calls[index].stand_ins(tokens.shape[0], noise)

        try:
            self._drive(tokens, drive)
        except _Reached as reached:
            return reached.given
        raise tracer.unknown()

    def _run_block(
        self,
        index: int,
        visit: Callable[[list[Call]], None] | None,
        done: Callable[[int, nn.Module], None] | None,
    ) -> None:
        block = self.load_block(index)
        call = self.calls[index]
        arrays = {link: self.fetch(link) for link in call.inputs()}
        outputs: list[list[mx.array]] = []
        with tapped(block, f"{self.prefix}.{index}.", self.source.modules) as taps:
            for rows in self.batches():
                taps.start(gradients=False)
                given = {link: _rows_of(link, array, rows) for link, array in arrays.items()}
                call.result, leaves = collected(run_block(block, call, given))
                mx.eval(leaves)
                outputs.append(leaves)
                if visit is not None:
                    visit(taps.calls)
        if done is not None:
            done(index, block)
        sizes = [len(range(*rows.indices(self.num_sequences))) for rows in self.batches()]
        merged = merged_outputs(index, outputs, sizes)
        call.settle(merged)
        save_arrays(self._file(index), _named(merged))
        self.drop_block(index)

    def batches(self) -> Iterator[slice]:
        """Slices of sequences that make a micro-batch."""
        for start in range(0, self.num_sequences, self.batch):
            yield slice(start, min(start + self.batch, self.num_sequences))

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
        arrays = {link: self.fetch(link) for link in call.inputs()}
        links = call.links()
        live = [link for link in call.outputs() if link in cotangents]
        pulled: list[list[mx.array]] = []
        with tapped(block, f"{self.prefix}.{index}.", self.source.modules) as taps:
            for rows in self.batches():
                taps.start(gradients=True)
                given = {link: _rows_of(link, array, rows) for link, array in arrays.items()}

                def run(*inputs: mx.array, given: dict[Link, mx.array] = given) -> list[mx.array]:
                    named = given | dict(zip(links, inputs, strict=True))
                    _, leaves = collected(run_block(block, call, named))
                    return [leaves[link.leaf] for link in live]

                seeds = [cotangents[link][rows] for link in live]
                _, grads = mx.vjp(run, [given[link] for link in links], seeds)
                mx.eval(grads)
                pulled.append(list(grads))
                visit(rows, taps.calls)
        for link in live:
            del cotangents[link]
        for link, pieces in zip(links, zip(*pulled, strict=True), strict=True):
            total = mx.concatenate(list(pieces))
            cotangents[link] = cotangents[link] + total if link in cotangents else total
        mx.eval(list(cotangents.values()))
        self.drop_block(index)

    # -- ends ------------------------------------------------------------------------------------

    def outputs(self) -> list[Link]:
        """Links of the floating outputs of the last block, which the head reads."""
        return [link for link in self.calls[-1].outputs() if link.is_differentiable]

    def logits(
        self, rows: slice, outputs: Sequence[mx.array], positions: slice = slice(None)
    ) -> mx.array:
        """What the model makes of the last block's outputs: (n, T, V); the ends must be loaded.

        Args:
            rows: the sequences.
            outputs: arrays for `outputs()`, sliced to those rows and positions.
            positions: of the sequences; the logits of each must depend on no other.
        """
        size = len(range(*rows.indices(self.num_sequences)))
        given = dict(zip(self.outputs(), outputs, strict=True))

        def fill(shape: tuple[int, ...], dtype: mx.Dtype, link: Link) -> mx.array:
            return given[link] if link in given else poison(shape, dtype)

        def drive(index: int, args: Tree, kwargs: Tree) -> Tree:  # noqa: ARG001  any block
            return self.calls[index].stand_ins(size, fill)

        return self._drive(self.tokens[rows, positions], drive)

    def _check_head(self) -> None:
        """Refuse a model whose logits need more of the blocks than what the last one returns."""
        one = slice(0, 1)
        last = [mx.zeros_like(self.fetch(link)[one]) for link in self.outputs()]
        with HeadSlices(self.model, self.source.modules).slice(0, 1):
            logits = self.logits(one, last)
        if mx.isnan(logits).any().item():
            raise UnsupportedModel(
                "the logits of this model are computed from more than what its last block returns; "
                "optiq does not follow that"
            )

    def prologue(self, rows: slice, links: Sequence[Link]) -> list[mx.array]:
        """The arrays made before the blocks for some sequences, as a differentiable function."""
        size = len(range(*rows.indices(self.num_sequences)))
        found: dict[Link, mx.array] = {}

        def note(link: Any, value: Any) -> None:  # noqa: ANN401  any leaf
            if isinstance(link, Link) and not link.is_output:
                found[link] = value

        def drive(index: int, args: Tree, kwargs: Tree) -> Tree:
            call = self.calls[index]
            map_tree(note, (call.args, call.kwargs), (args, kwargs))
            return call.stand_ins(size, poison)

        self._drive(self.tokens[rows], drive)
        return [found[link] for link in links]


def _named(arrays: dict[Link, mx.array]) -> dict[str, mx.array]:
    return {f"{link.kind}.{link.leaf}": array for link, array in arrays.items()}


def _share(theirs: Path, mine: Path) -> None:
    """One file under two names; files here are replaced, never written over."""
    mine.unlink(missing_ok=True)
    try:
        os.link(theirs, mine)
    except OSError:
        shutil.copyfile(theirs, mine)
