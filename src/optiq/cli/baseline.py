"""`optiq baseline`: the uniform rival of a model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import RunConfig


@click.command("baseline", cls=ConfigCommand, context_settings=output.help_names)
@click.argument("source")
@click.option(
    "--like", required=True, type=click.Path(path_type=Path), help="Model to be no smaller than."
)
@output.output_option("Directory to write.", required=True)
@output.json_result
@config_options(RunConfig, without=("dry_run",))
def command(source: str, like: Path, out: Path, as_json: bool, configs: Configs) -> None:
    """Write the honest uniform rival of a model made from SOURCE.

    That is the smallest uniform quantization (bits x group size) that is not smaller than --like,
    or the largest there is.
    """
    from optiq import pipeline

    with output.talk() as emit:
        rival = pipeline.baseline(source, like, out, run=configs[RunConfig], emit=emit)
    if as_json:
        fields = {
            "path": str(rival.path),
            "option": rival.option.key,
            "size_bytes": rival.size_bytes,
            "like": str(like),
            "like_bytes": rival.like_bytes,
        }
        output.data(json.dumps(fields))
        return
    rows = [
        (str(rival.path), f"{rival.size_bytes / 1e6:.1f}", f"uniform {rival.option.key}"),
        (str(like), f"{rival.like_bytes / 1e6:.1f}", "to be compared with"),
    ]
    output.data(output.table(rows, ("model", "MB", "")))
