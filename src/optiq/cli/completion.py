"""`optiq completion`: how to turn on shell completion."""

from __future__ import annotations

import click

from optiq.cli import output

_LINES = {
    "bash": ("~/.bashrc", 'eval "$(_OPTIQ_COMPLETE=bash_source optiq)"'),
    "zsh": ("~/.zshrc", 'eval "$(_OPTIQ_COMPLETE=zsh_source optiq)"'),
    "fish": (
        "~/.config/fish/completions/optiq.fish",
        "_OPTIQ_COMPLETE=fish_source optiq | source",
    ),
}


@click.command("completion", context_settings=output.help_names)
@click.argument("shell", type=click.Choice(list(_LINES)))
def command(shell: str) -> None:
    """Print the line that turns on completion in SHELL."""
    place, line = _LINES[shell]
    output.say(f"add this line to {place}:")
    output.data(line)
