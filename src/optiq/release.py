"""A model directory for others: its logs, pictures and card, and the way to the hub."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TypeVar

from optiq.artifacts import (
    Artifact,
    BitPlan,
    EvalLog,
    Fidelity,
    RunRecord,
    SensitivityTable,
    Speed,
    write_atomic,
)
from optiq.card import PICTURES, SIDE_MODELS, CardFacts, render
from optiq.configs import AllocateConfig, words_of
from optiq.errors import UsageError
from optiq.eval_artifacts import CAPABILITY, BenchmarkScore, Comparison
from optiq.evals.compare import compare
from optiq.evals.log import config_of
from optiq.evals.log import read_headers as read_logs
from optiq.evals.scores import LOGS, REPORT, logs_of, read_evaluated, summary
from optiq.events import Emit, no_emit
from optiq.hub_upload import Upload, planned, send
from optiq.metadata import license_of
from optiq.models.load import size_on_disk
from optiq.models.safetensors_io import disk_failure, read_headers
from optiq.quant import plots
from optiq.quant.allocate import pareto
from optiq.quant.directory import MARK

RIVAL = Path("optiq") / "rival.json"
"""Fidelity of the uniform rival, where it was judged."""
_BASELINE = LOGS / "baseline"
_COMPARISON = LOGS / "comparison.json"
_LOG_FILES = ("*.json", "*.jsonl")

A = TypeVar("A", bound=Artifact)


def card(
    model: Path,
    *,
    logs: Path | None = None,
    baseline_logs: Path | None = None,
    name: str | None = None,
) -> Path:
    """Write the card of a model directory from what was measured.

    Args:
        model: a directory that optiq wrote.
        logs: of its benchmarks, to be copied into it; None: those that are there.
        baseline_logs: of a rival on the same items, likewise.
        name: that the card calls the model by, such as its repository; default: the directory's.

    Returns:
        The path of the card.

    Raises:
        UsageError: if optiq did not write the directory, logs are not finished or an artifact
            cannot be read; then nothing is changed.
        EngineFailure: if the disk refuses.
    """
    if not (model / MARK).is_file():
        raise UsageError(f"{model} was not written by optiq (it has no {MARK})")
    _add_logs(model, logs, baseline_logs)
    return write_card(model, name or model.resolve().name)


def _add_logs(model: Path, logs: Path | None, baseline_logs: Path | None) -> None:
    """Copy logs into a model directory, in the place of older ones, and compare them.

    Args:
        model: the directory.
        logs: of the model; None: those that are there, if there are.
        baseline_logs: of the baseline; None: those that are there, if there are.

    Raises:
        UsageError: if a folder holds no finished logs, or there are a baseline's logs alone; then
            nothing is changed.
    """
    given = {
        target: logs_of(folder)
        for target, folder in ((LOGS, logs), (_BASELINE, baseline_logs))
        if folder is not None
    }
    for folder in given.values():
        read_evaluated(folder)  # both refuse what cannot be read
        read_logs(folder)
    if LOGS not in given and not (model / LOGS / REPORT).is_file():
        if given:
            raise UsageError(f"{model} has no logs to compare with --baseline-logs; give --logs")
        return
    for target, folder in given.items():
        _replace_logs(folder, model / target)
    comparison = model / _COMPARISON
    with disk_failure(model):
        comparison.unlink(missing_ok=True)
    if (model / _BASELINE / REPORT).is_file():
        ours, theirs = read_evaluated(model / LOGS), read_evaluated(model / _BASELINE)
        compare(ours, theirs).save(comparison)


def _replace_logs(origin: Path, target: Path) -> None:
    """Copy the files of logs; the report is the last, so that logs with one are whole.

    Headers lose the places of files on this machine, because the directory is there to be uploaded.
    """
    if origin.resolve() == target.resolve():
        return
    files = sorted(file for pattern in _LOG_FILES for file in origin.glob(pattern))
    headers = read_logs(origin)
    with disk_failure(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / REPORT).unlink(missing_ok=True)
        for pattern in _LOG_FILES:
            for old in target.glob(pattern):
                old.unlink()
        for file in sorted(files, key=lambda file: file.name == REPORT):
            if file.suffix == ".json" and file.stem in headers:
                _without_places(headers[file.stem]).save(target / file.name)
            elif file.is_file():
                shutil.copyfile(file, target / file.name)


def _without_places(header: EvalLog) -> EvalLog:
    """The header with the names of files and directories alone."""
    options = dict(header.options)
    options |= {
        name: Path(value).name
        for name in ("data_dir", "task_file")
        if isinstance(value := options.get(name), str)
    }
    return dataclasses.replace(header, options=options)


def write_card(model: Path, name: str) -> Path:
    """Write the card of a model directory, with its pictures if matplotlib is there.

    Args:
        model: the directory.
        name: that the model is loaded under: the directory's, or the repository's.

    Raises:
        UsageError: if an artifact is missing or cannot be read.
    """
    facts = _facts(model, name)
    write_atomic(model / "README.md", render(facts).encode())
    return model / "README.md"


def _facts(model: Path, name: str) -> CardFacts:
    """What the directory's files say."""
    folder = model / "optiq"
    plan = BitPlan.load(model / MARK)
    table = _artifact(SensitivityTable, folder / "sensitivity.json")
    fidelity = _artifact(Fidelity, folder / "fidelity.json")
    rival = _artifact(Fidelity, model / RIVAL)
    rivals = () if rival is None else (rival,)
    run = _artifact(RunRecord, folder / "run.json")
    license_kept = license_of(model) if run is None or not run.license else run.license
    return CardFacts(
        name=name,
        plan=plan,
        size_bytes=size_on_disk(model),
        table=table,
        fidelity=fidelity,
        rivals=rivals,
        speed=_artifact(Speed, folder / "speed.json"),
        scores=_scores(model),
        asked=_asked(model),
        cut_off=_cut_off(model),
        comparison=_artifact(Comparison, model / _COMPARISON),
        options=run.options if run else None,
        license=license_kept,
        side_models={
            file: (model / file).stat().st_size for file in SIDE_MODELS if (model / file).is_file()
        },
        pictures=_draw(model, plan, table, [f for f in (fidelity, rival) if f is not None]),
    )


def _artifact(kind: type[A], path: Path) -> A | None:
    """An artifact; None where there is none."""
    return kind.load(path) if path.is_file() else None


def _scores(model: Path) -> tuple[BenchmarkScore, ...]:
    """Of the benchmarks whose items all have a score."""
    if not (model / LOGS / REPORT).is_file():
        return ()
    found = (summary(scores) for scores in read_evaluated(model / LOGS).scores.values())
    return tuple(score for score in found if score is not None)


def _asked(model: Path) -> tuple[tuple[str, ...], ...]:
    """Words after `optiq eval MODEL` that ask the benchmarks again, a line for each way to ask."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for task, header in _headers(model).items():
        config = dataclasses.replace(config_of(header, model / LOGS), tasks=(), data_dir=None)
        ways.setdefault(words_of(config), []).append(task)
    return tuple(
        (() if set(tasks) == set(CAPABILITY) else ("--tasks", ",".join(tasks))) + words
        for words, tasks in ways.items()
    )


def _cut_off(model: Path) -> dict[str, float]:
    """Share of the answers to a benchmark that were not at their end, where there are such."""
    headers = _headers(model).items()
    return {t: h.num_truncated / h.num_answers for t, h in headers if h.num_truncated}


def _headers(model: Path) -> dict[str, EvalLog]:
    """Of the benchmarks that were run on the directory, in the order of cards."""
    if not (model / LOGS / REPORT).is_file():
        return {}
    found = read_logs(model / LOGS)
    order = [*CAPABILITY, *(task for task in found if task not in CAPABILITY)]
    return {t: found[t] for t in order if t in found and found[t].subject.kind == "local"}


def _draw(
    model: Path, plan: BitPlan, table: SensitivityTable | None, judged: list[Fidelity]
) -> tuple[str, ...]:
    """Draw what can be drawn; returns the names of the pictures.

    Without matplotlib older pictures go, because they may show another plan.
    """
    drawn = []
    if plots.can_plot():
        plots.plot_plan(plan, model / PICTURES["bits"])
        drawn.append("bits")
        curve = []
        if table is not None and table.method != "static":  # whose scores are no KL
            curve = pareto(table, AllocateConfig())
        if any(point.predicted_kl > 0 for point in curve):
            names = ("this model", *(fidelity.model for fidelity in judged[1:]))
            points = [
                plots.MeasuredPoint(name, fidelity.bpw, fidelity.kl_nats_per_token)
                for name, fidelity in zip(names, judged, strict=True)
            ]
            plots.plot_pareto(curve, model / PICTURES["kl"], points)
            drawn.append("kl")
    for name, file in PICTURES.items():
        if name not in drawn:
            (model / file).unlink(missing_ok=True)
    return tuple(drawn)


def push(
    model: Path, repo: str, *, private: bool = False, upload: bool = False, emit: Emit = no_emit
) -> Upload:
    """Upload a model directory to the hub, or say what would be uploaded.

    Args:
        model: a directory that optiq wrote, with its card.
        repo: `organization/name`; made if it is not there.
        private: make it private.
        upload: really do it; else nothing is asked of the network.
        emit: receives progress.

    Raises:
        UsageError: if the directory is not whole or not ours, or the hub refuses.
        EngineFailure: if the hub fails or cannot be reached.
    """
    if not (model / MARK).is_file():
        raise UsageError(f"{model} was not written by optiq (it has no {MARK})")
    again = "convert the model again"
    for names, remedy in (
        (("config.json",), again),
        (("tokenizer.json", "tokenizer.model", "vocab.json"), again),
        (("README.md",), "write its card with optiq card"),
    ):
        if not any((model / name).is_file() for name in names):
            raise UsageError(f"{model} is not whole (it has no {names[0]}); {remedy}")
    read_headers(model)  # refuses shards that are missing or cut short
    plan = planned(model, repo, private=private)
    return send(model, plan, emit) if upload else plan
