"""The steps of measuring and converting, which leave an artifact each.

`stage` loads what an earlier run left when nothing it depends on has changed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from optiq.artifacts import (
    Acceptance,
    Artifact,
    BitPlan,
    Fidelity,
    Rounding,
    RunRecord,
    SensitivityTable,
    write_atomic,
)
from optiq.configs import (
    AllocateConfig,
    ConvertConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
    words_of,
)
from optiq.data.calibration import Record, Windows, builtin_records, read_records, windows
from optiq.drafter_card import DrafterFacts, render_drafter
from optiq.errors import ArtifactMismatch, UsageError
from optiq.evals.acceptance import judge_drafter
from optiq.evals.fidelity import judge_many
from optiq.evals.provenance import provenance
from optiq.events import Emit, Notice, StageDone
from optiq.metadata import license_of
from optiq.models.families import is_drafter
from optiq.models.load import Source, size_on_disk
from optiq.quant import baseline as uniform
from optiq.quant.allocate import allocate
from optiq.quant.convert import write_model
from optiq.quant.directory import finished_directory
from optiq.quant.rounding import RoundedModel, round_without_data
from optiq.quant.sensitivity import EFFORTS, measure_table
from optiq.work import digest, work_directory

_MEASURE_VERSION = 3
_ROUND_VERSION = 1
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


def stage(kind: type[A], path: Path, emit: Emit, make: Callable[[], A]) -> A:
    """The artifact at `path`, which names all it depends on; made and saved if it is not there."""
    if path.is_file():
        emit(StageDone(path.stem.partition("-")[0], reused=True))
        return kind.load(path)
    artifact = make()
    artifact.save(path)
    return artifact


def possible(config: MeasureConfig, source: Source, emit: Emit) -> MeasureConfig:
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


def measured(source: Source, config: MeasureConfig, run: RunConfig, emit: Emit) -> SensitivityTable:
    """The table of a source, or the one that an earlier run left; its state is deleted."""
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


class Conversion:
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
        self.measure_config = possible(measure, source, emit)
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
            table = measured(self.source, self.measure_config, self.run, self.emit)
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
        self,
        table: SensitivityTable | None,
        plan: BitPlan,
        budget: AllocateConfig,
        options: ConvertConfig,
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
            self.describe(table, plan, budget, options, folder)
            facts = DrafterFacts(self.out.name, plan, acceptance, size_on_disk(folder))
            write_atomic(folder / "README.md", render_drafter(facts).encode())
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

    def describe(
        self,
        table: SensitivityTable | None,
        plan: BitPlan,
        budget: AllocateConfig,
        options: ConvertConfig,
        folder: Path,
    ) -> None:
        """Write what was measured and chosen, from what and with which options."""
        if table is not None:
            table.save(folder / "optiq" / "sensitivity.json")
        plan.save(folder / "optiq" / "plan.json")
        kept = (
            *(RunConfig(tokenizer=self.run.tokenizer), self.measure_config, budget),
            *(dataclasses.replace(options, force=False), self.judge_config),
        )
        record = dataclasses.replace(
            RunRecord.now(self.source.info.name, self.run.tokenizer),
            options=words_of(*kept),
            license=license_of(self.source.path),
        )
        record.save(folder / "optiq" / "run.json")

    def clean(self) -> None:
        """Delete the state that only an unfinished run needs."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def heldout_records(config: JudgeConfig) -> tuple[Record, ...]:
    """The held-out text of a judgement."""
    return builtin_records("heldout") if config.text is None else read_records(config.text)
