"""`optiq inspect`: bits, bytes and provenance of a model directory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from optiq.artifacts import BitPlan, Fidelity
from optiq.cli import output
from optiq.errors import UsageError

if TYPE_CHECKING:
    from optiq.models.safetensors_io import TensorHeader

A = TypeVar("A", BitPlan, Fidelity)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A stored matrix: the option it is stored at, its weights and its bytes."""

    path: str
    option: str
    num_params: int
    size_bytes: int


@click.command("inspect", context_settings=output.help_names)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Draw bits by layer: .svg or .png.")
@output.json_result
def command(model: Path, plot: Path | None, as_json: bool) -> None:
    """Show the plan by layer, true stored bits per weight, bytes and provenance of MODEL.

    Of an MLX directory that optiq did not write, shows what its files and config.json say.
    """
    if not model.is_dir():
        raise UsageError(f"{model} is no directory; give a model directory")
    from optiq.models import load, safetensors_io
    from optiq.quant import plots

    plan = _artifact(BitPlan, model / "optiq" / "plan.json")
    fidelity = _artifact(Fidelity, model / "optiq" / "fidelity.json")
    matrices = stored(load.read_config(model), safetensors_io.read_headers(model))
    if plan is not None:
        planned = {entry.path for entry in plan.entries}
        matrices = [matrix for matrix in matrices if matrix.path in planned]
    if not matrices:
        raise UsageError(f"{model} holds no matrices; give a model directory")
    bpw = 8 * sum(m.size_bytes for m in matrices) / sum(m.num_params for m in matrices)
    size_bytes = load.size_on_disk(model)
    if plot is not None:
        if plan is None:
            raise UsageError(f"--plot needs a plan, and {model} was not written by optiq")
        plots.plot_plan(plan, plot)
    if as_json:
        fields: dict[str, Any] = {"path": str(model), "bpw": bpw, "size_bytes": size_bytes}
        fields["options"] = [dataclasses.asdict(matrix) for matrix in matrices]
        fields["plan"] = None if plan is None else output.as_dict(plan)
        fields["fidelity"] = None if fidelity is None else output.as_dict(fidelity)
        output.data(json.dumps(fields, indent=1, ensure_ascii=False))
        return
    if plan is None:
        output.data(output.table(_by_option(matrices), ("option", "matrices", "weights", "MB")))
    else:
        output.data(output.table(plots.plan_rows(plan), plots.PLAN_COLUMNS))
    output.data("")
    rows = [("stored", f"{bpw:.4f} bpw, {size_bytes / 1e6:.1f} MB ({size_bytes} bytes)")]
    output.data(output.table(rows + _provenance(plan, fidelity)))


def _artifact(kind: type[A], path: Path) -> A | None:
    """An artifact of a directory of ours; None where there is none."""
    return kind.load(path) if path.exists() else None


def stored(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> list[Matrix]:
    """The matrices of an MLX directory, from its headers and `quantization` of its config.

    Raises:
        UsageError: if a packed matrix has no bits in the config.
    """
    quantization = config.get("quantization") or {}
    matrices = []
    for name, header in headers.items():
        stem, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(header.shape) < 2:
            continue
        num_params, option = math.prod(header.shape), "keep"
        if f"{stem}.scales" in headers:
            entry = quantization.get(stem)
            chosen = entry if isinstance(entry, dict) else quantization
            if not isinstance(chosen.get("bits"), int):
                raise UsageError(
                    f"{stem} is packed, but config.json does not say with how many bits"
                )
            num_params = num_params * 32 // chosen["bits"]
            option = f"{chosen['bits']}/{chosen.get('group_size')}"
        parts = (f"{stem}.{part}" for part in ("weight", "scales", "biases"))
        size_bytes = sum(headers[part].size_bytes for part in parts if part in headers)
        matrices.append(Matrix(stem, option, num_params, size_bytes))
    return matrices


def _by_option(matrices: Iterable[Matrix]) -> list[tuple[str, ...]]:
    """A row per option: how many matrices, weights and bytes."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.option, []).append(matrix)
    return [
        (
            option,
            str(len(members)),
            f"{sum(m.num_params for m in members):,}",
            f"{sum(m.size_bytes for m in members) / 1e6:.1f}",
        )
        for option, members in sorted(groups.items())
    ]


def _provenance(plan: BitPlan | None, fidelity: Fidelity | None) -> list[tuple[str, str]]:
    """Where a model came from and how it was judged."""
    if plan is None:
        return [("provenance", "not written by optiq")]
    source = plan.source
    rows = [
        ("source", f"{source.name} ({source.model_type}, {source.dtype})"),
        ("revision", source.revision or "none"),
        ("fingerprint", source.fingerprint),
        ("target", plan.target),
        ("rounding", plan.rounding),
        ("predicted KL", f"{plan.predicted_kl:.4g} nats/token"),
    ]
    if fidelity is not None:
        made = fidelity.provenance
        kl = f"{fidelity.kl_nats_per_token:.4g} +- {fidelity.kl_se:.1g} nats/token"
        rows += [
            ("measured KL", f"{kl} on {fidelity.text}"),
            ("made with", f"optiq {made.optiq}, mlx {made.mlx}, mlx-lm {made.mlx_lm}"),
            ("made on", f"{made.device}, {made.blas}"),
        ]
    return rows
