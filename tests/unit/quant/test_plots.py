"""Pictures are written, equal for equal input, and refused in words; rows add up."""

import importlib
import re
from pathlib import Path

import pytest

from optiq.artifacts import ModuleInfo
from optiq.configs import AllocateConfig
from optiq.errors import UsageError
from optiq.quant.allocate import ParetoPoint, allocate, pareto
from optiq.quant.plots import (
    PARETO_COLUMNS,
    PLAN_COLUMNS,
    MeasuredPoint,
    pareto_rows,
    plan_rows,
    plot_pareto,
    plot_plan,
)
from tests.unit.quant.tables import llama_modules, random_table

TABLE = random_table(llama_modules(3), 0, lattice=True)
PLAN = allocate(TABLE, AllocateConfig(target_bpw=5.5))
POINTS = pareto(TABLE, AllocateConfig())


def test_svg_is_deterministic(tmp_path: Path):
    for draw, data in ((plot_plan, PLAN), (plot_pareto, POINTS)):
        first, second = tmp_path / "a.svg", tmp_path / "b.svg"
        draw(data, first)
        draw(data, second)
        assert first.read_bytes() == second.read_bytes()
        assert b"<svg" in first.read_bytes()
        assert b"dc:date" not in first.read_bytes()


def test_png(tmp_path: Path):
    for draw, data in ((plot_plan, PLAN), (plot_pareto, POINTS)):
        draw(data, tmp_path / "new" / "a.PNG")
        assert (tmp_path / "new" / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_plan_without_layers(tmp_path: Path):
    table = random_table([ModuleInfo("lm_head", "head", (64, 64))], 0)
    plan = allocate(table, AllocateConfig())
    plot_plan(plan, tmp_path / "a.svg")
    assert [row[0] for row in plan_rows(plan)] == ["lm_head"]


def test_single_point(tmp_path: Path):
    plot_pareto([ParetoPoint(4.5, 10**6, 0.1)], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()


def test_measured_models_are_marked_by_name(tmp_path: Path):
    marked = [MeasuredPoint("this model", 4.5, 0.02), MeasuredPoint("no KL", 16.0, 0.0)]
    plot_pareto(POINTS, tmp_path / "a.svg", marked)
    labels = re.findall("<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert {"predicted", "this model", "KL (nats per token)"} <= set(labels)
    assert "no KL" not in labels


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_pareto([ParetoPoint(16.0, 10**6, 0.0)], tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_other_suffix(tmp_path: Path):
    with pytest.raises(UsageError, match=r"'\.pdf'; pictures end in \.svg or \.png"):
        plot_plan(PLAN, tmp_path / "a.pdf")


def test_matplotlib_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match="pip install 'matplotlib"):
        plot_pareto(POINTS, tmp_path / "a.svg")


def test_plan_rows():
    rows = plan_rows(PLAN)
    assert [row[0] for row in rows] == ["model.embed_tokens", "0", "1", "2"]
    assert {len(row) for row in rows} == {len(PLAN_COLUMNS)}
    assert rows[0][-1] == PLAN.entries[0].option.key
    for row in rows[1:]:
        named = [word for word in row[-1].replace(",", "").split() if word.endswith("_proj")]
        assert len(named) == len(set(named)) == 7
    assert sum(float(row[3]) for row in rows) == pytest.approx(PLAN.predicted_kl, rel=0.01)


def test_stacks_of_layers_are_told_apart():
    modules = [ModuleInfo(f"{s}.layers.0.proj", "linear", (64, 64)) for s in ("enc", "dec")]
    plan = allocate(random_table(modules, 0), AllocateConfig(pin=("*=4/64",)))
    assert [row[0] for row in plan_rows(plan)] == ["enc.layers.0", "dec.layers.0"]


def test_two_modules_of_one_name_in_a_layer():
    modules = [ModuleInfo(f"layers.0.{s}.up", "linear", (64, 64)) for s in ("shared", "experts")]
    plan = allocate(random_table(modules, 0), AllocateConfig(pin=("*=4/64",)))
    assert plan_rows(plan)[0][-1] == "4/64 shared.up experts.up"


def test_pareto_rows():
    rows = pareto_rows(POINTS)
    assert {len(row) for row in rows} == {len(PARETO_COLUMNS)}
    assert rows[-1] == (f"{POINTS[-1].bpw:.2f}", rows[-1][1], "0")
    assert rows[0][1].endswith("B")
