"""`optiq card`: the model card from what was measured."""

from __future__ import annotations

from pathlib import Path

import click

from optiq.cli import output


@click.command("card", context_settings=output.help_names)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--logs", type=click.Path(path_type=Path), help="Logs of MODEL, to be copied into it."
)
@click.option(
    "--baseline-logs",
    type=click.Path(path_type=Path),
    help="Logs of a rival on the same items, to be copied beside them.",
)
@click.option("--repo", metavar="ORG/NAME", help="Name to load the model by; default: MODEL's own.")
def command(model: Path, logs: Path | None, baseline_logs: Path | None, repo: str | None) -> None:
    """Write MODEL/README.md from the artifacts in MODEL/optiq.

    MODEL is a directory that `optiq convert` wrote. What was not measured is left out. Pictures are
    drawn where matplotlib is installed.
    """
    from optiq import pipeline
    from optiq.hub import check_repo_id

    if repo is not None:
        check_repo_id(repo)
    written = pipeline.card(model, logs=logs, baseline_logs=baseline_logs, name=repo)
    output.data(str(written))
