"""`optiq plan`: a measurement to the Pareto curve and a plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optiq.artifacts import BitPlan, SensitivityTable
from optiq.cli import output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import AllocateConfig

if TYPE_CHECKING:
    from optiq.quant.allocate import ParetoPoint


@click.command("plan", cls=ConfigCommand, context_settings=output.help_names)
@click.argument("sensitivity", type=click.Path(path_type=Path))
@output.output_option("Write the plan here, for `optiq convert --plan`.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curve: .svg or .png.")
@output.json_result
@config_options(AllocateConfig)
def command(
    sensitivity: Path, out: Path | None, plot: Path | None, as_json: bool, configs: Configs
) -> None:
    """Choose bits for a budget from SENSITIVITY, a file that `optiq measure` wrote.

    Shows the best reachable KL for every size, then the plan for the budget. No weights are read.
    """
    from optiq.quant import allocate, plots

    config = configs[AllocateConfig]
    measured = SensitivityTable.load(sensitivity)
    plan = allocate.allocate(measured, config)
    curve = allocate.pareto(measured, config)
    if plot is not None:
        plots.plot_pareto(curve, plot)
    if out is not None:
        plan.save(out)
    if as_json:
        output.data(plan.to_json().rstrip())
        return
    output.data(_curve(curve, plan))
    output.data("")
    output.data(output.table(_summary(plan, allocate.floors(measured, config))))
    for path in filter(None, (out, plot)):
        output.say(f"wrote {path}")


def _curve(curve: list[ParetoPoint], plan: BitPlan) -> str:
    """The table of the curve, marked where the plan lies."""
    from optiq.quant import plots

    rows = plots.pareto_rows(curve)
    below = sum(point.bpw <= plan.bpw for point in curve)
    marked = [(*row, "<- plan" if index == below - 1 else "") for index, row in enumerate(rows)]
    return output.table(marked, (*plots.PARETO_COLUMNS, ""))


def _summary(plan: BitPlan, floors: dict[str, str]) -> list[tuple[str, str]]:
    """Figures of a plan, by name."""
    from optiq.numerics.size import format_size

    counts = Counter(entry.option for entry in plan.entries)
    options = ", ".join(f"{number} at {option.key}" for option, number in sorted(counts.items()))
    rows = [
        ("target", plan.target),
        ("stored", f"{plan.bpw:.4f} bpw, {format_size(plan.model_bytes)} (upper bound)"),
        ("predicted KL", f"{plan.predicted_kl:.4g} nats/token"),
        ("optimality gap", f"at most {100 * plan.gap:.3g}%"),
        ("modules", options),
    ]
    rows += [
        ("floor", f"{number} modules, {reason}")
        for reason, number in Counter(floors.values()).items()
    ]
    return rows
