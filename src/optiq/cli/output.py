"""What the commands print: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optiq.artifacts import Artifact
from optiq.errors import EngineFailure
from optiq.events import JsonRenderer, PlainRenderer, Renderer, RichRenderer

if TYPE_CHECKING:
    from optiq.pipeline import Preflight

Row = Sequence[str]

json_events = click.option(
    "--json", "as_json", is_flag=True, help="JSON lines on stdout: events, then the result."
)
json_result = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
help_names = {"help_option_names": ["-h", "--help"]}


def output_option(help_text: str, *, required: bool = False) -> Callable[..., Any]:
    """The option `-o/--out`, a path."""
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=required, help=help_text
    )


def talk() -> Renderer:
    """Progress on stderr: bars in a terminal, lines elsewhere."""
    return RichRenderer() if sys.stderr.isatty() else PlainRenderer(sys.stderr)


def renderer(as_json: bool) -> Renderer:
    """Progress as JSON lines on stdout, or on stderr for people."""
    return JsonRenderer(sys.stdout) if as_json else talk()


def say(text: str) -> None:
    """A line of talk on stderr."""
    click.echo(text, err=True)


def data(text: str) -> None:
    """A line of data on stdout."""
    click.echo(text)


def as_dict(artifact: Artifact) -> dict[str, Any]:
    """The JSON form of an artifact, parsed."""
    parsed: dict[str, Any] = json.loads(artifact.to_json())
    return parsed


def result(fields: dict[str, Any]) -> None:
    """The last JSON line of a run with `--json` events."""
    data(json.dumps({"event": "Result", **fields}, ensure_ascii=False))


def table(rows: Sequence[Row], columns: Row = ()) -> str:
    """Columns of text two spaces apart; under a heading `columns`, numbers are to the right."""
    lines = [list(columns), *map(list, rows)] if columns else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [
        bool(columns) and all(_is_number(row[i]) for row in rows) for i in range(len(lines[0]))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in {"-", "+"}


def preflight(report: Preflight, *, dry_run: bool, as_json: bool) -> None:
    """Show what a run will take.

    Args:
        report: rows of name and value, and why the run cannot start, if so.
        dry_run: the report is what was asked for, so it is data and goes to stdout.
        as_json: as one object.

    Raises:
        EngineFailure: if the machine is too small for the run.
    """
    if dry_run and as_json:
        data(json.dumps({"rows": dict(report.rows), "refusal": report.refusal}))
    elif dry_run:
        data(table(report.rows))
    elif not as_json:
        say(table(report.rows))
    if report.refusal is not None:
        raise EngineFailure(report.refusal)
