"""The `optiq` command: loads a verb when it is used, and maps errors to exit statuses."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import cast

import click

import optiq
from optiq import settings
from optiq.errors import OptiqError

EXIT_ENGINE = 1
EXIT_INTERRUPTED = 130

VERBS = {
    "convert": "Measure, allocate, quantize, judge and write the card.",
    "judge": "KL and agreement of a quantized model with its source.",
    "eval": "Benchmarks with per-item logs, and the Capability Score.",
    "compare": "Say whether one evaluated model is better than another.",
    "card": "Write the model card from what was measured.",
    "push": "Upload a model directory to the hub.",
    "baseline": "Write the uniform quantization that is not smaller than a model.",
    "measure": "Measure what every bit width costs for every matrix.",
    "plan": "Choose bits for a budget from one measurement.",
    "inspect": "Show the bits, bytes and provenance of a model directory.",
    "generate": "Write text with a model.",
    "serve": "Serve models to OpenAI, Anthropic and Ollama clients.",
    "bench": "Time prefill and decode of a model.",
    "doctor": "Check back end, BLAS, memory and versions.",
    "cache": "List or clear work directories.",
    "config": "Print a commented TOML example of every option.",
    "completion": "Print the line that turns on shell completion.",
}
"""Verb -> one line of help; the command of `verb` is `command` in `optiq.cli.<verb>`."""


class _Verbs(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, imported."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"optiq.cli.{cmd_name}")
        return cast(click.Command, module.command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, with near names for a verb that does not exist."""
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(VERBS)}"
            ctx.fail(f"no command '{name}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: optiq convert SOURCE -o DIR   (SOURCE: directory, hub id or GGUF file)",
)
@click.version_option(optiq.__version__, message="optiq %(version)s")
def command() -> None:
    """The best MLX model for a byte budget: measure, allocate, convert, judge."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after `optiq`; None reads `sys.argv`.

    Returns:
        Exit status: 0 done, 2 the user gave something wrong, 1 the machine or optiq failed, 130
        interrupted. No exception leaves, unless `OPTIQ_DEBUG=1` asks for the traceback.
    """
    debug = settings.load().debug
    try:
        status = command.main(arguments, prog_name="optiq", standalone_mode=False)
    except Exception as error:  # noqa: BLE001  the last handler of the program
        if debug:
            traceback.print_exc()
        return _explain(error)
    return status if isinstance(status, int) else 0


def _explain(error: Exception) -> int:
    """Write one sentence about an error to stderr; returns the exit status."""
    if isinstance(error, click.Abort):
        return _say("interrupted; run the same command again to go on", EXIT_INTERRUPTED)
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, OptiqError):
        return _say(f"error: {error}", error.exit_status)
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away
        return EXIT_ENGINE
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" of {error.filename}" if error.filename else ""
        return _say(
            f"error: the disk{where} is full; free space and run the same command again, or move "
            f"the work directory with --work",
            EXIT_ENGINE,
        )
    text = " ".join(str(error).split()) or "no message"
    return _say(
        f"error: {type(error).__name__}: {text} (this is a fault of optiq or of the machine; "
        f"set OPTIQ_DEBUG=1 to see the traceback)",
        EXIT_ENGINE,
    )


def _say(text: str, status: int) -> int:
    click.echo(text, err=True)
    return status
