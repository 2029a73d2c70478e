"""`optiq eval show`: the answers in a directory of logs, as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optiq.cli import output
from optiq.errors import UsageError

if TYPE_CHECKING:
    from optiq.evals.log import ItemRecord

_RULE = "-" * 72


@click.command("show", context_settings=output.help_names)
@click.argument("logs", type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this benchmark.")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only this item; may be repeated.")
@click.option("--wrong", is_flag=True, help="Only answers with a score below 1.")
@click.option("--right", is_flag=True, help="Only answers with a score of 1.")
@click.option("--null", is_flag=True, help="Only answers on which the harness failed.")
@click.option("--truncated", is_flag=True, help="Only answers cut by the limit of tokens.")
@click.option("--looped", is_flag=True, help="Only answers that end in a cycle.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many answers.")
@click.option("--json", "as_json", is_flag=True, help="The records as JSON lines on stdout.")
def command(logs: Path, limit: int | None, as_json: bool, **wanted: Any) -> None:  # noqa: ANN401  flags
    """Show answers with their scores; through a pager in a terminal.

    LOGS is a directory that optiq eval wrote. Several filters must all hold.
    """
    if wanted["wrong"] and wanted["right"]:
        raise UsageError("no answer is --wrong and --right; choose one")
    chosen = list(_chosen(logs, wanted))
    if not chosen:
        raise UsageError(f"no answer in {logs} is of that kind; leave out a filter")
    chosen = chosen[:limit]
    if as_json:
        for task, record in chosen:
            output.data(json.dumps({"task": task} | json.loads(record.to_line())))
        return
    pages = (_page(task, record) for task, record in chosen)
    if sys.stdout.isatty():
        click.echo_via_pager(pages)
    else:
        click.echo("".join(pages), nl=False)


def _chosen(logs: Path, wanted: dict[str, Any]) -> Iterator[tuple[str, ItemRecord]]:
    from optiq.evals.log import read_headers, read_records, records_path

    names = list(read_headers(logs))
    unknown = [name for name in wanted["tasks"] if name not in names]
    if unknown:
        raise UsageError(f"{logs} has no log of '{unknown[0]}'; there are {names}")
    for name in wanted["tasks"] or names:
        for record in read_records(records_path(logs, name)):
            if _matches(record, wanted):
                yield name, record


def _matches(record: ItemRecord, wanted: dict[str, Any]) -> bool:
    value, response = record.score.value, record.response
    kinds = {
        "wrong": value is not None and value < 1,
        "right": value == 1,
        "null": value is None,
        "truncated": response is not None and response.truncated,
        "looped": record.looped,
    }
    if wanted["ids"] and record.id not in wanted["ids"]:
        return False
    return all(holds for kind, holds in kinds.items() if wanted[kind])


def _page(task: str, record: ItemRecord) -> str:
    """One answer as text."""
    response, score = record.response, record.score
    head = f"{task} {record.id}" + (f", answer {record.sample + 1}" if record.sample else "")
    verdict = "failed" if score.value is None else f"score {score.value:g}"
    marks = [verdict]
    if response is not None:
        marks.append(f"{response.num_tokens} tokens")
        marks += ["truncated"] if response.truncated else []
    marks += ["looped"] if record.looped else []
    lines = [_RULE, f"{head}: {', '.join(marks)}", _RULE]
    if record.reasoning:
        lines += ["[reasoning]", record.reasoning, "[answer]"]
    if response is not None:
        lines += [response.text] if response.text else []
        lines += [
            f"call {c.name} {json.dumps(dict(c.arguments))}" for c in response.tool_calls or ()
        ]
        if response.logprobs is not None:
            values = " ".join(f"{value:.4f}" for value in response.logprobs)
            lines.append(f"log-likelihoods {values}")
    if score.parsed is not None:
        lines.append(f"parsed: {json.dumps(score.parsed, ensure_ascii=False)}")
    lines += [f"{name}: {json.dumps(value)}" for name, value in score.detail.items()]
    return "\n".join(lines) + "\n\n"
