"""Round every matrix of a plan, streaming the source once for the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from optiq.artifacts import (
    LATTICE_GROUP_SIZE,
    BitPlan,
    ModuleInfo,
    PlanEntry,
    QuantOption,
    Rounding,
)
from optiq.backend import is_cpu, mx, save_arrays
from optiq.errors import ArtifactMismatch
from optiq.events import Emit, Progress, StageDone, StageStarted, track
from optiq.models.head import HeadSlices
from optiq.models.load import Source
from optiq.models.stream import StreamedModel
from optiq.models.taps import Call, tapped
from optiq.numerics.affine import Grid, decode, encode, grouped, pack
from optiq.numerics.lattice import BITS, find_lattice
from optiq.quant.grams import GramStore
from optiq.quant.quantizers import device, gptq, rtn, search
from optiq.quant.quantizers.base import FloatArray, Inputs, Packed


class RoundedModel:
    """The quantized tensors of a plan, one file per block in the work directory.

    Args:
        source: the model.
        plan: an option for every module.
        tokens: (N, T) int32 calibration windows; they give the statistics of the inputs.
        work: directory for activations and finished blocks; a killed run goes on from there.
        emit: receives progress.

    Cost: one forward pass over the tokens, and rows x in^2 multiply-adds a matrix for GPTQ.
    """

    def __init__(
        self, source: Source, plan: BitPlan, tokens: npt.NDArray[np.int32], work: Path, emit: Emit
    ) -> None:
        self.source, self.rounding, self._emit = source, plan.rounding, emit
        self.entries = {entry.path: entry for entry in plan.entries}
        missing = [info.path for info in source.modules if info.path not in self.entries]
        if missing or len(self.entries) != len(source.modules):
            raise ArtifactMismatch(
                f"the plan is for another model: it says nothing of {missing[:1] or 'some modules'}"
            )
        self._infos = {info.path: info for info in source.modules}
        self._work = work
        self._tokens = tokens
        self._grams = GramStore()

    def run(self) -> dict[str, Path]:
        """Round everything; returns the file that holds each module's tensors, by module path."""
        files: dict[str, Path] = {}
        stream = StreamedModel(self.source, mx.array(self._tokens), self._work / "activations")
        inside = f"{stream.prefix}."
        self._emit(StageStarted("round", stream.num_blocks + 1, "blocks"))

        def done(index: int, _block: object) -> None:
            weights = self.source.weights()
            tensors: dict[str, mx.array] = {}
            for paths, matrix in self._grams.groups():
                tensors |= self._round_group(paths, np.array(matrix), weights)
            self._grams.clear()
            unseen = {
                info.path
                for info in self.source.modules
                if info.path.startswith(f"{inside}{index}.")
                and f"{info.path}.weight" not in tensors
            }
            for path in sorted(unseen):
                tensors |= self._round_unseen(path, weights)
            save_arrays(self._file(index), tensors)
            self._emit(Progress("round", index + 1))

        stream.forward(self._add, done)
        for index in range(stream.num_blocks):
            files |= {
                p: self._file(index) for p in self._infos if p.startswith(f"{inside}{index}.")
            }
        ends = self._work / "rounded_ends.safetensors"
        if not ends.is_file():
            self._round_ends(stream, ends)
        files |= {p: ends for p in self._infos if not p.startswith(inside)}
        self._emit(StageDone("round"))
        return files

    def _add(self, calls: list[Call]) -> None:
        """Sum up the inputs of matrices that will be rounded."""
        self._grams.add([call for call in calls if is_rounded(self.entries[call.path])])

    def _file(self, index: int) -> Path:
        return self._work / f"rounded_{index:04d}.safetensors"

    def _round_group(
        self, paths: list[str], matrix: FloatArray, weights: dict[str, mx.array]
    ) -> dict[str, mx.array]:
        """Tensors of the matrices that read the same inputs; they share one factorization."""
        quantize = quantizer(self.rounding, matrix, matrix.shape[0])
        tensors: dict[str, mx.array] = {}
        for path in paths:
            entry, weight = self.entries[path], weights[f"{path}.weight"]
            tensors |= rounded_tensors(self._infos[path], entry, weight, quantize, self.source)
        return tensors

    def _round_unseen(self, path: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of a matrix whose inputs are rows of an embedding, or never came."""
        info, entry = self._infos[path], self.entries[path]
        quantize = quantizer(self.rounding, None, info.in_dims) if is_rounded(entry) else None
        return rounded_tensors(info, entry, weights[f"{path}.weight"], quantize, self.source)

    def _round_ends(self, stream: StreamedModel, file: Path) -> None:
        """Embeddings, head and other matrices outside the blocks."""
        grams = end_statistics(stream, self.source)
        outside = [i for i in self.source.modules if not i.path.startswith(f"{stream.prefix}.")]
        weights = self.source.weights()
        tensors: dict[str, mx.array] = {}
        for paths, matrix in grams.groups():
            tensors |= self._round_group(paths, np.array(matrix), weights)
        for info in outside:
            if f"{info.path}.weight" not in tensors:
                tensors |= self._round_unseen(info.path, weights)
        save_arrays(file, tensors)
        self._emit(Progress("round", stream.num_blocks + 1))


def is_rounded(entry: PlanEntry) -> bool:
    """Whether an option moves weights; a lattice and `keep` do not."""
    return entry.option.kind not in ("keep", "lattice")


def round_without_data(source: Source, plan: BitPlan, file: Path, emit: Emit) -> dict[str, Path]:
    """Round the matrices of a model that cannot run alone; every input counts the same.

    Args:
        source: the model.
        plan: an option for every module.
        file: takes the tensors.
        emit: receives progress.

    Returns:
        `file` for every module path.
    """
    entries = {entry.path: entry for entry in plan.entries}
    weights = source.weights()
    tensors: dict[str, mx.array] = {}
    for info in track(source.modules, emit, "round", len(source.modules), "matrices"):
        entry, weight = entries[info.path], weights.pop(f"{info.path}.weight")
        quantize = quantizer(plan.rounding, None, info.in_dims) if is_rounded(entry) else None
        tensors |= rounded_tensors(info, entry, weight, quantize, source)
    save_arrays(file, tensors)
    return dict.fromkeys(entries, file)


def end_statistics(stream: StreamedModel, source: Source) -> GramStore:
    """Gram matrices of the inputs of the head and of other linears outside the blocks.

    Embeddings have none: their inputs are token ids.

    Args:
        stream: the source, run forward.
        source: the source.
    """
    grams = GramStore()
    model = stream.load_ends()
    head = HeadSlices(model, source.modules)
    outside = [i for i in source.modules if not i.path.startswith(f"{stream.prefix}.")]
    links = stream.outputs()
    outputs = [stream.fetch(link) for link in links]
    before = list(dict.fromkeys(n for call in stream.calls for n in call.links()))
    before = [link for link in before if link.kind == "pro"]
    with head.slice(0, 1), tapped(model, "", outside) as taps:
        for rows in stream.batches():
            taps.start(gradients=False)
            mx.eval(stream.logits(rows, [o[rows] for o in outputs]))
            grams.add([c for c in taps.calls if c.path == head.info.path])
    others = [i for i in outside if i.path != head.info.path and i.role != "embedding"]
    if others:
        with tapped(model, "", others) as taps:
            for rows in stream.batches():
                taps.start(gradients=False)
                stream.prologue(rows, before)
                grams.add(taps.calls)
    stream.drop_ends()
    return grams


RowQuantizer = Callable[[mx.array, QuantOption, str], tuple[mx.array, Grid]]


def quantizer(rounding: Rounding, gram: FloatArray | None, in_dims: int) -> RowQuantizer:
    """A function that rounds rows that read given inputs: (codes (rows, in) uint8, grid).

    Args:
        rounding: which rounding.
        gram: Gram matrix of the inputs, (in, in); None where they are not known: then every input
            counts the same, and there is no error to feed forward.
        in_dims: length of a row.
    """
    feedback = rounding == "gptq" and gram is not None
    matrix = np.eye(in_dims, dtype=np.float32) if gram is None else gram
    if not is_cpu():
        known = device.device_inputs(matrix, feedback=feedback)
        return lambda w, option, dtype: device.quantize(w, option, known, dtype, rounding)
    inputs = Inputs(matrix)
    if feedback:
        back = gptq.feedback(matrix)
        return _on_host(lambda w, o, dtype: gptq.quantize_with(w, o, inputs, dtype, back))
    plain = rtn.quantize if rounding == "rtn" else search.quantize
    return _on_host(lambda w, option, dtype: plain(w, option, inputs, dtype))


def _on_host(quantize: Callable[[FloatArray, QuantOption, str], Packed]) -> RowQuantizer:
    def run(w: mx.array, option: QuantOption, dtype: str) -> tuple[mx.array, Grid]:
        packed = quantize(np.array(w), option, dtype)
        return mx.array(packed.codes), Grid(mx.array(packed.scales), mx.array(packed.biases))

    return run


_CHUNK_WEIGHTS = 1 << 25


def rounded_tensors(
    info: ModuleInfo,
    entry: PlanEntry,
    weight: mx.array,
    quantize: RowQuantizer | None,
    source: Source,
) -> dict[str, mx.array]:
    """The stored tensors of one module: `weight`, and `scales` and `biases` when quantized.

    Args:
        info: the module.
        entry: its option.
        weight: (..., in) in the source dtype.
        quantize: rounds (rows, in) float32 matrices; from `quantizer`. Needed where the option
            `is_rounded`.
        source: gives the stored dtype.
    """
    option = entry.option
    if option.kind == "keep":
        return {f"{info.path}.weight": weight}
    packed, scales, biases = [], [], []
    for codes, grid in _parts(info, option, weight, quantize, source):
        packed.append(pack(codes, option.bits))
        scales.append(grid.scales)
        biases.append(grid.biases)
        mx.eval(packed[-1], *grid)
    lead = weight.shape[:-1]
    words = mx.concatenate(packed).reshape(*lead, -1)
    grid = Grid(
        mx.concatenate(scales).reshape(*lead, -1), mx.concatenate(biases).reshape(*lead, -1)
    )
    return _stored(info, words, grid, source.dtype)


def dense_rounded(
    info: ModuleInfo, option: QuantOption, weight: mx.array, quantize: RowQuantizer, source: Source
) -> mx.array:
    """A module's weights after rounding to an option: float32, shaped like `weight`."""
    if option.kind == "keep":
        return weight.astype(mx.float32)
    dense = mx.zeros((weight.size // info.in_dims, info.in_dims), dtype=mx.float32)
    start = 0
    for codes, grid in _parts(info, option, weight, quantize, source):
        stop = start + codes.shape[0]
        dense[start:stop] = decode(grouped(codes, option.group_size), grid).reshape(codes.shape)
        mx.eval(dense)  # in place, so that there are never two of it
        start = stop
    return dense.reshape(weight.shape)


def _parts(
    info: ModuleInfo,
    option: QuantOption,
    weight: mx.array,
    quantize: RowQuantizer | None,
    source: Source,
) -> Iterator[tuple[mx.array, Grid]]:
    """The rounded rows of a module, a slice of bounded size at a time."""
    rows = weight.reshape(-1, info.in_dims)
    grid = _lattice_grid(info, rows, source) if option.kind == "lattice" else None
    step = max(1, _CHUNK_WEIGHTS // info.in_dims)
    for start in range(0, rows.shape[0], step):
        stop = start + step
        part = rows[start:stop].astype(mx.float32)
        if grid is None:
            assert quantize is not None
            yield quantize(part, option, source.info.dtype)
        else:
            own = Grid(grid.scales[start:stop], grid.biases[start:stop])
            yield encode(grouped(part, LATTICE_GROUP_SIZE), own, BITS).reshape(part.shape), own


def _lattice_grid(info: ModuleInfo, rows: mx.array, source: Source) -> Grid:
    """The grid that the rows of a module lie on."""
    lattice = find_lattice(rows, source.dtype)
    if lattice is None:
        raise ArtifactMismatch(
            f"{info.path} lies on no grid, so 'lattice' is not possible; plan it again"
        )
    return lattice.grid


def _stored(info: ModuleInfo, words: mx.array, grid: Grid, dtype: mx.Dtype) -> dict[str, mx.array]:
    tensors = {
        f"{info.path}.weight": words,
        f"{info.path}.scales": grid.scales.astype(dtype),
        f"{info.path}.biases": grid.biases.astype(dtype),
    }
    mx.eval(tensors)
    return tensors
