"""`optiq judge`: fidelity of a model directory, beside rivals."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optiq.artifacts import Fidelity
from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import JudgeConfig, RunConfig

_COLUMNS = ("model", "bpw", "MB", "KL nats/token", "SE", "p99", "top-1", "ppl ratio")


@click.command("judge", cls=ConfigCommand, context_settings=output.help_names)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--against", metavar="SOURCE", help="Judge against this; default: its own source.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Judge this model on the same text; may be repeated.",
)
@output.json_result
@config_options(JudgeConfig, RunConfig, without=("dry_run",))
def command(
    model: Path,
    against: str | None,
    baselines: tuple[Path, ...],
    as_json: bool,
    configs: Configs,
) -> None:
    """KL and agreement of MODEL with its source on held-out text.

    The text in the package is a quick judge, and its standard error is printed; for a claim give
    text of your own with --text.
    """
    from optiq import pipeline

    with output.talk() as emit:
        fidelities = pipeline.judge(
            model,
            against=against,
            baselines=baselines,
            config=configs[JudgeConfig],
            run=configs[RunConfig],
            emit=emit,
        )
    if as_json:
        output.data(json.dumps(_json(fidelities), indent=1, ensure_ascii=False))
        return
    output.data(output.table([_row(fidelity) for fidelity in fidelities], _COLUMNS))
    output.data("")
    output.data(output.table(_domains(fidelities[0]), ("domain", "KL nats/token", "SE", "top-1")))
    first = fidelities[0]
    output.say(
        f"{first.num_tokens:,} tokens in {first.num_sequences} windows of {first.text}; "
        f"noise floor {first.noise_floor:.2g} nats/token"
    )


def _json(fidelities: list[Fidelity]) -> dict[str, object]:
    model, *baselines = (output.as_dict(fidelity) for fidelity in fidelities)
    return model | {"baselines": baselines} if baselines else model


def _row(fidelity: Fidelity) -> tuple[str, ...]:
    return (
        fidelity.model,
        f"{fidelity.bpw:.3f}",
        f"{fidelity.size_bytes / 1e6:.1f}",
        f"{fidelity.kl_nats_per_token:.4g}",
        f"{fidelity.kl_se:.1g}",
        f"{fidelity.kl_p99:.3g}",
        f"{100 * fidelity.top1_agreement:.1f}%",
        f"{fidelity.perplexity_ratio:.4f}",
    )


def _domains(fidelity: Fidelity) -> list[tuple[str, ...]]:
    return [
        (
            part.domain,
            f"{part.kl_nats_per_token:.4g}",
            f"{part.kl_se:.1g}",
            f"{100 * part.top1_agreement:.1f}%",
        )
        for part in fidelity.by_domain
    ]
