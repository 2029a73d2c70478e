"""`optiq config`: every option as TOML or Markdown."""

from __future__ import annotations

import click

from optiq.cli import output, toml
from optiq.cli.options import SECTIONS


@click.command("config", context_settings=output.help_names)
@click.option("--markdown", is_flag=True, help="Tables for the documentation instead of TOML.")
def command(markdown: bool) -> None:
    """Print a commented TOML example of every option, for `--config FILE.toml`."""
    text = toml.markdown(SECTIONS) if markdown else toml.example(SECTIONS)
    output.data(text.rstrip())
