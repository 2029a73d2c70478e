"""`optiq judge`: fidelity of a model directory, beside rivals."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optiq.artifacts import Depth, Fidelity, PartFidelity
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
    text of your own with --text. --deep shows where the two differ; --window 2048 and more need
    long text.
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
    if first.depth is not None:
        _show(first.depth)
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


def _show(depth: Depth) -> None:
    """Where the model is far from its source."""
    for name, parts in (("position", depth.by_position), ("language", depth.by_language)):
        if parts:
            output.data("")
            output.data(output.table(_parts(parts), (name, "KL nats/token", "SE", "tokens")))
    output.data("")
    worst = f"{100 * depth.worst_share:.1f}% of all KL"
    tail = f"{depth.tail_model:.3g} of the model, {depth.tail_source:.3g} of the source"
    output.data(output.table([("worst 1% of positions", worst), ("probability in tail", tail)]))
    output.data("")
    for token in depth.worst:
        said = f"{token.model_token!r} ({100 * token.model_probability:.0f}%)"
        wanted = f"{token.source_token!r} ({100 * token.source_probability:.0f}%)"
        output.data(f"{token.kl_nats:.3g} nats in {token.domain}: {said} for {wanted} after")
        output.data(f"    {token.context!r}")


def _parts(parts: tuple[PartFidelity, ...]) -> list[tuple[str, ...]]:
    return [
        (
            part.part,
            f"{part.kl_nats_per_token:.4g}",
            "-" if part.kl_se is None else f"{part.kl_se:.1g}",
            str(part.num_tokens),
        )
        for part in parts
    ]
