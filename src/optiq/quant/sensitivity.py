"""Measure: the KL of every option of every module, as a SensitivityTable."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from optiq.artifacts import (
    KEEP,
    LATTICE,
    LatticeReport,
    ModuleInfo,
    ModuleScores,
    OptionScore,
    Provenance,
    QuantOption,
    SensitivityTable,
    menu,
)
from optiq.backend import mx
from optiq.configs import MeasureConfig
from optiq.data.calibration import Windows
from optiq.events import Emit, track
from optiq.models.load import Source
from optiq.numerics.lattice import Lattice, find_lattice
from optiq.quant.exact import ExactScores, brute_force
from optiq.quant.sketch import Scores, Share, Sketch
from optiq.quant.static import static_scores

NO_LATTICE = LatticeReport("none", False, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Effort:
    """Tokens of an effort.

    Attributes:
        window: tokens of a window.
        num_windows: windows of the measurement, one probe each.
        rounding_windows: windows whose inputs weigh the rounding errors; more of them than of
            probes, because a forward pass is cheap and GPTQ overfits the inputs it has seen
            (docs/log.md, calibration windows).
        verify_pairs: module x option pairs of `--verify`.
    """

    window: int
    num_windows: int
    rounding_windows: int
    verify_pairs: int


EFFORTS = {
    "quick": Effort(window=256, num_windows=16, rounding_windows=32, verify_pairs=10),
    "standard": Effort(window=256, num_windows=64, rounding_windows=160, verify_pairs=16),
    "thorough": Effort(window=256, num_windows=160, rounding_windows=1000, verify_pairs=32),
}


def measure_table(
    source: Source,
    windows: Windows,
    config: MeasureConfig,
    work: Path,
    provenance: Provenance,
    emit: Emit,
) -> SensitivityTable:
    """KL of every option of every module.

    Args:
        source: the model.
        windows: calibration windows.
        config: method, reference, rounding and seed.
        work: directory for activations and checkpoints; a killed run goes on from there.
        provenance: recorded in the table.
        emit: receives progress.

    Cost: `fisher`: four forward passes' worth of products over the tokens; `exact`: a forward pass
        for every pair; `static`: one pass over the weights.
    """
    group = mx.distributed.init()
    checks: dict[str, float] = {}
    probes = 0
    if config.method == "static":
        rows = static_scores(source, config.rounding)
    elif config.method == "exact":
        exact = ExactScores(source, windows.tokens, work / "exact", config.rounding)
        rows = _exact_rows(source, exact, emit)
        exact.close()
    else:
        scores, lengths = _sketched(source, windows.tokens, config, work, emit, group)
        probes = len(lengths)
        checks["split_half"] = split_half(scores)
        rows = tuple(
            module_scores(info, scores[info.path], windows.tokens.shape[1], source)
            for info in source.modules
        )
    table = SensitivityTable(
        source=source.info,
        method=config.method,
        reference=config.reference,
        rounding=config.rounding,
        modules=rows,
        num_tokens=int(windows.tokens.size) if config.method != "static" else 0,
        num_probes=probes,
        calibration=windows.digest,
        checks=checks,
        provenance=provenance,
        calibration_mix=dict(Counter(windows.domains)) if config.method != "static" else {},
    )
    if config.verify and config.method == "fisher":
        exact = ExactScores(source, windows.tokens, work / "exact", config.rounding)
        pairs = EFFORTS[config.effort].verify_pairs
        table = dataclasses.replace(table, checks=checks | brute_force(table, exact, pairs, emit))
        exact.close()
    return table


def _sketched(
    source: Source,
    tokens: npt.NDArray[np.int32],
    config: MeasureConfig,
    work: Path,
    emit: Emit,
    group: mx.distributed.Group,
) -> tuple[dict[str, Scores], npt.NDArray[np.int32]]:
    """The sketch over this process's share of the windows, gathered over all processes."""
    shares = np.array_split(tokens, group.size())
    first = sum(len(share) for share in shares[: group.rank()])
    sketch = Sketch(
        source,
        shares[group.rank()],
        work / f"rank_{group.rank()}" if group.size() > 1 else work,
        config,
        emit,
        Share(first, group, tokens),
    )
    scores = sketch.run()
    if group.size() > 1:
        for score in scores.values():
            for use in (score.products, score.lookups):
                whole = np.zeros((len(tokens), use.s.shape[1]), np.float32)
                whole[first : first + len(use.s)] = use.s
                use.s = np.array(mx.distributed.all_sum(mx.array(whole), group=group))
                use.sums = np.array(mx.distributed.all_sum(mx.array(use.sums), group=group))
    return scores, tokens[:, 0]


def module_scores(info: ModuleInfo, scores: Scores, window: int, source: Source) -> ModuleScores:
    """Mean and standard error of s^2 / (2 T), with s as the final rounding leaves it.

    A grid that gives the source back in its own dtype costs nothing, as keeping it does: what is
    left is the rounding of the checkpoint itself.
    """
    samples = scores.scaled.astype(np.float64) ** 2 / (2 * window)
    mean = samples.mean(axis=0)
    count = max(len(samples) - 1, 1)
    error = samples.std(axis=0) / np.sqrt(count)
    itemsize = source.info.itemsize
    if is_exact(scores.lattice):
        at = scores.options.index(LATTICE)
        mean[at] = error[at] = 0.0
    rows = [
        OptionScore(
            option,
            float(mean[n]),
            float(error[n]),
            option.size_bytes(info.shape, itemsize),
            "ratio" if scores.is_scaled[n] and option != LATTICE else "exact",
        )
        for n, option in enumerate(scores.options)
    ]
    rows.append(OptionScore(KEEP, 0.0, 0.0, KEEP.size_bytes(info.shape, itemsize), "exact"))
    report = scores.lattice.report if scores.lattice else NO_LATTICE
    return ModuleScores(info, tuple(rows), report)


def is_exact(lattice: Lattice | None) -> bool:
    """Whether there is a grid that gives the source back in its dtype."""
    return lattice is not None and lattice.report.exact


def _exact_rows(source: Source, exact: ExactScores, emit: Emit) -> tuple[ModuleScores, ...]:
    rows = []
    weights = source.weights()
    itemsize = source.info.itemsize
    modules = track(source.modules, emit, "exact", len(source.modules), "modules")
    for info in modules:
        lattice = find_lattice(weights[f"{info.path}.weight"], source.dtype)
        options: tuple[QuantOption, ...] = menu(info.in_dims)
        options = (*options, LATTICE) if lattice else options
        scored = []
        for option in options:
            free = option == LATTICE and is_exact(lattice)
            kl, error = (0.0, 0.0) if free else exact.score(info, option)
            size = option.size_bytes(info.shape, itemsize)
            scored.append(OptionScore(option, kl, error, size, "exact"))
        scored.append(OptionScore(KEEP, 0.0, 0.0, KEEP.size_bytes(info.shape, itemsize), "exact"))
        report = lattice.report if lattice else NO_LATTICE
        rows.append(ModuleScores(info, tuple(scored), report))
    return tuple(rows)


def split_half(scores: dict[str, Scores]) -> float:
    """Correlation of log KL between the odd and the even probes, over all pairs (Pearson)."""
    halves: tuple[list[float], list[float]] = ([], [])
    for score in scores.values():
        for part, start in zip(halves, (0, 1), strict=True):
            part.extend((score.s[start::2].astype(np.float64) ** 2).mean(axis=0))
    a, b = (np.log(np.maximum(half, 1e-30)) for half in halves)
    return float(np.corrcoef(a, b)[0, 1])
