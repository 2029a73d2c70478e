"""The spine: measure -> allocate -> convert -> judge -> card.

Each stage takes the dataclass of its options, leaves an artifact on disk and returns it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optiq.artifacts import (
    BitPlan,
    Fidelity,
    QuantOption,
    RunRecord,
    SensitivityTable,
    Speed,
)
from optiq.configs import (
    AllocateConfig,
    BenchConfig,
    ConvertConfig,
    EvalConfig,
    GenerateConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
    ServedConfig,
)
from optiq.conversion import Conversion, Release, heldout_records, measured, possible
from optiq.data.benchmarks import BenchmarkData
from optiq.engine.engine import EngineOptions, Generation, load
from optiq.engine.prompts import user_message
from optiq.errors import ArtifactMismatch, TargetMissed, UsageError
from optiq.eval_artifacts import Comparison
from optiq.evals import bench as speed
from optiq.evals import run as benchmarks
from optiq.evals.compare import compare as compared
from optiq.evals.fidelity import judge_many
from optiq.evals.responses import rescore, response_file, score_responses
from optiq.evals.run import Evaluation, estimate
from optiq.evals.scores import read_evaluated
from optiq.evals.subjects.opening import open_subject
from optiq.events import Emit, no_emit
from optiq.models.families import check_standalone, is_drafter
from optiq.models.load import Source, open_source, read_config, size_on_disk
from optiq.preflight import Preflight, preflight
from optiq.quant import baseline as uniform
from optiq.quant.allocate import allocate
from optiq.quant.directory import check_output, finished_directory
from optiq.release import RIVAL, card, push, write_card
from optiq.work import digest, work_directory, work_root

__all__ = [
    "Evaluation",
    "Preflight",
    "Release",
    "Rival",
    "allocate",
    "baseline",
    "bench",
    "card",
    "compare",
    "convert",
    "estimate",
    "evaluate",
    "generate",
    "judge",
    "measure",
    "preflight",
    "rescore",
    "response_file",
    "rival_of",
    "score_responses",
    "push",
]

_KL_ATTEMPTS = 4
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class Rival:
    """A uniform quantization, its bytes, and those of the model it is to be compared with."""

    path: Path
    option: QuantOption
    size_bytes: int
    like_bytes: int


def measure(
    source: str,
    config: MeasureConfig | None = None,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> SensitivityTable:
    """The KL of every option of every matrix of a source.

    Args:
        source: a model directory, GGUF file or hub id.
        config: method, effort, rounding and calibration text.
        run: work directory, tokenizer, revision.
        emit: receives progress.

    Raises:
        UsageError: if the source or the calibration text cannot be used.
        EngineFailure: if the disk or the machine fails.

    Cost: see `quant.sensitivity.measure_table`. A killed run goes on at the block it was at.
    """
    run = run or RunConfig()
    opened = open_source(source, run, emit)
    return measured(opened, possible(config or MeasureConfig(), opened, emit), run, emit)


def convert(  # noqa: PLR0913  the options of five stages
    source: str,
    out: Path,
    *,
    measure: MeasureConfig | None = None,
    allocate: AllocateConfig | None = None,
    convert: ConvertConfig | None = None,
    judge: JudgeConfig | None = None,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> Release:
    """Write the model directory of a source for a budget, with its fidelity and card.

    Args:
        source: a model directory, GGUF file or hub id.
        out: directory to write; it appears when it is whole.
        measure: used where no table or plan is given, and for the calibration text.
        allocate: the budget.
        convert: given artifacts; whether an output of ours may be replaced.
        judge: held-out text.
        run: work directory, tokenizer, revision.
        emit: receives progress.

    Raises:
        UsageError: if the source, an artifact, the budget or the output path cannot be used.
        EngineFailure: if the disk or the machine fails.
        TargetMissed: if a KL target was missed; the directory is written all the same.
    """
    options = convert or ConvertConfig()
    budget, run = allocate or AllocateConfig(), run or RunConfig()
    check_output(out, force=options.force)
    opened = open_source(source, run, emit)
    if options.drafter_target is not None and not is_drafter(opened.config):
        raise UsageError(
            f"--drafter-target is for drafters, and {source} is a {opened.info.model_type}; leave "
            "it out"
        )
    job = Conversion(opened, out, measure or MeasureConfig(), judge or JudgeConfig(), run, emit)
    table, plan = job.planned(options, budget)
    if is_drafter(opened.config):
        return job.drafter(table, plan, budget, options)
    with finished_directory(out, replace=options.force) as folder:
        for attempt in range(1, _KL_ATTEMPTS + 1):
            fidelity, *rivals = job.written(plan, folder, rival=options.rival)
            missed = budget.target_kl is not None and fidelity.kl_nats_per_token > budget.target_kl
            if table is None or not missed or attempt == _KL_ATTEMPTS:
                break
            plan = job.corrected(table, plan, budget, fidelity)
        fidelity.save(folder / "optiq" / "fidelity.json")
        for found in rivals:
            found.save(folder / RIVAL)
        job.describe(table, plan, budget, options, folder)
        write_card(folder, out.name)
    job.clean()
    if missed:
        raise TargetMissed(
            f"{out} is written, but its KL is {fidelity.kl_nats_per_token:.4g} nats per token on "
            f"the held-out text, above --target-kl {budget.target_kl:g}; give a lower target"
        )
    return Release(out, plan, fidelity, tuple(rivals), out / "README.md")


def judge(
    model: Path,
    *,
    against: str | None = None,
    baselines: Sequence[Path] = (),
    config: JudgeConfig | None = None,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> list[Fidelity]:
    """Fidelity of a model directory, and of others on the same text, to their source.

    Args:
        model: an MLX model directory.
        against: the source; default: the one that a model of ours was made from.
        baselines: other directories made from the same source.
        config: held-out text and windows.
        run: work directory, tokenizer, revision of the source.
        emit: receives progress.

    Returns:
        One result for the model, then one for each baseline.

    Raises:
        UsageError: if the source is not known or gone, or a directory is not made from it.
    """
    config, run = config or JudgeConfig(), run or RunConfig()
    for path in (model, *baselines):
        check_standalone(read_config(path))
    source = open_source(against, run, emit) if against else _own_source(model, run, emit)
    paths = [model, *baselines]
    return judge_many(
        paths, source, heldout_records(config), config, work_directory(source, run), emit
    )


def _own_source(model: Path, run: RunConfig, emit: Emit) -> Source:
    """The source that a model of ours was made from, if it is still the same."""
    if not (model / "optiq" / "plan.json").is_file():
        raise UsageError(
            f"{model} does not say what it was made from; give the source with --against"
        )
    plan = BitPlan.load(model / "optiq" / "plan.json")
    path = model / "optiq" / "run.json"
    record = RunRecord.load(path) if path.is_file() else None  # it is not uploaded
    ref = (record and record.source_path) or plan.source.name
    revision = run.revision or plan.source.revision
    tokenizer = run.tokenizer or (Path(record.tokenizer) if record and record.tokenizer else None)
    try:
        source = open_source(
            ref, dataclasses.replace(run, revision=revision, tokenizer=tokenizer), emit
        )
    except UsageError as error:
        raise UsageError(
            f"the source of {model} cannot be opened: {error}; give it with --against"
        ) from None
    if source.info.fingerprint != plan.source.fingerprint:
        raise ArtifactMismatch(
            f"{ref} is no longer what {model} was made from; give that source with --against"
        )
    return source


def baseline(
    source: str,
    like: Path,
    out: Path,
    *,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> Rival:
    """Write the smallest uniform quantization that is not smaller than `like`, else the largest.

    Raises:
        UsageError: if the source cannot be used, `like` is no model or `out` exists.
    """
    check_output(out, force=False)
    read_config(like)
    like_bytes = size_on_disk(like)
    opened = open_source(source, run, emit)
    option = uniform.pick_uniform(opened, like_bytes)
    size_bytes = uniform.write_uniform(opened, option, out, emit)
    return Rival(out, option, size_bytes, like_bytes)


def bench(model: Path, config: BenchConfig | None = None, emit: Emit = no_emit) -> Speed:
    """Prefill and decode speed of a model directory; see `evals.bench.bench`."""
    check_standalone(read_config(model))
    return speed.bench(model, config or BenchConfig(), emit)


def evaluate(
    model: Path | None,
    logs: Path | None = None,
    *,
    config: EvalConfig | None = None,
    served: ServedConfig | None = None,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> Evaluation:
    """Run benchmarks on a model directory or URL, or go on where a run was killed.

    Args:
        model: an MLX model directory; None for the model at `served`.
        logs: directory of logs; default: in the work directory, by model and options.
        config: benchmarks, and how they are asked.
        served: the URL, in place of a directory.
        run: work directory, tokenizer.
        emit: receives progress.

    Raises:
        UsageError: if data are missing, or the model cannot be asked what the benchmarks ask.
        EngineFailure: if the machine or the server fails; what was answered is kept.
    """
    config, run = config or EvalConfig(), run or RunConfig()
    tasks = benchmarks.chosen_tasks(config)
    subject = open_subject(model, config, served or ServedConfig(), run)
    key = digest(subject.info.fingerprint, dataclasses.replace(config, tasks=()))
    logs = logs or work_root(run) / f"eval-{key}"
    data = BenchmarkData(config.data_dir, run.offline)
    return Evaluation(benchmarks.evaluate(subject, tasks, config, data, logs, emit), logs)


def rival_of(model: Path, run: RunConfig | None = None, emit: Emit = no_emit) -> Path:
    """The uniform rival of a model of ours, in the work directory; made if it is not there.

    Raises:
        UsageError: if the model does not say what it was made from, or that is gone.
    """
    run = run or RunConfig()
    source = _own_source(model, run, emit)
    option = uniform.pick_uniform(source, size_on_disk(model))
    # cards call it by the name of its directory
    out = work_directory(source, run) / f"uniform-{option.bits}bit-g{option.group_size}"
    if not out.is_dir():
        uniform.write_uniform(source, option, out, emit)
    return out


def compare(a: Path, b: Path, tasks: Sequence[str] = (), *, seed: int = 0) -> Comparison:
    """Whether one evaluated model is better than another, from logs of the same items.

    Args:
        a: a directory of logs, or a model directory with logs in `optiq/evals`.
        b: that of the rival.
        tasks: benchmarks to compare; all that both have if empty.
        seed: of the resampling.

    Raises:
        UsageError: if a directory holds no finished logs of the benchmarks.

    Reference: docs/statistics.md; `evals.compare`.
    """
    return compared(read_evaluated(a, tasks), read_evaluated(b, tasks), seed=seed)


def generate(
    model: Path,
    prompt: str,
    config: GenerateConfig | None = None,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> Generation:
    """The answer of a model directory to one user turn, as events.

    Args:
        model: a model directory, source or artifact.
        prompt: the user turn, or with `raw` the text to continue; a model without a chat template
            always continues it.
        config: pictures, sampling, drafter.
        run: memory limit.
        emit: receives notices.

    Raises:
        UsageError: if the directory is no model that can be run, or something cannot be honoured.
    """
    config, run = config or GenerateConfig(), run or RunConfig()
    if not prompt.strip() and not config.image:
        raise UsageError("the prompt is empty; give some text")
    fixed = None if config.num_drafts == "auto" else int(config.num_drafts)
    options = EngineOptions(memory_limit=run.memory_limit, num_drafts=fixed)
    engine = load(model, config.drafter, options, emit)
    raw = config.raw or not engine.prompts.has_template
    detail: Any = config.image_detail
    return engine.generate(
        prompt if raw else [user_message(prompt, len(config.image))],
        config.image,
        thinking=config.thinking,
        image_detail=int(detail) if detail.isdecimal() else detail,
        stop=list(config.stop),
        **{name: getattr(config, name) for name in _SAMPLING},
    )
