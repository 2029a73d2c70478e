"""Brute force: the true KL of one module at one option, by running the model with it.

The judge of the sketch (`--verify`, `--method exact`). Only the blocks from the module's own on are
run again; what comes before them is taken from one run of the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.stats

from optiq.artifacts import ModuleInfo, ModuleScores, QuantOption, Rounding, SensitivityTable
from optiq.backend import load_arrays, mx, save_arrays
from optiq.events import Emit, no_emit, track
from optiq.models.head import head_of
from optiq.models.load import Source
from optiq.models.stream import StreamedModel
from optiq.numerics.divergence import clustered_mean, divergence
from optiq.quant.grams import GramStore
from optiq.quant.rounding import dense_rounded, end_statistics, quantizer

Pair = tuple[ModuleScores, QuantOption]


class ExactScores:
    """KL(source || source with one module quantized) on given windows.

    Args:
        source: the model; it is run in float32.
        tokens: (N, T) int32 windows.
        work: directory for activations; emptied by `close`.
        rounding: how the module is rounded, with the inputs of the same windows.

    Cost: for each score, the forward pass of the blocks from the module's own on, and two heads.
    """

    def __init__(
        self, source: Source, tokens: npt.NDArray[np.int32], work: Path, rounding: Rounding
    ) -> None:
        self._source, self._tokens, self._rounding = source, mx.array(tokens), rounding
        self._work = work
        self._reference = self._stream("reference", None)
        self._grams = GramStore()
        self._reference.forward(self._grams.add, self._keep_statistics)
        self._grams = end_statistics(self._reference, source)
        self._keep_statistics(self._reference.num_blocks)

    def _stream(
        self, name: str, overrides: Callable[[str, mx.array], mx.array] | None
    ) -> StreamedModel:
        stream = StreamedModel(self._source, self._tokens, self._work / name, overrides)
        stream.dtype = mx.float32
        return stream

    def _statistics_file(self, block: int) -> Path:
        return self._work / f"grams_{block:04d}.safetensors"

    def _keep_statistics(self, block: int, _module: object = None) -> None:
        """Put the Gram matrices of a block in its file; the ends come after the last block."""
        self._work.mkdir(parents=True, exist_ok=True)
        matrices = {path: gram for paths, gram in self._grams.groups() for path in paths}
        save_arrays(self._statistics_file(block), matrices)
        self._grams.clear()

    def _block_of(self, info: ModuleInfo) -> int:
        """The block a module is in; the number of blocks for one outside of them."""
        prefix = f"{self._reference.prefix}."
        if not info.path.startswith(prefix):
            return self._reference.num_blocks
        return int(info.path.removeprefix(prefix).partition(".")[0])

    def _first_block(self, info: ModuleInfo) -> int:
        """The first block whose output the module has a part in."""
        inside = self._block_of(info) < self._reference.num_blocks
        is_head_alone = info == head_of(self._source.modules) and not info.tied
        return self._block_of(info) if inside or is_head_alone else 0

    def score(self, info: ModuleInfo, option: QuantOption) -> tuple[float, float]:
        """KL in nats per token, and its standard error clustered by window."""
        stored = load_arrays(self._statistics_file(self._block_of(info))).get(info.path)
        gram = None if stored is None else np.array(stored)
        weight = self._source.weights()[f"{info.path}.weight"]
        quantize = quantizer(self._rounding, gram, info.in_dims)
        rounded = dense_rounded(info, option, weight, quantize, self._source)

        def replaced(name: str, value: mx.array) -> mx.array:
            return rounded if name == f"{info.path}.weight" else value

        stream = self._stream("changed", replaced)
        stream.adopt(self._reference, self._first_block(info))
        stream.forward()
        found = self._compared(stream)
        stream.close()
        return found

    def _compared(self, other: StreamedModel) -> tuple[float, float]:
        self._reference.load_ends()
        other.load_ends()
        kl = []
        for rows in self._reference.batches():
            p, q = (
                s.logits(rows, [s.fetch(link)[rows] for link in s.outputs()])
                for s in (self._reference, other)
            )
            kl.append(divergence(p, q, self._tokens[rows]).kl)
        self._reference.drop_ends()
        other.drop_ends()
        estimate = clustered_mean(np.concatenate(kl))
        return estimate.mean, estimate.stderr

    def close(self) -> None:
        """Delete the activations."""
        self._reference.close()
        shutil.rmtree(self._work, ignore_errors=True)


def agreement(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """How well predicted KLs rank and size true ones.

    Returns:
        `spearman`; `log_pearson`, the correlation of the logarithms; `ratio`, the sum of the
        predicted over the sum of the true.
    """
    a, b = (np.maximum(np.array(values), 1e-12) for values in (predicted, true))
    return {
        "spearman": float(scipy.stats.spearmanr(a, b).statistic),
        "log_pearson": float(np.corrcoef(np.log(a), np.log(b))[0, 1]),
        "ratio": float(a.sum() / b.sum()),
    }


def brute_force(
    table: SensitivityTable, exact: ExactScores, num_pairs: int, emit: Emit = no_emit
) -> dict[str, float]:
    """Check a table on a random sample of module x option pairs.

    Args:
        table: the scores to check.
        exact: brute force on the same windows.
        num_pairs: pairs, spread over the widths.
        emit: receives progress.

    Returns:
        `verify_spearman`, `verify_log_pearson` and `verify_ratio`, as `agreement` gives them, and
        `verify_pairs`.
    """
    pairs = sample_pairs(table, num_pairs, seed=0)
    predicted, true = [], []
    for scores, option in track(pairs, emit, "verify", len(pairs), "pairs"):
        predicted.append(scores.score(option).kl_nats_per_token)
        true.append(exact.score(scores.module, option)[0])
    found = {f"verify_{name}": value for name, value in agreement(predicted, true).items()}
    return found | {"verify_pairs": float(len(pairs))}


def sample_pairs(table: SensitivityTable, num_pairs: int, seed: int) -> list[Pair]:
    """Random pairs, as many of each width as can be, by block so that statistics are shared."""
    random = np.random.default_rng(seed)
    by_bits: dict[int, list[tuple[int, QuantOption]]] = {}
    for number, row in enumerate(table.modules):
        for score in row.scores:
            if score.option.kind == "affine":
                by_bits.setdefault(score.option.bits, []).append((number, score.option))
    picked: list[tuple[int, QuantOption]] = []
    shares = np.array_split(np.arange(num_pairs), len(by_bits))
    for share, members in zip(shares, by_bits.values(), strict=True):
        chosen = random.permutation(len(members))[: len(share)]
        picked += [members[i] for i in chosen]
    return [(table.modules[number], option) for number, option in sorted(picked)]
