"""A model directory with every artifact, without a model."""

import dataclasses
from pathlib import Path

import numpy as np

from optiq.artifacts import RunRecord, SensitivityTable
from optiq.configs import AllocateConfig
from optiq.eval_artifacts import CAPABILITY
from optiq.quant.allocate import allocate
from tests.unit.cli.fakes import make_fidelity, make_speed
from tests.unit.evals.logs import write_logs
from tests.unit.quant.tables import PROVENANCE, llama_modules, make_source, random_table

MADE = dataclasses.replace(PROVENANCE, optiq="0.1.0", mlx="0.32.4", mlx_lm="0.32.2", device="GPU X")


def make_measured(revision: str | None = "c" * 40) -> SensitivityTable:
    """A measurement of a hub source."""
    source = dataclasses.replace(make_source(), name="org/base", revision=revision)
    table = random_table(llama_modules(2), seed=0, lattice=True, source=source)
    mix = {"prose": 8, "code": 6, "agent": 2}
    return dataclasses.replace(
        table, checks={"split_half": 0.987}, calibration_mix=mix, provenance=MADE
    )


def make_bare(folder: Path) -> Path:
    """Only what tells a directory of ours: a plan, weights and config."""
    source = dataclasses.replace(make_source(), name="models/base")
    table = random_table(llama_modules(2), seed=0, source=source)
    folder.mkdir(parents=True)
    allocate(table, AllocateConfig(target_bpw=4.5)).save(folder / "optiq" / "plan.json")
    (folder / "model.safetensors").write_bytes(bytes(250_000))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def make_whole(folder: Path) -> Path:
    """Everything but logs."""
    table = make_measured()
    folder.mkdir(parents=True)
    optiq = folder / "optiq"
    plan = allocate(table, AllocateConfig(target_bpw=4.5))
    plan.save(optiq / "plan.json")
    table.save(optiq / "sensitivity.json")
    fidelity = dataclasses.replace(
        make_fidelity("mine"), bpw=plan.bpw, size_bytes=250_000, provenance=MADE
    )
    fidelity.save(optiq / "fidelity.json")
    dataclasses.replace(
        fidelity, model="uniform 4/64", kl_nats_per_token=0.0456, size_bytes=251_000
    ).save(optiq / "rival.json")
    dataclasses.replace(make_speed(), provenance=MADE).save(optiq / "speed.json")
    RunRecord(
        date="2026-11-27T00:00:00+00:00",
        source_path=None,
        tokenizer=None,
        options=("--target-bpw", "4.5", "--pin", "*.o_proj=6/64"),
        license={"license": "apache-2.0"},
    ).save(optiq / "run.json")
    (folder / "model.safetensors").write_bytes(bytes(250_000))
    (folder / "optiq_vision.safetensors").write_bytes(bytes(70_000))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def make_logs(folder: Path) -> tuple[Path, Path]:
    """Logs of six benchmarks, of a model and of a rival that is a little worse."""
    rng = np.random.default_rng(0)
    ours, theirs = {}, {}
    for task in CAPABILITY:
        chance = rng.uniform(size=200)
        samples = 4 if task == "hashhop" else 1
        ours[task] = (rng.binomial(samples, chance**0.7) / samples).tolist()
        theirs[task] = (rng.binomial(samples, chance) / samples).tolist()
    return (
        write_logs(folder / "ours", ours, model="mine", size_bytes=250_000),
        write_logs(folder / "theirs", theirs, model="uniform 4/64", size_bytes=251_000),
    )
