"""`optiq compare`: two evaluations, item by item, and one verdict."""

from __future__ import annotations

from pathlib import Path

import click

from optiq.cli import output
from optiq.eval_artifacts import CAPABILITY, Comparison

_COLUMNS = (
    *("benchmark", "items", "A %", "B %", "A - B", "95% interval", "gained", "lost"),
    *("p", "p (Holm)", "MDE"),
)


@click.command("compare", context_settings=output.help_names)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--tasks", multiple=True, metavar="NAME", help="Compare this benchmark alone; may be repeated."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the resampling.")
@output.json_result
def command(a: Path, b: Path, tasks: tuple[str, ...], seed: int, as_json: bool) -> None:
    """Say whether A is better than B, from logs of the same items.

    A and B are folders that `optiq eval -o` wrote, or model directories with logs in optiq/evals.
    A is better if the 95% interval of the difference excludes 0 and its file is not more than 1%
    larger; docs/statistics.md says what each figure is.
    """
    from optiq import pipeline

    found = pipeline.compare(a, b, tasks, seed=seed)
    if as_json:
        output.data(found.to_json().rstrip())
        return
    show(found)


def show(found: Comparison) -> None:
    """Print both models, the benchmarks and the verdict."""
    output.data(output.table([("A", *_about(found, 0)), ("B", *_about(found, 1))]))
    output.data("")
    if found.benchmarks:
        output.data(output.table(_rows(found), _COLUMNS))
        output.data("")
    output.data(found.sentence)


def _about(found: Comparison, which: int) -> tuple[str, str]:
    """Name and size of a model."""
    size_bytes = (found.size_bytes, found.rival_size_bytes)[which]
    size = "bytes not known" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"
    return (found.model, found.rival)[which], size


def _rows(found: Comparison) -> list[tuple[str, ...]]:
    """A row a benchmark, and one for their mean."""
    rows: list[tuple[str, ...]] = [
        (
            CAPABILITY.get(row.task, row.task),
            str(row.num_items),
            f"{row.score_percent:.2f}",
            f"{row.rival_percent:.2f}",
            *_difference(row.delta_points, row.ci_points),
            str(row.gained),
            str(row.lost),
            f"{row.p_value:.3g}",
            f"{row.p_holm:.3g}",
            f"{row.mde_points:.2f}",
        )
        for row in found.benchmarks
    ]
    if found.overall is not None:
        mean = found.overall
        rows.append(
            (
                "Capability Score" if found.is_capability else f"mean of {len(rows)}",
                str(sum(row.num_items for row in found.benchmarks)),
                f"{mean.score_percent:.2f}",
                f"{mean.rival_percent:.2f}",
                *_difference(mean.delta_points, mean.ci_points),
                str(sum(row.gained for row in found.benchmarks)),
                str(sum(row.lost for row in found.benchmarks)),
                f"{mean.p_value:.3g}",
                "-",
                f"{mean.mde_points:.2f}",
            )
        )
    return rows


def _difference(delta: float, ci: tuple[float, float]) -> tuple[str, str]:
    return f"{delta:+.2f}", f"{ci[0]:+.2f} to {ci[1]:+.2f}"
