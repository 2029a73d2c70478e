"""What a run will take, before it starts: time, memory, disk and device."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Literal

from optiq.artifacts import menu
from optiq.backend import compute_dtype, device_name, gflops, is_cpu, memory_bytes, mx
from optiq.configs import MeasureConfig, RunConfig, parse_size
from optiq.events import Emit, no_emit
from optiq.models.load import Source, open_source
from optiq.numerics.size import format_size
from optiq.quant.sensitivity import EFFORTS
from optiq.work import work_root

Verb = Literal["measure", "convert"]

_BASE_BYTES = 6 * 10**8  # interpreter, libraries and buffers
_JUDGE_TOKENS = 15_000  # of the held-out text in the package
# Measured on two cores with SmolLM2-135M (docs/log.md, preflight): beside the matrix products,
# seconds for a million weights.
_SCORE_S = {"rtn": 0.25, "search": 0.35, "gptq": 0.55}
_ROUND_S = {"rtn": 0.02, "search": 0.12, "gptq": 0.2}


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What a run will take.

    Attributes:
        rows: name and value, for people.
        refusal: why the run cannot start, or None.
    """

    rows: tuple[tuple[str, str], ...]
    refusal: str | None


@dataclasses.dataclass(frozen=True)
class Needs:
    """Estimates for a run.

    Attributes:
        seconds: time.
        memory_bytes: peak.
        work_bytes: of the work directory.
        out_bytes: of the output, at most.
    """

    seconds: float
    memory_bytes: int
    work_bytes: int
    out_bytes: int


def preflight(
    source: str,
    verb: Verb,
    *,
    measure: MeasureConfig,
    run: RunConfig,
    out: Path | None = None,
    emit: Emit = no_emit,
) -> Preflight:
    """Estimate a run and check that the machine can hold it.

    Args:
        source: a model directory, GGUF file or hub id; a file is imported, a hub id fetched.
        verb: what will be run.
        measure: method and effort.
        run: work directory and memory limit.
        out: output path, whose disk must hold the result.
        emit: receives progress of downloads and imports.

    Raises:
        UsageError: if the source or the memory limit cannot be used.
    """
    limit = parse_size(run.memory_limit) if run.memory_limit else None
    opened = open_source(source, run, emit)
    needs = estimate(opened, verb, measure)
    info = opened.info
    weights = sum(m.num_params for m in opened.modules)
    place = work_root(run)
    memory = memory_bytes()
    rows = (
        ("source", f"{info.name}: {info.model_type}, {weights / 1e6:.0f}M weights in {info.dtype}"),
        ("device", device_name()),
        ("time", f"about {_duration(needs.seconds)}"),
        ("memory", f"about {format_size(needs.memory_bytes)} of {format_size(memory)}"),
        ("disk", f"{format_size(needs.work_bytes)} for work in {place}"),
        *((("output", f"at most {format_size(needs.out_bytes)}"),) if verb == "convert" else ()),
    )
    return Preflight(rows, _refusal(needs, memory, limit, place, out))


def estimate(source: Source, verb: Verb, measure: MeasureConfig) -> Needs:
    """Time, memory and disk of a run, from shapes alone and a short test of the device's speed."""
    effort = EFFORTS[measure.effort]
    tokens = effort.window * effort.num_windows
    weights = sum(m.num_params * m.active for m in source.modules if m.active > 1e-3)
    forward_flops = 2.0 * weights * tokens
    speed = gflops() * 1e9
    passes = {
        "fisher": 5.0,
        "exact": float(sum(len(menu(m.in_dims)) for m in source.modules)),
        "static": 0.0,
    }[measure.method]
    millions = sum(m.num_params for m in source.modules) / 1e6
    seconds = passes * forward_flops / speed + millions * _SCORE_S[measure.rounding]
    if verb == "convert":
        squares = sum(2.0 * m.num_params * m.in_dims for m in source.modules)
        seconds += 2.0 * weights * effort.rounding_windows * effort.window / speed
        seconds += squares / speed + millions * _ROUND_S[measure.rounding]
        seconds += 2 * 2.0 * weights * _JUDGE_TOKENS / speed
    boundary = _boundary_bytes(source, tokens)
    blocks = max(
        (int(p) for m in source.modules for p in m.path.split(".") if p.isdigit()), default=0
    )
    work = boundary * (blocks + 2)
    out = source.info.size_bytes if verb == "convert" else 0
    return Needs(seconds, _peak_bytes(source, boundary), work + out, out)


def _itemsize(source: Source) -> int:
    return 4 if compute_dtype(source.dtype) == mx.float32 else 2


def _boundary_bytes(source: Source, tokens: int) -> int:
    """Hidden states between two blocks."""
    hidden = min(m.in_dims for m in source.modules if m.role in {"embedding", "head"})
    return tokens * hidden * _itemsize(source)


def _peak_bytes(source: Source, boundary: int) -> int:
    """One block three times over (weights, gradient, options), or the head; and activations."""
    by_block: dict[str, int] = {}
    for module in source.modules:
        numbers = [part for part in module.path.split(".") if part.isdigit()]
        key = numbers[0] if numbers else module.path
        by_block[key] = by_block.get(key, 0) + module.num_params
    largest = max(by_block.values())
    widest = max(m.in_dims for m in source.modules)
    return _BASE_BYTES + 3 * largest * _itemsize(source) + 6 * boundary + 12 * widest**2


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _refusal(
    needs: Needs, memory: int, limit: int | None, work: Path, out: Path | None
) -> str | None:
    needed = format_size(needs.memory_bytes)
    if limit is not None and needs.memory_bytes > limit:
        return (
            f"the run needs about {needed} of memory, above --memory-limit {format_size(limit)}; "
            f"raise it or give --effort quick"
        )
    if needs.memory_bytes > memory:
        kind = "" if is_cpu() else " on the device"
        return f"the run needs about {needed} of memory{kind}, {format_size(memory)} is there"
    places = [(work, needs.work_bytes, "--work")]
    if out is not None:
        places.append((out.parent, needs.out_bytes, "-o"))
    for place, size_bytes, flag in places:
        free = shutil.disk_usage(_existing(place)).free
        if free < size_bytes:
            return (
                f"the run needs {format_size(size_bytes)} of disk at {place}, "
                f"{format_size(free)} is free; free some or give another {flag}"
            )
    return None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
