"""`optiq eval`: benchmarks of a model, scores of recorded answers, and a look at them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optiq.artifacts import BenchmarkResult, EvalReport
from optiq.cli import compare, eval_show, output
from optiq.cli.options import ConfigCommand, Configs, config_options
from optiq.configs import EvalConfig, RunConfig, ServedConfig
from optiq.errors import UsageError
from optiq.eval_artifacts import CAPABILITY
from optiq.events import Emit

if TYPE_CHECKING:
    from optiq.pipeline import Evaluation

_COLUMNS = ("benchmark", "n", "score", "SE", "95% CI", "truncated", "loops", "version")
_BASELINE = "baseline"


class _Eval(ConfigCommand):
    """The verb; `show` as its first word is a command of its own."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,  # noqa: ANN401  click's
    ) -> click.Context:
        """As click; `eval show ...` is the context of `show`."""
        if args[:1] == ["show"]:
            show = eval_show.command
            return show.make_context(f"{info_name} show", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(
    "eval",
    cls=_Eval,
    context_settings=output.help_names,
    epilog="Browse the answers in a directory of logs with: optiq eval show LOGS",
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    "--log-dir",
    "logs",
    type=click.Path(path_type=Path),
    help="Directory of logs; a run that was stopped goes on there. Default: in the cache.",
)
@click.option(
    "--baseline",
    metavar="auto|DIR",
    help="Evaluate a rival too, into LOGS/baseline; auto: the uniform one of equal bytes.",
)
@click.option(
    "--responses",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Score lines of {"id", "response"} from elsewhere, for one --tasks; without MODEL.',
)
@click.option("--partial", is_flag=True, help="With --responses: items without one are left out.")
@click.option(
    "--rescore",
    type=click.Path(path_type=Path),
    metavar="LOGS",
    help="Score the answers in a directory of logs again; without MODEL.",
)
@output.json_result
@config_options(EvalConfig, ServedConfig, RunConfig, without=("memory_limit", "revision"))
def command(  # noqa: PLR0913  flags
    model: Path | None,
    logs: Path | None,
    baseline: str | None,
    responses: Path | None,
    partial: bool,
    rescore: Path | None,
    as_json: bool,
    configs: Configs,
) -> None:
    """Run benchmarks on MODEL, a model directory, or on the model at --served URL.

    Every answer is in LOGS/TASK.jsonl, the scores are in LOGS/report.json. The Capability Score,
    the mean of six, is printed where all six are whole. The same command goes on where a run was
    stopped.
    """
    _check(model, configs[ServedConfig], responses, rescore)
    if partial and responses is None:
        raise UsageError("--partial says which items --responses has; give that file")
    if baseline and model is None:
        raise UsageError("--baseline is the rival of a model directory; give MODEL")
    if configs[RunConfig].dry_run:
        _dry_run(model, configs, as_json, measured=responses is None and rescore is None)
        return
    with output.talk() as emit:
        if responses is not None:
            found = [_scored(responses, logs, partial, configs, emit)]
        elif rescore is not None:
            found = [_rescored(rescore, logs, configs, emit)]
        else:
            found = _evaluated(model, logs, baseline, configs, emit)
    _show(found, as_json)


def _check(
    model: Path | None, served: ServedConfig, responses: Path | None, rescore: Path | None
) -> None:
    """Refuse none or several of what can be scored."""
    ways = {
        "MODEL": model,
        "--served": served.served,
        "--responses": responses,
        "--rescore": rescore,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(given) or "none"
        raise UsageError(f"give one of {', '.join(ways)}; there is {what}")


def _dry_run(model: Path | None, configs: Configs, as_json: bool, *, measured: bool) -> None:
    from optiq import pipeline

    if not measured:
        raise UsageError("--dry-run estimates the time of a model; there is none to ask")
    rows = pipeline.estimate(model, configs[EvalConfig], configs[ServedConfig], configs[RunConfig])
    output.data(json.dumps({"rows": dict(rows)}) if as_json else output.table(rows))


def _scored(
    responses: Path, logs: Path | None, partial: bool, configs: Configs, emit: Emit
) -> Evaluation:
    from optiq import pipeline

    config, run = configs[EvalConfig], configs[RunConfig]
    file = pipeline.response_file(responses, config, partial=partial)
    return pipeline.score_responses(file, logs, config=config, run=run, emit=emit)


def _rescored(rescore: Path, logs: Path | None, configs: Configs, emit: Emit) -> Evaluation:
    from optiq import pipeline

    if logs is not None:
        raise UsageError("--rescore writes into the logs it reads; leave out -o")
    return pipeline.rescore(rescore, configs[EvalConfig], configs[RunConfig], emit)


def _evaluated(
    model: Path | None, logs: Path | None, baseline: str | None, configs: Configs, emit: Emit
) -> list[Evaluation]:
    """The model, and its rival if one is wanted."""
    from optiq import pipeline

    config, run = configs[EvalConfig], configs[RunConfig]
    served = configs[ServedConfig]
    found = [
        pipeline.evaluate(model, logs, config=config, served=served, run=run, emit=emit),
    ]
    if baseline is not None and model is not None:
        rival = pipeline.rival_of(model, run, emit) if baseline == "auto" else Path(baseline)
        beside = found[0].logs / _BASELINE
        found.append(pipeline.evaluate(rival, beside, config=config, run=run, emit=emit))
    return found


def _show(found: list[Evaluation], as_json: bool) -> None:
    from optiq import pipeline

    two = len(found) == 2
    comparison = pipeline.compare(found[0].logs, found[1].logs) if two else None
    if as_json:
        own, *rivals = ({**output.as_dict(e.report), "logs": str(e.logs)} for e in found)
        if comparison is not None:
            own |= {"baseline": rivals[0], "comparison": output.as_dict(comparison)}
        output.data(json.dumps(own, indent=1))
        return
    for number, each in enumerate(found):
        report = each.report
        size = "" if report.size_bytes is None else f", {report.size_bytes / 1e6:.1f} MB"
        bpw = "" if report.bpw is None else f", {report.bpw:.3f} bpw"
        output.data(("\n" if number else "") + report.model + size + bpw)
        rows = [_row(name, result) for name, result in report.benchmarks.items()]
        output.data(output.table(rows, _COLUMNS))
        if report.mean is not None:
            output.data(_capability(report, report.mean))
        output.say(f"logs and report: {each.logs}")
        _explain(report.benchmarks)
    if comparison is not None:
        output.data("")
        compare.show(comparison)


def _capability(report: EvalReport, mean: float) -> str:
    """The mean of the six with its standard error, and how many items are behind it."""
    rows = [row for name, row in report.benchmarks.items() if name in CAPABILITY]
    errors = [row.se for row in rows if row.se is not None]
    known = len(errors) == len(rows)
    error = f" ± {100 * math.hypot(*errors) / len(rows):.2f}" if known else ""
    return f"Capability Score {100 * mean:.2f}{error} over {sum(row.n for row in rows):,} items"


def _row(name: str, result: BenchmarkResult) -> tuple[str, ...]:
    low, high = result.ci95 or (None, None)
    return (
        name,
        f"{result.n:,}",
        _percent(result.score, 2),
        _percent(result.se, 2),
        "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}",
        f"{100 * result.truncated:.1f}%",
        f"{100 * result.looped:.1f}%",
        result.version,
    )


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _explain(benchmarks: dict[str, BenchmarkResult]) -> None:
    """Say what failed, and pass@k where there is more than one answer to an item."""
    for name, result in benchmarks.items():
        if result.num_null:
            output.say(
                f"{name}: the harness failed on {result.num_null} answers, so there is no score; "
                f"run the same command again, or look with optiq eval show LOGS --null"
            )
        if result.pass_at:
            rates = ", ".join(f"pass@{k} {100 * v:.2f}" for k, v in result.pass_at.items())
            output.data(f"{name}: {rates}")
