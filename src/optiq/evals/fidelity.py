"""The judge: how far a model directory is from its source, on held-out text.

Both models are streamed block by block over the same windows, in float32 and with dense weights, so
that only the rounding of the weights is measured. Then their heads are held together and the logits
are compared a piece of a window at a time: no more of them is ever held.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from optiq.artifacts import DomainFidelity, Fidelity
from optiq.backend import compute_dtype, mx
from optiq.configs import JudgeConfig
from optiq.data.calibration import Record, Windows, windows
from optiq.errors import EngineFailure, UnsupportedModel, UsageError
from optiq.evals.depth import depth
from optiq.evals.provenance import provenance
from optiq.events import Emit, Notice, Progress, StageDone, StageStarted, no_emit, track
from optiq.models.head import head_of
from optiq.models.load import (
    Source,
    context_length,
    open_quantized,
    size_on_disk,
    stored_bpw,
)
from optiq.models.stream import StreamedModel
from optiq.numerics.divergence import Divergence, clustered_mean, divergence

_FLOOR_WINDOWS = 4
_MOST_LOGITS = 1 << 26  # of a model at a time: 268 MB; 256 positions of a large vocabulary
_SEED = 0


def judge(
    model: Path,
    source: Source,
    records: Sequence[Record],
    config: JudgeConfig,
    work: Path,
    emit: Emit,
) -> Fidelity:
    """Fidelity of one model directory; see `judge_many`."""
    (result,) = judge_many([model], source, records, config, work, emit)
    return result


def judge_many(
    models: Sequence[Path],
    source: Source,
    records: Sequence[Record],
    config: JudgeConfig,
    work: Path,
    emit: Emit,
) -> list[Fidelity]:
    """Fidelity of several model directories, on one run of the source.

    Args:
        models: MLX model directories.
        source: the model they were made from.
        records: held-out text.
        config: window and number of windows; `config.text` names the text in the result.
        work: directory for activations; a killed run goes on from there, a finished one leaves
            nothing in it.
        emit: receives progress.

    Returns:
        One result a directory, in order. The noise floor is the mean KL between the source and
        itself on a few of the windows: run again in the precision it is stored in, or on the CPU,
        where half precision is not to be trusted, in float32 with another number of rows a product.

    Raises:
        UsageError: if a directory is no quantized form of the source, the text is too short, or the
            window is longer than the model's context.
        EngineFailure: if a model gives logits that are not finite.

    Cost: one forward pass of the source and of each model. Memory of one block, or of two heads and
        67M logits of each; the activations of two models on disk.
    """
    chosen = _chosen(records, source, config, emit)
    opened = [_opened(path, source) for path in models]
    reference = _stream(source, chosen.tokens, work)
    _forward(reference, emit, f"source on {len(chosen.tokens)} windows")
    floor = _noise_floor(reference, work, emit)
    results = []
    for path, quantized in zip(models, opened, strict=True):
        stream = _stream(quantized, chosen.tokens, work)
        _forward(stream, emit, f"{path.name} on the same")
        rows = [slice(i, i + 1) for i in range(stream.num_sequences)]
        found = _compare(reference, stream, rows, rows, emit)
        stream.close()
        result = _fidelity(path, source, config, chosen, found, floor)
        if config.deep:
            languages = [record.language for record in records]
            where = depth(found, chosen, languages, source.tokenizer)
            result = dataclasses.replace(result, depth=where)
        results.append(result)
    reference.close()
    return results


def _chosen(records: Sequence[Record], source: Source, config: JudgeConfig, emit: Emit) -> Windows:
    """The windows to judge on.

    Raises:
        UsageError: if they are longer than the context or the text.
    """
    context = context_length(source.config)
    if context is not None and config.window > context:
        raise UsageError(
            f"--window {config.window} is longer than the {context} tokens that "
            f"{source.info.name} can read; give at most {context}"
        )
    chosen = windows(
        records,
        source.tokenizer,
        source.config,
        window=config.window,
        count=config.max_windows,
        seed=_SEED,
    )
    left_out = set(dict.fromkeys(record.domain for record in records)) - set(chosen.domains)
    if left_out:
        emit(
            Notice(
                f"not judged, for want of a window of text or of --max-windows: "
                f"{', '.join(sorted(left_out))}",
                "warning",
            )
        )
    return chosen


def _opened(path: Path, source: Source) -> Source:
    """A model directory as dense weights.

    Raises:
        UsageError: if it is not of the source's shape.
    """
    quantized = open_quantized(path)
    if quantized.parameters != source.parameters:
        raise UsageError(
            f"{path} is not made from {source.info.name}: their tensors differ; give the source it "
            "was converted from with --against"
        )
    return quantized


def _stream(
    source: Source, tokens: npt.NDArray[np.int32], work: Path, tag: str = ""
) -> StreamedModel:
    """A model in float32, whose activations lie in a folder of its files, the tokens and a tag."""
    files = [
        (f.name, f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(source.path.glob("model*.safetensors"))
    ]
    key = repr((str(source.path.resolve()), files, tokens.shape, tag)).encode() + tokens.tobytes()
    folder = work / f"judge-{hashlib.sha256(key).hexdigest()[:16]}"
    stream = StreamedModel(source, mx.array(tokens), folder)
    stream.dtype = mx.float32
    return stream


def _forward(stream: StreamedModel, emit: Emit, stage: str) -> None:
    emit(StageStarted(stage, stream.num_blocks, "blocks"))
    stream.forward(done=lambda index, _: emit(Progress(stage, index + 1)))
    emit(StageDone(stage))


def _noise_floor(reference: StreamedModel, work: Path, emit: Emit) -> float:
    """Mean KL of the source against itself, in the precision the device computes it in."""
    count = min(_FLOOR_WINDOWS, reference.num_sequences)
    chosen = np.linspace(0, reference.num_sequences - 1, count).round().astype(np.int64)
    tokens = np.array(reference.tokens)[chosen]
    again = _stream(reference.source, tokens, work, "floor")
    again.dtype = compute_dtype(reference.source.dtype)
    again.batch = 1 if reference.batch > 1 else 2
    _forward(again, emit, "noise floor")
    rows = [slice(int(i), int(i) + 1) for i in chosen]
    found = _compare(reference, again, rows, [slice(n, n + 1) for n in range(count)], no_emit)
    again.close()
    return float(found.kl.mean(dtype=np.float64))


def _compare(
    reference: StreamedModel,
    other: StreamedModel,
    rows: Sequence[slice],
    other_rows: Sequence[slice],
    emit: Emit,
) -> Divergence:
    """Divergence of two models that have run, window by window: row i against other row i.

    Raises:
        EngineFailure: if logits are not finite.
        UnsupportedModel: if a window must be cut and the logits depend on more than their position.
    """
    reference.load_ends()
    other.load_ends()
    window = reference.window
    step = min(window, max(1, _MOST_LOGITS // head_of(reference.source.modules).shape[0]))
    parts: list[Divergence] = []
    pairs = list(zip(rows, other_rows, strict=True))
    for row, other_row in track(pairs, emit, "compare", len(pairs), "windows"):
        ours, theirs = _LastOutputs(reference, row), _LastOutputs(other, other_row)
        if step < window and not parts:
            ours.check_cut(step)
        pieces = [
            divergence(
                ours.logits(slice(start, start + step)),
                theirs.logits(slice(start, start + step)),
                reference.tokens[row, start : start + step + 1],
            )
            for start in range(0, window, step)
        ]
        parts.append(_joined(pieces, axis=1))
    reference.drop_ends()
    other.drop_ends()
    found = _joined(parts, axis=0)
    if not np.isfinite(found.kl).all():
        raise EngineFailure(
            f"{reference.source.info.name} or {other.source.info.name} gives logits that are not "
            "finite on the held-out text; check the source and convert it again"
        )
    return found


def _joined(parts: Sequence[Divergence], axis: int) -> Divergence:
    return Divergence(*(np.concatenate(column, axis) for column in zip(*parts, strict=True)))


class _LastOutputs:
    """What the head of a model that has run reads of some windows."""

    def __init__(self, stream: StreamedModel, row: slice) -> None:
        self._stream, self._row = stream, row
        self._outputs = [stream.fetch(link)[row] for link in stream.outputs()]

    def logits(self, positions: slice) -> mx.array:
        """Logits at some positions."""
        window = self._stream.window
        cut = [
            array[:, positions] if array.ndim > 1 and array.shape[1] == window else array
            for array in self._outputs
        ]
        return self._stream.logits(self._row, cut, positions)

    def check_cut(self, at: int) -> None:
        """Refuse a head whose logits at a position depend on others.

        Raises:
            UnsupportedModel: if they do.
        """
        before, after = slice(at - 1, at), slice(at, at + 1)
        whole = self.logits(slice(at - 1, at + 1))
        halves = mx.concatenate([self.logits(before), self.logits(after)], axis=1)
        if not mx.allclose(whole, halves, rtol=1e-3, atol=1e-3, equal_nan=True).item():
            raise UnsupportedModel(
                "the logits of this model at one position depend on other positions, so a window "
                "cannot be judged in pieces; give a shorter --window"
            )


def _fidelity(
    path: Path,
    source: Source,
    config: JudgeConfig,
    chosen: Windows,
    found: Divergence,
    floor: float,
) -> Fidelity:
    kl = clustered_mean(found.kl)
    log_ratio = found.nll_q.mean(dtype=np.float64) - found.nll_p.mean(dtype=np.float64)
    name = config.text or "built-in held-out corpus"
    return Fidelity(
        model=str(path),
        against=source.info.name,
        text=f"{name} ({chosen.digest[:16]})",
        window=config.window,
        num_sequences=len(chosen.tokens),
        num_tokens=int(found.kl.size),
        kl_nats_per_token=kl.mean,
        kl_se=kl.stderr,
        kl_p99=float(np.quantile(found.kl, 0.99)),
        top1_agreement=float(found.agree.mean()),
        perplexity_ratio=float(np.exp(log_ratio)),
        noise_floor=floor,
        bpw=stored_bpw(path, source.modules),
        size_bytes=size_on_disk(path),
        by_domain=_by_domain(chosen.domains, found),
        provenance=provenance(),
    )


def _by_domain(domains: Sequence[str], found: Divergence) -> tuple[DomainFidelity, ...]:
    out = []
    for domain in dict.fromkeys(domains):
        member = np.array([name == domain for name in domains])
        kl = clustered_mean(found.kl[member])
        out.append(
            DomainFidelity(
                domain=domain,
                kl_nats_per_token=kl.mean,
                kl_se=kl.stderr,
                top1_agreement=float(found.agree[member].mean()),
                num_tokens=int(found.kl[member].size),
            )
        )
    return tuple(out)
