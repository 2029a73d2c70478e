"""`optiq cache`: the work directories and imported GGUF files in the user cache."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import click

from optiq import settings
from optiq.cli import output
from optiq.errors import UsageError

_KINDS = ("work", "gguf")


@click.group("cache", context_settings=output.help_names)
def command() -> None:
    """List or clear the cache: state of runs, and GGUF files as model directories."""


@command.command("list", context_settings=output.help_names)
def list_entries() -> None:
    """Show every entry with its size and date."""
    root = settings.load().cache_dir
    rows = [
        (
            str(entry.relative_to(root)),
            f"{_size_bytes(entry) / 1e6:.1f}",
            datetime.datetime.fromtimestamp(entry.stat().st_mtime, datetime.UTC).strftime(
                "%Y-%m-%d"
            ),
        )
        for entry in _entries(root)
    ]
    output.say(f"{root}: {len(rows)} entries")
    if rows:
        output.data(output.table(rows, ("entry", "MB", "date")))


@command.command("clear", context_settings=output.help_names)
@click.argument("names", nargs=-1)
def clear(names: tuple[str, ...]) -> None:
    """Delete the entries NAMES (as `optiq cache list` shows them), or all.

    Only what optiq put there is deleted. Runs that were interrupted start afresh afterwards.
    """
    root = settings.load().cache_dir
    entries = {str(entry.relative_to(root)): entry for entry in _entries(root)}
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise UsageError(f"the cache {root} has no entry '{unknown[0]}'; see optiq cache list")
    chosen = [entries[name] for name in names] if names else list(entries.values())
    freed = sum(_size_bytes(entry) for entry in chosen)
    for entry in chosen:
        shutil.rmtree(entry)
    output.say(f"deleted {len(chosen)} entries, {freed / 1e6:.1f} MB")


def _entries(root: Path) -> list[Path]:
    """Directories of the cache, by kind and name."""
    return sorted(
        entry for kind in _KINDS if (root / kind).is_dir() for entry in (root / kind).iterdir()
    )


def _size_bytes(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
