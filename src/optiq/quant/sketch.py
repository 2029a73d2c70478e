"""The streamed Fisher sketch: KL of every option of every module from one backward pass.

At the source model the gradient of KL(p_source || p) is zero and its Hessian is the Fisher matrix.
For a probe v at the logits with covariance diag(p) - p p^T at every token, the random number
s = <dL/dW, W - Q(W)> of L = sum_t v_t . z_t has E[s^2] = 2 KL, summed over the T tokens of the
sequence. One backward pass gives dL/dW = g^T x of every matrix, so s for every option.

Passes: F runs the blocks forward; H runs the head in slices of the vocabulary; B walks the blocks
backwards and measures what the final rounding changes (`quant.ratios`). Each block is a checkpoint.

Reference: second-order expansion as in HAWQ and GuidedQuant (arXiv 2505.07004); differs: the sum
over the sequence is kept before squaring, which keeps all cross terms, and no layer is treated
alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optiq.artifacts import LATTICE, ModuleInfo, QuantOption, menu
from optiq.backend import array_note, is_cpu, load_arrays, mx, save_arrays
from optiq.configs import MeasureConfig
from optiq.events import Emit, Progress, StageDone, StageStarted
from optiq.models.head import HeadSlices
from optiq.models.load import Source
from optiq.models.stream import Link, StreamedModel
from optiq.models.taps import Call, tapped
from optiq.numerics.affine import Grid, decode, encode, grouped, minmax_grid
from optiq.numerics.lattice import BITS, Lattice, find_lattice
from optiq.quant.grams import GramStore
from optiq.quant.kept_calls import KeptCalls
from optiq.quant.ratios import (
    Sampled,
    at_columns,
    rounding_errors,
    sampled_columns,
    sampled_rows,
    squared_lookups,
    squared_sums,
)

FloatArray = npt.NDArray[np.float32]
_CHUNK_WEIGHTS = 1 << 19 if is_cpu() else 1 << 23  # cache of a core; launches of a GPU
_VOCAB_SLICE = 4096


@dataclasses.dataclass
class UseScores:
    """What the sketch knows of one way in which a module is used.

    Attributes:
        s: (num_sequences, num_options) float32, <dL/dW, W - Q(W)> for min/max rounding.
        sums: (2, num_options) float32, s^2 on sampled rows by min/max rounding and by the final
            one, summed over sequences and rows; zero where nothing was sampled.
    """

    s: FloatArray
    sums: FloatArray

    @classmethod
    def empty(cls, num_sequences: int, num_options: int) -> UseScores:
        """Zeros."""
        s = np.zeros((num_sequences, num_options), np.float32)
        return cls(s, np.zeros((2, num_options), np.float32))

    @property
    def ratios(self) -> FloatArray:
        """(num_options,) float32, KL of the final rounding over that of min/max rounding."""
        before, after = self.sums
        ratios: FloatArray = np.divide(after, before, out=np.ones_like(after), where=before > 0)
        return ratios


@dataclasses.dataclass
class Scores:
    """What the sketch knows of one module.

    Attributes:
        options: affine options, then the lattice where there is one.
        lattice: the grid found in the weights, if any.
        products: of the module as a matrix that inputs are multiplied by.
        lookups: of the module as a table of rows. A tied embedding is both, and error feedback,
            which goes by the inputs of the products, does little for them.
    """

    options: tuple[QuantOption, ...]
    lattice: Lattice | None
    products: UseScores
    lookups: UseScores

    @property
    def s(self) -> FloatArray:
        """(num_sequences, num_options) float32, of min/max rounding."""
        return self.products.s + self.lookups.s

    @property
    def scaled(self) -> FloatArray:
        """(num_sequences, num_options) float32, of the final rounding."""
        products, lookups = (use.s * np.sqrt(use.ratios) for use in (self.products, self.lookups))
        scaled: FloatArray = products + lookups
        return scaled

    @property
    def is_scaled(self) -> npt.NDArray[np.bool_]:
        """(num_options,), whether the final rounding differs from min/max rounding."""
        scaled: npt.NDArray[np.bool_] = (self.products.ratios != 1) | (self.lookups.ratios != 1)
        return scaled


def options_of(info: ModuleInfo, lattice: Lattice | None) -> tuple[QuantOption, ...]:
    """Options that are scored; `keep` costs nothing and is not among them."""
    affine = menu(info.in_dims)
    return affine if lattice is None else (*affine, LATTICE)


def deltas(
    w: mx.array, options: Sequence[QuantOption], lattice: Lattice | None, dtype: mx.Dtype
) -> mx.array:
    """W - Q(W) of every option with min/max rounding: (options, rows * in) float32.

    Args:
        w: (rows, in) float32.
        options: as `options_of` gives them.
        lattice: the grid of these rows, for `lattice`.
        dtype: stored dtype of scales and biases.
    """
    out = []
    for option in options:
        groups = grouped(w, option.group_size)
        if option.kind == "lattice":
            assert lattice is not None
            grid, bits = lattice.grid, BITS
        else:
            grid, bits = minmax_grid(groups, option.bits, dtype), option.bits
        out.append((groups - decode(encode(groups, grid, bits), grid)).reshape(-1))
    return mx.stack(out)


@dataclasses.dataclass(frozen=True)
class _Use:
    """Inputs and output cotangents of a matrix for some sequences: (k, T, in) and (k, T, out)."""

    first: int
    x: mx.array
    g: mx.array


def _accumulate(
    s: FloatArray, w: mx.array, uses: Sequence[_Use], lattice: Lattice | None, scored: _Scored
) -> None:
    """Add <g^T x, W - Q(W)> of every sequence and option to `s`, a slice of rows at a time."""
    step = max(1, _CHUNK_WEIGHTS // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        d = deltas(w[rows], scored.options, lattice and _part(lattice, rows), scored.dtype)
        products = np.array(_gradients(uses, rows) @ d.T)
        done = 0
        for use in uses:
            count = use.x.shape[0]
            s[use.first : use.first + count] += products[done : done + count]
            done += count


def _gradients(uses: Sequence[_Use], rows: slice) -> mx.array:
    """g^T x of every sequence for some rows of the matrix: (sequences, rows * in) float32."""
    parts = []
    for use in uses:
        g, x = use.g[..., rows].astype(mx.float32), use.x.astype(mx.float32)
        gradient = g.swapaxes(-1, -2) @ x
        parts.append(gradient.reshape(gradient.shape[0], -1))
    return mx.concatenate(parts)


def _add_sums(
    score: UseScores, uses: Sequence[_Use], sampled: Sampled | None, first_row: int = 0
) -> None:
    """Add s^2 on the sampled rows, of outputs that begin at `first_row`."""
    if sampled is None:
        return
    for use in uses:
        _add(score.sums, squared_sums(sampled, use.g, use.x, first_row))


def _add(sums: FloatArray, parts: tuple[FloatArray, FloatArray]) -> None:
    """Add sums over the affine options, which come first."""
    for total, part in zip(sums, parts, strict=True):
        total[: len(part)] += part


@dataclasses.dataclass(frozen=True)
class _Scored:
    options: tuple[QuantOption, ...]
    dtype: mx.Dtype


def _exp(x: mx.array) -> mx.array:
    """Exp in float32; through numpy on the CPU, whose vectorized exp is ten times faster."""
    if is_cpu():
        return mx.array(np.exp(np.array(x, copy=False)))
    return mx.exp(x)


class Share(NamedTuple):
    """The part of a run's sequences that a process has.

    Attributes:
        first: number of its first sequence.
        group: the processes of the run.
        tokens: (M, T) int32, the windows of all of them.
    """

    first: int
    group: mx.distributed.Group
    tokens: npt.NDArray[np.int32]


class Sketch:
    """One run of the sketch over calibration windows.

    Args:
        source: the model.
        tokens: (N, T) int32 windows.
        work: directory for activations and checkpoints.
        config: the rounding the ratios are for, the seed of the probes, and the reference: with
            `uniform4` the model is linearized at its uniform 4-bit form instead of at itself, while
            scores remain distances from the source's weights.
        emit: receives progress.
        share: where several processes share a run; sequence n has the probe `first + n`.

    Cost: four forward passes' worth of products over N x T tokens, whatever the number of options.
    """

    def __init__(
        self,
        source: Source,
        tokens: npt.NDArray[np.int32],
        work: Path,
        config: MeasureConfig,
        emit: Emit,
        share: Share | None = None,
    ) -> None:
        self.source, self.work, self.config, self._emit = source, work, config, emit
        self.first = share.first if share else 0
        self._group = share.group if share and share.group.size() > 1 else None
        self.infos = {info.path: info for info in source.modules}
        overrides = self._uniform4 if config.reference == "uniform4" else None
        self.stream = StreamedModel(source, mx.array(tokens), work / "activations", overrides)
        self.num_sequences, self.window = tokens.shape
        self._all_tokens = share.tokens if share else tokens
        self.scores: dict[str, Scores] = {}
        self._grams = GramStore()

    def _uniform4(self, name: str, value: mx.array) -> mx.array:
        info = self.infos.get(name.removesuffix(".weight"))
        if info is None or info.in_dims % 64:
            return value
        groups = grouped(value.astype(mx.float32), 64)
        grid = minmax_grid(groups, 4, self.source.dtype)
        return decode(encode(groups, grid, 4), grid).reshape(value.shape)

    # -- checkpoints -----------------------------------------------------------------------------

    @property
    def _state_file(self) -> Path:
        return self.work / "state.safetensors"

    def _save_state(self, name: str, cotangents: dict[Link, mx.array]) -> None:
        """Everything the backward pass needs to go on below `name`, in one file."""
        arrays = {f"cot.{k.kind}.{k.index}.{k.leaf}": v for k, v in cotangents.items()}
        for path, score in self.scores.items():
            arrays[f"s.{path}"] = mx.array(score.products.s)
            arrays[f"sums.{path}"] = mx.array(score.products.sums)
        save_arrays(self._state_file, arrays, name)

    def _load_state(self) -> tuple[str, dict[str, mx.array]]:
        if not self._state_file.is_file():
            return "", {}
        return array_note(self._state_file), load_arrays(self._state_file)

    def _agree(self) -> None:
        """Let the processes of a run go on from the same point, the last that all have reached."""
        if self._group is None:
            return
        done, _ = self._load_state()
        reached = mx.array([self.stream.num_finished(), int(done or -1)])
        least = np.array(mx.distributed.all_min(reached, group=self._group))
        most = np.array(mx.distributed.all_max(reached, group=self._group))
        self.stream.forget(int(least[0]))
        if least[1] != most[1]:  # a state is overwritten by the next, so there is no going back
            self._state_file.unlink(missing_ok=True)

    # -- passes ----------------------------------------------------------------------------------

    def run(self) -> dict[str, Scores]:
        """Scores of every module, by path."""
        self._agree()
        self._forward()
        done, stored = self._load_state()
        total = self.stream.num_blocks
        cotangents: dict[Link, mx.array] = {}
        if not done:
            cotangents = self._head()
            self._save_state(str(total), cotangents)
            done = str(total)
        else:
            self._restore(stored, cotangents)
        self._emit(StageStarted("backward", total, "blocks"))
        for index in range(int(done) - 1, -1, -1):
            self._block(index, cotangents)
            self._save_state(str(index), cotangents)
            self._emit(Progress("backward", total - index))
        self._emit(StageDone("backward"))
        self._prologue(cotangents)
        return {info.path: self.scores[info.path] for info in self.source.modules}

    def _restore(self, stored: dict[str, mx.array], cotangents: dict[Link, mx.array]) -> None:
        for name, value in stored.items():
            kind, _, rest = name.partition(".")
            if kind == "cot":
                origin, index, leaf = rest.split(".")
                cotangents[Link(origin, int(index), int(leaf))] = value
            else:
                score = self._empty(self.infos[rest], self._weight(rest))
                getattr(score.products, kind)[:] = np.array(value)
        mx.eval(list(cotangents.values()))

    def _weight(self, path: str) -> mx.array:
        weight: mx.array = self.source.weights()[f"{path}.weight"]
        return weight

    def _empty(self, info: ModuleInfo, weight: mx.array) -> Scores:
        """The module's scores, begun at zero on first use."""
        if info.path not in self.scores:
            lattice = find_lattice(weight, self.source.dtype)
            options = options_of(info, lattice)
            products, lookups = (UseScores.empty(self.num_sequences, len(options)) for _ in "pl")
            self.scores[info.path] = Scores(options, lattice, products, lookups)
        return self.scores[info.path]

    def _forward(self) -> None:
        total = self.stream.num_blocks
        self._emit(StageStarted("forward", total, "blocks"))

        def done(index: int, _block: object) -> None:
            self._emit(Progress("forward", index + 1))

        self.stream.forward(None, done)
        self._emit(StageDone("forward"))

    def _signs(self, row: int, vocab_slice: int, shape: tuple[int, int]) -> mx.array:
        """Rademacher numbers of a sequence and a slice of the vocabulary: (T, slice)."""
        seeds = np.random.SeedSequence((self.config.seed, self.first + row, vocab_slice))
        size = -(-shape[0] * shape[1] // 8)
        words = mx.array(np.frombuffer(np.random.default_rng(seeds).bytes(size), np.uint8))
        bits = (words[:, None] >> mx.arange(8, dtype=mx.uint8)) & 1
        flat = bits.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
        return 1.0 - 2.0 * flat.astype(mx.float32)

    def _probe_signs(self, rows: slice, vocab_slice: int, shape: tuple[int, ...]) -> mx.array:
        one = (shape[1], shape[2])
        numbers = range(*rows.indices(self.num_sequences))
        return mx.stack([self._signs(n, vocab_slice, one) for n in numbers])

    def _head(self) -> dict[Link, mx.array]:
        """Pass H: probes at the logits, scores of the head, cotangents of the last block."""
        model = self.stream.load_ends()
        links = self.stream.outputs()
        outputs = [self.stream.fetch(link) for link in links]
        mx.eval(outputs)
        head = HeadSlices(model, self.source.modules)
        starts = range(0, head.vocab_size, _VOCAB_SLICE)
        self._emit(StageStarted("head", 2 * len(starts), "slices"))
        top, power, mixed = self._normalizers(head, outputs, starts)
        logsum = [t + mx.log(a) for t, a in zip(top, power, strict=True)]
        center = [b / mx.sqrt(a) for a, b in zip(power, mixed, strict=True)]
        mx.eval(logsum, center)
        pulled = [mx.zeros_like(o) for o in outputs]
        inputs = self._inputs()
        if head.info.tied:
            save_arrays(self._head_inputs, {"gram": inputs[0][1]})
        sampled = self._sampled(inputs).get(head.info.path)
        for count, start in enumerate(starts):
            uses: list[_Use] = []
            with head.slice(start, start + _VOCAB_SLICE), tapped(model, "", [head.info]) as taps:
                for n, rows in enumerate(self.stream.batches()):
                    given = [o[rows] for o in outputs]
                    logits = self.stream.logits(rows, given).astype(mx.float32)
                    signs = self._probe_signs(rows, start, logits.shape)
                    mx.eval(logits, signs)
                    root = _exp((logits - logsum[n][..., None]) / 2)
                    probe = root * signs - root * root * center[n][..., None]
                    taps.start(gradients=True)

                    def run(*h: mx.array, rows: slice = rows) -> mx.array:
                        return self.stream.logits(rows, h).astype(mx.float32)

                    _, grads = mx.vjp(run, given, [probe])
                    call = next(c for c in taps.calls if not c.lookup)
                    assert call.g is not None
                    use = _Use(rows.start, call.x.astype(mx.bfloat16), call.g.astype(mx.bfloat16))
                    mx.eval(grads, use.x, use.g)
                    for total, grad in zip(pulled, grads, strict=True):
                        total[rows] += grad
                    mx.eval(pulled)
                    uses.append(use)
            self._score_slice(head, start, uses, sampled)
            self._emit(Progress("head", len(starts) + count + 1))
        self.stream.drop_ends()
        self._emit(StageDone("head"))
        return dict(zip(links, pulled, strict=True))

    def _normalizers(
        self, head: HeadSlices, outputs: list[mx.array], starts: range
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        """Running maximum m, sum exp(z - m) and sum exp((z - m) / 2) * sign, by micro-batch."""
        batches = list(self.stream.batches())
        top: list[mx.array] = []
        power: list[mx.array] = []
        mixed: list[mx.array] = []
        for count, start in enumerate(starts):
            with (
                head.slice(start, start + _VOCAB_SLICE),
                tapped(self.stream.model, "", [head.info]) as taps,
            ):
                for n, rows in enumerate(batches):
                    taps.start(gradients=False)
                    given = [o[rows] for o in outputs]
                    logits = self.stream.logits(rows, given).astype(mx.float32)
                    if start == 0:
                        self._grams.add(_at_sampled_columns(taps.calls))
                        top.append(logits.max(axis=-1))
                        power.append(mx.zeros_like(top[n]))
                        mixed.append(mx.zeros_like(top[n]))
                    signs = self._probe_signs(rows, start, logits.shape)
                    high = mx.maximum(top[n], logits.max(axis=-1))
                    mx.eval(logits, signs, high)
                    root = _exp((logits - high[..., None]) / 2)
                    shrink = mx.exp((top[n] - high) / 2)
                    power[n] = power[n] * shrink * shrink + (root * root).sum(axis=-1)
                    mixed[n] = mixed[n] * shrink + (root * signs).sum(axis=-1)
                    top[n] = high
                    mx.eval(power[n], mixed[n])
            self._emit(Progress("head", count + 1))
        return top, power, mixed

    def _score_slice(
        self, head: HeadSlices, start: int, uses: list[_Use], sampled: Sampled | None
    ) -> None:
        info = head.info
        weight = self._weight(info.path)
        score = self._empty(info, weight)
        stop = min(start + _VOCAB_SLICE, info.shape[0])
        part = weight[start:stop].astype(mx.float32)
        lattice = score.lattice and _part(score.lattice, slice(start, stop))
        scored = _Scored(score.options, self.source.dtype)
        _accumulate(score.products.s, part, uses, lattice, scored)
        _add_sums(score.products, uses, sampled, start)

    def _inputs(self) -> list[tuple[list[str], mx.array]]:
        """(paths, Gram matrix) of the inputs that were collected, which are then forgotten."""
        if self._group is not None:
            self._grams.gather(self._group)
        inputs = list(self._grams.groups())
        self._grams.clear()
        return inputs

    def _sampled(self, inputs: list[tuple[list[str], mx.array]]) -> dict[str, Sampled]:
        """Rounding errors of the matrices that have these inputs."""
        weights = self.source.weights()
        found: dict[str, Sampled] = {}
        for paths, matrix in inputs:
            infos = [self.infos[path] for path in paths]
            own = [weights[f"{path}.weight"] for path in paths]
            found |= rounding_errors(
                infos, own, matrix, self.config.rounding, self.source.info.dtype
            )
        return found

    @property
    def _head_inputs(self) -> Path:
        """File of the Gram matrix of the head's inputs, which the lookups ask for at the end."""
        return self.work / "head_inputs.safetensors"

    def _looked_up(self, info: ModuleInfo) -> Sampled | None:
        """Rounding errors of rows that the tokens of the run use, by how often they do."""
        tokens = np.sort(self._all_tokens, axis=None)
        rows = np.unique(tokens[sampled_rows(tokens.size)]).astype(np.int64)
        columns = sampled_columns(info.in_dims)
        matrix = mx.eye(info.in_dims if columns is None else columns.size)
        if info.tied:
            matrix = load_arrays(self._head_inputs)["gram"]
        weight, dtype = self._weight(info.path), self.source.info.dtype
        found = rounding_errors([info], [weight], matrix, self.config.rounding, dtype, rows)
        return found.get(info.path)

    def _block(self, index: int, cotangents: dict[Link, mx.array]) -> None:
        """Pass B on one block."""
        kept = KeptCalls(self.stream.work)

        def visit(rows: slice, calls: list[Call]) -> None:
            self._grams.add(_at_sampled_columns([call for call in calls if call.g is not None]))
            kept.add(rows.start, calls)

        self.stream.backward(index, cotangents, visit)
        sampled = self._sampled(self._inputs())
        weights = self.source.weights()
        for path in kept.paths:
            weight = weights.pop(f"{path}.weight")
            self._score_module(self.infos[path], weight, kept.pop(path), sampled.pop(path, None))
        kept.close()

    def _score_module(
        self,
        info: ModuleInfo,
        weight: mx.array,
        calls: list[tuple[int, Call]],
        sampled: Sampled | None = None,
    ) -> None:
        score = self._empty(info, weight)
        scored = _Scored(score.options, self.source.dtype)
        if info.role == "expert":
            for expert in range(info.shape[0]):
                picked = [u for first, c in calls for u in _expert_uses(first, c, expert)]
                lattice = score.lattice and _part(score.lattice, expert)
                if picked:
                    part = weight[expert].astype(mx.float32)
                    _accumulate(score.products.s, part, picked, lattice, scored)
                    _add_sums(score.products, picked, sampled, expert * info.shape[1])
            return
        uses = []
        for first, call in calls:
            assert call.g is not None
            count = min(self.stream.batch, self.num_sequences - first)
            uses.append(
                _Use(
                    first,
                    call.x.reshape(count, -1, call.x.shape[-1]),
                    call.g.reshape(count, -1, call.g.shape[-1]),
                )
            )
        _accumulate(score.products.s, weight.astype(mx.float32), uses, score.lattice, scored)
        _add_sums(score.products, uses, sampled)

    def _prologue(self, cotangents: dict[Link, mx.array]) -> None:
        """Pass P: lookups and whatever else is computed before the blocks."""
        links = [link for link in cotangents if link.kind == "pro"]
        model = self.stream.load_ends()
        inside = f"{self.stream.prefix}."
        infos = [i for i in self.source.modules if not i.path.startswith(inside)]
        errors: dict[str, Sampled | None] = {}
        with tapped(model, "", infos) as taps:
            for rows in self.stream.batches():
                anchor = mx.array(0.0)
                taps.start(gradients=True, anchor=anchor)

                def run(zero: mx.array, rows: slice = rows) -> list[mx.array]:
                    taps.start(gradients=True, anchor=zero)
                    return self.stream.prologue(rows, links)

                mx.vjp(run, [anchor], [cotangents[link][rows] for link in links])
                for call in taps.calls:
                    if call.lookup and call.path not in errors:
                        errors[call.path] = self._looked_up(self.infos[call.path])
                    if call.g is not None:
                        self._score_prologue(rows, call, errors.get(call.path))
        self.stream.drop_ends()
        for info in infos:
            self._empty(info, self._weight(info.path))

    def _score_prologue(self, rows: slice, call: Call, sampled: Sampled | None) -> None:
        info = self.infos[call.path]
        weight = self._weight(call.path)
        score = self._empty(info, weight)
        if not call.lookup:
            self._score_module(info, weight, [(rows.start, call)])
            return
        assert call.g is not None
        g = call.g.astype(mx.float32)
        for n, ids in enumerate(np.array(call.x)):  # a sequence uses few rows of the table
            used, position = np.unique(ids, return_inverse=True)
            picked = mx.array(used)
            lattice = score.lattice and _part(score.lattice, picked)
            d = deltas(weight[picked].astype(mx.float32), score.options, lattice, self.source.dtype)
            gradient = mx.zeros((len(used), g.shape[-1])).at[mx.array(position)].add(g[n])
            score.lookups.s[rows.start + n] += np.array(d @ gradient.reshape(-1))
            if sampled is not None:
                _add(score.lookups.sums, squared_lookups(sampled, gradient, used))


def _at_sampled_columns(calls: Sequence[Call]) -> list[Call]:
    """Calls with the columns of their inputs that ratios look at; what shares inputs still does."""
    inputs: dict[int, mx.array] = {}
    for call in calls:
        if not call.lookup and id(call.x) not in inputs:
            inputs[id(call.x)] = at_columns(call.x, sampled_columns(call.x.shape[-1]))
    return [Call(call.path, inputs[id(call.x)]) for call in calls if not call.lookup]


def _part(lattice: Lattice, at: slice | int | mx.array) -> Lattice:
    """The lattice of some rows, or of one expert."""
    return Lattice(Grid(lattice.grid.scales[at], lattice.grid.biases[at]), lattice.report)


def _expert_uses(first: int, call: Call, expert: int) -> list[_Use]:
    """Rows routed to one expert; a micro-batch of a model with experts is one sequence."""
    assert call.g is not None
    assert call.indices is not None
    routed = np.flatnonzero(np.array(call.indices).reshape(-1) == expert)
    if routed.size == 0:
        return []
    g = call.g.reshape(-1, call.g.shape[-1])
    x = call.x.reshape(-1, call.x.shape[-1])
    repeats = g.shape[0] // x.shape[0]
    at = mx.array(routed)
    return [_Use(first, x[at // repeats][None], g[at][None])]
