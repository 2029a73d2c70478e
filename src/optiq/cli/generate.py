"""`optiq generate`: text from a model, as it comes."""

from __future__ import annotations

import re
from pathlib import Path

import click

from optiq.cli import output


class _PromptCommand(click.Command):
    """Takes words that start with a dash as text where they cannot be a flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click, but `- 5 + 3?` and `-5` are a prompt."""
        if "--" not in args:
            text = [word for word in args if re.match(r"-(\S*\s|-?\d|$)", word)]
            args = [word for word in args if word not in text]
            args += ["--", *text] if text else []
        return super().parse_args(ctx, args)


@click.command("generate", cls=_PromptCommand, context_settings=output.help_names)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Most tokens to write.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the most likely token.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
def command(model: Path, prompt: str, max_tokens: int, temperature: float, raw: bool) -> None:
    """Write text with MODEL, a model directory, to stdout.

    PROMPT goes through the model's chat template. A prompt that is one word with a dash in front
    goes after `--`.
    """
    from optiq import pipeline

    pieces = pipeline.generate(
        model, prompt, max_tokens=max_tokens, temperature=temperature, raw=raw
    )
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
