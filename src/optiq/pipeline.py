"""The spine: measure -> allocate -> convert -> judge -> card.

Each stage takes the dataclass of its options, leaves an artifact on disk and returns it. `stage`
loads what an earlier run left when nothing it depends on has changed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

from optiq import card
from optiq.artifacts import (
    Acceptance,
    Artifact,
    BitPlan,
    Fidelity,
    QuantOption,
    Rounding,
    RunRecord,
    SensitivityTable,
    Speed,
    write_atomic,
)
from optiq.backend import is_cpu
from optiq.configs import (
    AllocateConfig,
    BenchConfig,
    ConvertConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
)
from optiq.data.calibration import Record, Windows, builtin_records, read_records, windows
from optiq.data.chat import prompt as chat_prompt
from optiq.errors import ArtifactMismatch, TargetMissed, UsageError
from optiq.evals import bench as speed
from optiq.evals.acceptance import judge_drafter
from optiq.evals.fidelity import judge_many
from optiq.evals.provenance import provenance
from optiq.events import Emit, Notice, StageDone, no_emit
from optiq.models.families import check_standalone, is_drafter
from optiq.models.load import Source, load_tokenizer, open_source, read_config, size_on_disk
from optiq.preflight import Preflight, preflight
from optiq.quant import baseline as uniform
from optiq.quant.allocate import allocate
from optiq.quant.convert import write_model
from optiq.quant.directory import check_output, finished_directory
from optiq.quant.rounding import RoundedModel, round_without_data
from optiq.quant.sensitivity import EFFORTS, measure_table
from optiq.upstream import dense_float32, generate_text, load_quantized
from optiq.work import digest, work_directory

__all__ = [
    "Preflight",
    "Release",
    "Rival",
    "allocate",
    "baseline",
    "bench",
    "convert",
    "generate",
    "judge",
    "measure",
    "preflight",
]

_MEASURE_VERSION = 2
_ROUND_VERSION = 1
_KL_ATTEMPTS = 4
_KL_MARGIN = 0.93
A = TypeVar("A", bound=Artifact)


@dataclasses.dataclass(frozen=True)
class Release:
    """A finished model directory.

    Attributes:
        path: the directory.
        plan: bits of every matrix.
        fidelity: agreement with the source on held-out text; None for a drafter.
        rivals: the same of the uniform rival, if it was asked for.
        card: the card's path.
        acceptance: of a drafter whose target was given.
    """

    path: Path
    plan: BitPlan
    fidelity: Fidelity | None
    rivals: tuple[Fidelity, ...]
    card: Path
    acceptance: Acceptance | None = None


@dataclasses.dataclass(frozen=True)
class Rival:
    """A uniform quantization, its bytes, and those of the model it is to be compared with."""

    path: Path
    option: QuantOption
    size_bytes: int
    like_bytes: int


def stage(kind: type[A], path: Path, emit: Emit, make: Callable[[], A]) -> A:
    """The artifact at `path`, which names all it depends on; made and saved if it is not there."""
    if path.is_file():
        emit(StageDone(path.stem.partition("-")[0], reused=True))
        return kind.load(path)
    artifact = make()
    artifact.save(path)
    return artifact


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
    return _measured(opened, _possible(config or MeasureConfig(), opened, emit), run, emit)


def _possible(config: MeasureConfig, source: Source, emit: Emit) -> MeasureConfig:
    """How a source is measured: a drafter, which cannot run alone, by its weights."""
    if not is_drafter(source.config):
        return config
    if config.verify:
        raise UsageError("--verify runs the model, and a drafter does not run alone; leave it out")
    rounding = "rtn" if config.rounding == "rtn" else "search"
    emit(
        Notice(
            "a drafter does not run alone, so its matrices are scored without data (static) and "
            f"rounded by '{rounding}'"
        )
    )
    return dataclasses.replace(
        config, method="static", reference="source", rounding=cast(Rounding, rounding)
    )


def _measured(
    source: Source, config: MeasureConfig, run: RunConfig, emit: Emit
) -> SensitivityTable:
    text = calibration_windows(source, config, EFFORTS[config.effort].num_windows)
    work = work_directory(source, run)
    key = digest(_MEASURE_VERSION, source.info, text.digest, _table_options(config))
    folder = work / f"measure-{key}"

    def make() -> SensitivityTable:
        return measure_table(source, text, config, folder, provenance(), emit)

    table = stage(SensitivityTable, work / f"sensitivity-{key}.json", emit, make)
    shutil.rmtree(folder, ignore_errors=True)
    emit(Notice(_about_grids(table)))
    return table


def _about_grids(table: SensitivityTable) -> str:
    """What the weights of a source say about how it was trained."""
    found = [m.lattice for m in table.modules if m.lattice.kind != "none"]
    if not found:
        return "no matrix lies on a 4-bit grid, so all of them are rounded"
    exact = sum(lattice.exact for lattice in found)
    return (
        f"{len(found)} of {len(table.modules)} matrices lie on a 4-bit grid, {exact} of them "
        "exactly; their grid can be kept at 5.0 stored bits a weight"
    )


def _table_options(config: MeasureConfig) -> tuple[object, ...]:
    """The options that a table depends on besides its text."""
    return (config.method, config.reference, config.rounding, config.seed, config.verify)


def calibration_windows(source: Source, config: MeasureConfig, count: int) -> Windows:
    """At most `count` calibration windows in the source's tokens, the same ones first."""
    records: tuple[Record, ...] = ()
    if config.calibration is None or config.extend_calibration:
        records = builtin_records("calibration")
    if config.calibration is not None:
        records += read_records(config.calibration)
    return windows(
        records,
        source.tokenizer,
        source.config,
        window=EFFORTS[config.effort].window,
        count=count,
        seed=config.seed,
    )


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
    job = _Conversion(opened, out, measure or MeasureConfig(), judge or JudgeConfig(), run, emit)
    table, plan = job.planned(options, budget)
    if is_drafter(opened.config):
        return job.drafter(table, plan, options)
    with finished_directory(out, replace=options.force) as folder:
        for attempt in range(1, _KL_ATTEMPTS + 1):
            fidelity, *rivals = job.written(plan, folder, rival=options.rival)
            missed = budget.target_kl is not None and fidelity.kl_nats_per_token > budget.target_kl
            if table is None or not missed or attempt == _KL_ATTEMPTS:
                break
            plan = job.corrected(table, plan, budget, fidelity)
        facts = card.CardFacts(out.name, plan, table, fidelity, tuple(rivals))
        job.describe(facts, folder)
    job.clean()
    if missed:
        raise TargetMissed(
            f"{out} is written, but its KL is {fidelity.kl_nats_per_token:.4g} nats per token on "
            f"the held-out text, above --target-kl {budget.target_kl:g}; give a lower target"
        )
    return Release(out, plan, fidelity, tuple(rivals), out / "README.md")


class _Conversion:
    """The steps of one `convert`."""

    def __init__(
        self,
        source: Source,
        out: Path,
        measure: MeasureConfig,
        judge: JudgeConfig,
        run: RunConfig,
        emit: Emit,
    ) -> None:
        self.source, self.out, self.run, self.emit = source, out, run, emit
        self.measure_config = _possible(measure, source, emit)
        self.judge_config = judge
        self.work = work_directory(source, run)
        self.text = calibration_windows(source, measure, EFFORTS[measure.effort].rounding_windows)
        self.heldout = heldout_records(judge)
        self._folders: list[Path] = []

    def planned(
        self, options: ConvertConfig, budget: AllocateConfig
    ) -> tuple[SensitivityTable | None, BitPlan]:
        """The plan that was given, or the best one for the budget, with its table."""
        if options.plan is not None:
            plan = BitPlan.load(options.plan)
            self._check_match(plan, options.plan)
            return None, plan
        if options.sensitivity is not None:
            table = SensitivityTable.load(options.sensitivity)
            self._check_match(table, options.sensitivity)
        else:
            table = _measured(self.source, self.measure_config, self.run, self.emit)
        return table, allocate(table, budget)

    def _check_match(self, artifact: SensitivityTable | BitPlan, path: Path) -> None:
        if artifact.source.fingerprint != self.source.info.fingerprint:
            raise ArtifactMismatch(
                f"{path} was made for {artifact.source.name} (fingerprint "
                f"{artifact.source.fingerprint[:12]}), not for this source "
                f"({self.source.info.fingerprint[:12]}); measure this one"
            )
        if artifact.rounding != self.measure_config.rounding:
            raise ArtifactMismatch(
                f"{path} assumes the rounding '{artifact.rounding}', not "
                f"'{self.measure_config.rounding}'; give --rounding {artifact.rounding} or measure "
                f"again"
            )

    def written(self, plan: BitPlan, folder: Path, *, rival: bool) -> list[Fidelity]:
        """Write the weights of a plan into `folder`; judge them, if wanted beside the rival."""
        entries = [(e.path, e.option) for e in plan.entries]
        key = digest(_ROUND_VERSION, self.source.info, self.text.digest, plan.rounding, entries)
        state = self.work / f"round-{key}"
        rounded = RoundedModel(self.source, plan, self.text.tokens, state, self.emit).run()
        write_model(self.source, plan, rounded, folder, self.emit)
        models = {self.out.name: folder}
        if rival:
            option = uniform.pick_uniform(self.source, size_on_disk(folder))
            models[f"uniform {option.key}"] = state / "rival"
            shutil.rmtree(state / "rival", ignore_errors=True)
            uniform.write_uniform(self.source, option, state / "rival", self.emit)
        found = judge_many(
            list(models.values()),
            self.source,
            self.heldout,
            self.judge_config,
            self.work,
            self.emit,
        )
        self._folders.append(state)
        return [dataclasses.replace(f, model=m) for f, m in zip(found, models, strict=True)]

    def drafter(
        self, table: SensitivityTable | None, plan: BitPlan, options: ConvertConfig
    ) -> Release:
        """The release of a drafter, which is judged by how often its target agrees."""
        if options.rival:
            raise UsageError(
                "--rival compares models that run alone; leave it out for a drafter, and give "
                "--drafter-target to measure its acceptance"
            )
        state = self.work / f"round-{digest(_ROUND_VERSION, self.source.info, plan.entries)}"
        state.mkdir(parents=True, exist_ok=True)
        self._folders.append(state)
        acceptance = None
        with finished_directory(self.out, replace=options.force) as folder:
            file = state / "rounded.safetensors"
            rounded = round_without_data(self.source, plan, file, self.emit)
            write_model(self.source, plan, rounded, folder, self.emit)
            if options.drafter_target is not None:
                target, text = options.drafter_target, self.heldout
                found = judge_drafter(
                    folder, self.source, target, text, self.judge_config, self.emit
                )
                acceptance = dataclasses.replace(found, drafter=self.out.name)
                acceptance.save(folder / "optiq" / "acceptance.json")
            self._describe(table, plan, folder)
            facts = card.DrafterFacts(self.out.name, plan, acceptance, size_on_disk(folder))
            write_atomic(folder / "README.md", card.render_drafter(facts).encode())
        self.clean()
        return Release(self.out, plan, None, (), self.out / "README.md", acceptance)

    def corrected(
        self, table: SensitivityTable, plan: BitPlan, budget: AllocateConfig, found: Fidelity
    ) -> BitPlan:
        """A plan for a KL target, corrected by how far the last prediction was off."""
        assert budget.target_kl is not None
        self.emit(
            Notice(
                f"KL is {found.kl_nats_per_token:.4g}, not the {plan.predicted_kl:.4g} that was "
                f"predicted; planning again for {budget.target_kl:g}"
            )
        )
        off = found.kl_nats_per_token / plan.predicted_kl
        aim = dataclasses.replace(budget, target_kl=_KL_MARGIN * budget.target_kl / off)
        return dataclasses.replace(allocate(table, aim), target=plan.target)

    def describe(self, facts: card.CardFacts, folder: Path) -> None:
        """Write the artifacts and the card."""
        self._describe(facts.table, facts.plan, folder)
        facts.fidelity.save(folder / "optiq" / "fidelity.json")
        write_atomic(folder / "README.md", card.render(facts).encode())

    def _describe(self, table: SensitivityTable | None, plan: BitPlan, folder: Path) -> None:
        """Write what was measured and chosen, and from what."""
        if table is not None:
            table.save(folder / "optiq" / "sensitivity.json")
        plan.save(folder / "optiq" / "plan.json")
        RunRecord.now(self.source.info.name, self.run.tokenizer).save(folder / "optiq" / "run.json")

    def clean(self) -> None:
        """Delete the state that only an unfinished run needs."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def heldout_records(config: JudgeConfig) -> tuple[Record, ...]:
    """The held-out text of a judgement."""
    return builtin_records("heldout") if config.text is None else read_records(config.text)


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
    record = RunRecord.load(model / "optiq" / "run.json")
    ref = record.source_path or plan.source.name
    revision = run.revision or plan.source.revision
    tokenizer = run.tokenizer or (Path(record.tokenizer) if record.tokenizer else None)
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


def generate(
    model: Path, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0, raw: bool = False
) -> Iterator[str]:
    """Pieces of the answer of a model directory to one user turn, through stock mlx-lm.

    On the CPU the weights are unpacked to float32 once: four bytes a weight of memory.

    Args:
        model: an MLX model directory.
        prompt: the user turn, or with `raw` the text to continue.
        max_tokens: most tokens to write.
        temperature: 0 always takes the most likely token.
        raw: no chat template.

    Raises:
        UsageError: if the directory is no model that mlx-lm can load, or the prompt is empty.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty; give some text")
    config = read_config(model)
    check_standalone(config)
    tokenizer = load_tokenizer(model, config)
    ids = tokenizer.encode(prompt) if raw else chat_prompt(tokenizer, prompt)
    loaded, _ = load_quantized(model)
    if is_cpu():
        loaded = dense_float32(loaded)
    for response in generate_text(loaded, tokenizer, ids, max_tokens, temperature):
        yield response.text
