"""`optiq convert`: a source to a quantized model directory with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from optiq.artifacts import Fidelity
from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import AllocateConfig, ConvertConfig, JudgeConfig, MeasureConfig, RunConfig

if TYPE_CHECKING:
    from optiq.pipeline import Release


@click.command("convert", cls=ConfigCommand, context_settings=output.help_names)
@click.argument("source")
@output.output_option("Directory to write. Required, but for --dry-run.")
@output.json_events
@config_options(RunConfig, MeasureConfig, AllocateConfig, ConvertConfig, JudgeConfig)
def command(source: str, out: Path | None, as_json: bool, configs: Configs) -> None:
    """Turn SOURCE into the best MLX model for a byte budget.

    SOURCE is a model directory, a hub id or a GGUF file. Measures and allocates first, unless the
    work directory has the results or they are given; judges the model and writes its card at the
    end. Interrupted, the same command goes on where it was.
    """
    run, measure = configs[RunConfig], configs[MeasureConfig]
    if out is None and not run.dry_run:
        raise click.UsageError("give the directory to write, e.g. -o model-5bpw")
    from optiq import pipeline

    report = pipeline.preflight(source, "convert", measure=measure, run=run, out=out)
    output.preflight(report, dry_run=run.dry_run, as_json=as_json)
    if out is None or run.dry_run:
        return
    with output.renderer(as_json) as emit:
        release = pipeline.convert(
            source,
            out,
            measure=measure,
            allocate=configs[AllocateConfig],
            convert=configs[ConvertConfig],
            judge=configs[JudgeConfig],
            run=run,
            emit=emit,
        )
    if as_json:
        output.result(
            {
                "path": str(release.path),
                "card": str(release.card),
                "predicted_kl": release.plan.predicted_kl,
                "fidelity": release.fidelity and output.as_dict(release.fidelity),
                "acceptance": release.acceptance and output.as_dict(release.acceptance),
                "rivals": [output.as_dict(rival) for rival in release.rivals],
            }
        )
        return
    output.data(output.table(_rows(release)))


def _rows(release: Release) -> list[tuple[str, str]]:
    """What the user asked for and got."""
    fidelity = release.fidelity
    if fidelity is None:
        return _drafter_rows(release)
    rows = [
        ("model", str(release.path)),
        ("stored", _stored(fidelity)),
        ("predicted KL", f"{release.plan.predicted_kl:.4g} nats/token"),
        ("measured KL", f"{_kl(fidelity)} nats/token ({fidelity.num_tokens:,} held-out tokens)"),
        ("top-1 agreement", f"{100 * fidelity.top1_agreement:.1f}%"),
    ]
    for rival in release.rivals:
        times = rival.kl_nats_per_token / fidelity.kl_nats_per_token
        rows.append((rival.model, f"{_stored(rival)}: KL {_kl(rival)}, {times:.1f} times as far"))
    return [*rows, ("card", str(release.card))]


def _drafter_rows(release: Release) -> list[tuple[str, str]]:
    rows = [("drafter", str(release.path)), ("stored", f"{release.plan.bpw:.3f} bpw")]
    found = release.acceptance
    if found is not None:
        for name, tried, right in (
            ("acceptance", found.tried, found.accepted),
            ("of its source", found.source_tried, found.source_accepted),
        ):
            pairs = zip(right, tried, strict=True)
            shares = ["-" if not count else f"{100 * part / count:.1f}%" for part, count in pairs]
            rows.append((name, f"{', '.join(shares)} (drafts 1 to {len(tried)})"))
    return [*rows, ("card", str(release.card))]


def _stored(fidelity: Fidelity) -> str:
    return f"{fidelity.bpw:.3f} bpw, {fidelity.size_bytes / 1e6:.1f} MB"


def _kl(fidelity: Fidelity) -> str:
    return f"{fidelity.kl_nats_per_token:.4g} +- {fidelity.kl_se:.1g}"
