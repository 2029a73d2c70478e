"""Pictures and table rows of plans and of the size/KL curve."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import math
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optiq.artifacts import KEEP, LATTICE, BitPlan, PlanEntry, write_atomic
from optiq.errors import UsageError
from optiq.numerics.size import bpw, format_size
from optiq.quant.allocate import ParetoPoint

PLAN_COLUMNS = ("layer", "bpw", "size", "KL nats/token", "bits/group")
PARETO_COLUMNS = ("bpw", "size", "KL nats/token")

_WIDTHS = (2, 3, 4, 5, 6, 8, 16)
_MOST_LABELLED_LAYERS = 64
_DARK_FROM_BITS = 6
_PALETTE = ("#ffffcc", "#c7e9b4", "#7fcdbb", "#41b6c4", "#2c7fb8", "#253494", "#555555")
_STYLE = {"svg.hashsalt": "optiq", "font.size": 9.0}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a module stands.

    Attributes:
        stack: prefix of the layers where a model has several stacks, else empty.
        layer: number of the layer, None outside the layers.
        kind: name within the layer, or the whole path outside.
    """

    stack: str
    layer: int | None
    kind: str

    @property
    def row(self) -> str:
        """Name of the row in a picture."""
        return f"{self.stack}.{self.kind}" if self.stack else self.kind

    @property
    def group(self) -> str:
        """Name of the row in a table."""
        if self.layer is None:
            return self.kind
        return f"{self.stack}.{self.layer}" if self.stack else str(self.layer)


def _places(plan: BitPlan) -> list[_Place]:
    """The place of every module of a plan."""
    matches = [re.fullmatch(r"(.*?)\.(\d+)\.(.+)", entry.path) for entry in plan.entries]
    several = len({match[1] for match in matches if match}) > 1
    return [
        _Place(match[1] if several else "", int(match[2]), match[3])
        if match
        else _Place("", None, entry.path)
        for entry, match in zip(plan.entries, matches, strict=True)
    ]


def plan_rows(plan: BitPlan) -> list[tuple[str, ...]]:
    """Table of a plan under `PLAN_COLUMNS`: a row per layer, and per module outside the layers.

    The last cell lists the options with the modules that take them, most modules first.
    """
    groups: dict[str, list[tuple[PlanEntry, _Place]]] = {}
    for entry, place in zip(plan.entries, _places(plan), strict=True):
        groups.setdefault(place.group, []).append((entry, place))
    rows: list[tuple[str, ...]] = []
    for name, members in groups.items():
        size_bytes = sum(entry.size_bytes for entry, _ in members)
        num_params = sum(math.prod(entry.shape) for entry, _ in members)
        kl = sum(entry.kl_nats_per_token for entry, _ in members)
        rows.append(
            (
                name,
                f"{bpw(size_bytes, num_params):.2f}",
                format_size(size_bytes),
                f"{kl:.2e}",
                _by_option(members),
            )
        )
    return rows


def _by_option(members: Sequence[tuple[PlanEntry, _Place]]) -> str:
    """`4/64 q_proj k_proj, 6/64 v_proj`; outside the layers the option alone."""
    short = [place.kind.rpartition(".")[2] for _, place in members]
    kinds: dict[str, list[str]] = {}
    for (entry, place), name in zip(members, short, strict=True):
        names = kinds.setdefault(entry.option.key, [])
        if place.layer is not None:
            names.append(name if short.count(name) == 1 else place.kind)
    ranked = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return ", ".join(" ".join([key, *names]) for key, names in ranked)


def pareto_rows(points: Sequence[ParetoPoint]) -> list[tuple[str, ...]]:
    """Table of the curve under `PARETO_COLUMNS`, smallest plan first."""
    return [
        (f"{point.bpw:.2f}", format_size(point.model_bytes), f"{point.predicted_kl:.3g}")
        for point in points
    ]


@dataclasses.dataclass(frozen=True)
class MeasuredPoint:
    """A model that was judged: its name, stored bits per weight, and KL in nats per token."""

    name: str
    bpw: float
    kl_nats_per_token: float


def plot_pareto(
    points: Sequence[ParetoPoint], path: Path, measured: Sequence[MeasuredPoint] = ()
) -> None:
    """Draw predicted KL (log scale) against stored bits per weight and bytes.

    Points without KL have no place on the scale and are left out.

    Args:
        points: the curve.
        path: `.svg` or `.png` file to write.
        measured: models of the same source to mark beside it.

    Raises:
        UsageError: for another suffix, if matplotlib is missing, or if no point has a KL.
    """
    drawn = [point for point in points if point.predicted_kl > 0]
    if not drawn:
        raise UsageError("there is nothing to draw: every point of the curve has a KL of 0")
    x = np.array([point.bpw for point in drawn])
    megabytes = np.array([point.model_bytes for point in drawn]) / 1e6
    with _figure(path, (6.4, 4.0)) as figure:
        axes = figure.add_subplot()
        curve = [point.predicted_kl for point in drawn]
        axes.plot(x, curve, marker="o", markersize=3, label="predicted")
        for model in measured:
            if model.kl_nats_per_token > 0:
                axes.plot(model.bpw, model.kl_nats_per_token, "*", markersize=11, label=model.name)
        if measured:
            axes.legend()
        axes.set_yscale("log")
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel(f"{'' if measured else 'predicted '}KL (nats per token)")
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        if len(drawn) > 1:
            slope, offset = np.polyfit(x, megabytes, 1)  # exact: the rest of the file is constant
            upper = axes.secondary_xaxis(
                "top", functions=(lambda b: b * slope + offset, lambda mb: (mb - offset) / slope)
            )
            upper.set_xlabel("model*.safetensors (MB)")


def plot_plan(plan: BitPlan, path: Path) -> None:
    """Draw the bits of every module: layers across, kinds of module down.

    A cell's colour is the width of its codes; up to 64 layers, its text is the group size, or L for
    a lattice. A module outside the layers is a row of its own.

    Args:
        plan: the plan.
        path: `.svg` or `.png` file to write.

    Raises:
        UsageError: for another suffix, or if matplotlib is missing.
    """
    places = _places(plan)
    kinds = list(dict.fromkeys(place.row for place in places))
    num_layers = 1 + max((place.layer for place in places if place.layer is not None), default=0)
    levels = np.full((len(kinds), num_layers), np.nan)
    labels = []
    for entry, place in zip(plan.entries, places, strict=True):
        row = kinds.index(place.row)
        levels[row, slice(None) if place.layer is None else place.layer] = _WIDTHS.index(
            entry.option.bits
        )
        if entry.option != KEEP and num_layers <= _MOST_LABELLED_LAYERS:
            column = (num_layers - 1) / 2 if place.layer is None else place.layer
            shade = "white" if entry.option.bits >= _DARK_FROM_BITS else "black"
            text = "L" if entry.option == LATTICE else str(entry.option.group_size)
            labels.append((column, row, text, shade))
    with _figure(path, (min(3.2 + 0.24 * num_layers, 20.0), 1.3 + 0.26 * len(kinds))) as figure:
        axes = figure.add_subplot()
        colors = importlib.import_module("matplotlib.colors").ListedColormap(_PALETTE)
        image = axes.imshow(
            levels, colors, aspect="auto", interpolation="none", vmin=-0.5, vmax=len(_WIDTHS) - 0.5
        )
        for column, row, text, shade in labels:
            axes.text(column, row, text, color=shade, ha="center", va="center", fontsize=6)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("layer")
        axes.set_title(
            f"{plan.bpw:.3f} bpw, {format_size(plan.model_bytes)}, "
            f"predicted KL {plan.predicted_kl:.3g} nats per token",
            fontsize=9,
        )
        bar = figure.colorbar(image, ticks=range(len(_WIDTHS)), pad=0.01)
        bar.ax.set_yticklabels([str(width) for width in _WIDTHS])
        bar.set_label("bits (in a cell: group size, L: lattice)")


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def _figure(path: Path, size_inches: tuple[float, float]) -> Generator[Any, None, None]:
    """A figure that is written to `path` when the block ends; equal input, equal bytes."""
    suffix = path.suffix.lower()
    if suffix not in {".svg", ".png"}:
        raise UsageError(f"{path} has the suffix '{path.suffix}'; pictures end in .svg or .png")
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UsageError(
            "pictures need matplotlib, which is not installed; run: pip install 'matplotlib>=3.9'"
        ) from None
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=size_inches, layout="constrained")
        yield figure
        buffer = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(buffer, format=suffix[1:], dpi=160, metadata=metadata)
    write_atomic(path, buffer.getvalue())
