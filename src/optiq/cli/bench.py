"""`optiq bench`: speed of a model on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import BenchConfig


@click.command("bench", cls=ConfigCommand, context_settings=output.help_names)
@click.argument("model", type=click.Path(path_type=Path))
@output.json_result
@config_options(BenchConfig)
def command(model: Path, as_json: bool, configs: Configs) -> None:
    """Time prefill and decode of MODEL in the engine; writes MODEL/optiq/speed.json."""
    from optiq import pipeline

    with output.talk() as emit:
        speed = pipeline.bench(model, configs[BenchConfig], emit)
    path = model / "optiq" / "speed.json"
    speed.save(path)
    if as_json:
        output.data(speed.to_json().rstrip())
        return
    rows = [
        ("prefill", f"{speed.prefill_tps:.1f} tokens/s ({speed.prompt_tokens} tokens)"),
        ("decode", f"{speed.decode_tps:.1f} tokens/s ({speed.new_tokens} tokens)"),
        ("peak memory", f"{speed.peak_memory_bytes / 1e6:.0f} MB"),
        ("device", speed.provenance.device),
        ("written", str(path)),
    ]
    output.data(output.table(rows))
