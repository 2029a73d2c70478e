"""`optiq push`: a model directory to the hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from optiq.cli import output


@click.command("push", context_settings=output.help_names)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--yes", is_flag=True, help="Upload; without it nothing leaves this machine.")
@output.json_result
def command(model: Path, repo: str, private: bool, yes: bool, as_json: bool) -> None:
    """Upload MODEL, a directory that optiq wrote, to a repository of the hub.

    Lists what would be uploaded; --yes does it, in one commit. The repository is made if it is not
    there. Of an older upload, weights and artifacts that MODEL no longer has are removed.
    """
    from optiq import pipeline

    with output.talk() as emit:
        done = pipeline.push(model, repo, private=private, upload=yes, emit=emit)
    if as_json:
        fields = dataclasses.asdict(done) | {"size_bytes": done.size_bytes}
        fields["files"] = [{"path": path, "size_bytes": size} for path, size in done.files]
        output.data(json.dumps(fields, indent=1))
        return
    rows = [(name, f"{size:,}") for name, size in done.files]
    output.data(output.table([*rows, ("total", f"{done.size_bytes:,}")], ("file", "bytes")))
    output.data("")
    if done.commit is None:
        kind = "private" if private else "public, if it is new"
        output.data(f"would go to {done.url} ({kind}); give --yes to upload")
        return
    for name in done.removed:
        output.data(f"removed {name} of an older upload")
    output.data(f"{done.url} is at commit {done.commit}")
