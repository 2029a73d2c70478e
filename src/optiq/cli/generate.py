"""`optiq generate`: text from a model, as it comes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import GenerateConfig, RunConfig


class _PromptCommand(ConfigCommand):
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
@config_options(
    GenerateConfig, RunConfig, without=("work", "offline", "revision", "tokenizer", "dry_run")
)
def command(model: Path, prompt: str, configs: Configs) -> None:
    """Write text with MODEL, a model directory, to stdout.

    PROMPT is a user message; pictures come in front of it. With --raw it is text to continue, with
    the model's image marker where each picture belongs. A prompt that is one word with a dash in
    front goes after `--`. Thinking goes to stderr.
    """
    from optiq import pipeline
    from optiq.engine.events import ReasoningDelta, TextDelta

    with output.talk() as emit:
        generation = pipeline.generate(
            model, prompt, configs[GenerateConfig], configs[RunConfig], emit
        )
    for event in generation:
        if isinstance(event, TextDelta):
            click.echo(event.text, nl=False)
        elif isinstance(event, ReasoningDelta):
            click.echo(event.text, nl=False, err=True)
    click.echo()
    if generation.acceptance is not None:
        output.say(_drafts(generation.acceptance))


def _drafts(report: Any) -> str:  # noqa: ANN401  engine.pace.DraftReport, which needs MLX
    """One line about the drafter."""
    if not report.rounds:
        return f"{report.drafter}: nothing was drafted"
    gain = f", {report.speedup:.2f} times plain speed" if report.speedup else ""
    return (
        f"{report.drafter}: {report.accepted} of {report.drafted} drafts accepted, "
        f"{report.accepted_per_round:.2f} a round; {report.steps_per_token:.2f} passes a token"
        f"{gain}"
    )
