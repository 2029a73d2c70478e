"""`optiq serve`: models behind HTTP."""

from __future__ import annotations

import click

from optiq import extras
from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import ServeConfig

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpcore", "llguidance")


@click.command("serve", cls=ConfigCommand, context_settings=output.help_names)
@config_options(ServeConfig)
@click.pass_context
def command(context: click.Context, configs: Configs) -> None:
    """Serve models to clients of OpenAI, Anthropic and Ollama.

    The URL goes to stdout when connections are taken, the log to stderr. SIGTERM and Ctrl-C let
    running answers end first (--drain); a second one does not.
    """
    for module in _NEEDED:
        extras.load(module, extra="serve", purpose="optiq serve")
    from optiq.server import life

    context.exit(life.run(configs[ServeConfig], output.data))
