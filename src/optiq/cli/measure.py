"""`optiq measure`: a source to sensitivity.json."""

from __future__ import annotations

from pathlib import Path

import click

from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import MeasureConfig, RunConfig


@click.command("measure", cls=ConfigCommand, context_settings=output.help_names)
@click.argument("source")
@output.output_option("File to write, for instance sensitivity.json. Required, but for --dry-run.")
@output.json_events
@config_options(RunConfig, MeasureConfig)
def command(source: str, out: Path | None, as_json: bool, configs: Configs) -> None:
    """Measure what every bit width costs for every matrix of SOURCE.

    SOURCE is a model directory, a hub id or a GGUF file. One measurement serves every later
    budget: give the file to `optiq plan` or to `optiq convert --sensitivity`.
    """
    run, measure = configs[RunConfig], configs[MeasureConfig]
    if out is None and not run.dry_run:
        raise click.UsageError("give the file to write, e.g. -o sensitivity.json")
    if out is not None and out.is_dir():
        raise click.UsageError(f"{out} is a directory; give a file, e.g. {out}/sensitivity.json")
    from optiq import pipeline

    report = pipeline.preflight(source, "measure", measure=measure, run=run)
    output.preflight(report, dry_run=run.dry_run, as_json=as_json)
    if out is None or run.dry_run:
        return
    with output.renderer(as_json) as emit:
        sensitivity = pipeline.measure(source, measure, run, emit)
    sensitivity.save(out)
    if as_json:
        output.result(
            {
                "sensitivity": str(out),
                "num_modules": len(sensitivity.modules),
                "num_tokens": sensitivity.num_tokens,
                "checks": sensitivity.checks,
            }
        )
        return
    rows = [("modules", str(len(sensitivity.modules))), ("tokens", f"{sensitivity.num_tokens:,}")]
    rows += [(name, f"{value:.3f}") for name, value in sensitivity.checks.items()]
    output.say(output.table(rows))
    output.data(str(out))
