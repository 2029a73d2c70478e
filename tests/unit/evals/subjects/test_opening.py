"""A directory or a URL, and the spine over both."""

import pytest

from optiq import pipeline
from optiq.configs import (
    AllocateConfig,
    EvalConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
    ServedConfig,
)
from optiq.errors import UsageError
from optiq.evals import run
from optiq.evals.subjects.opening import open_subject
from tests.tiny import tiny_checkpoint
from tests.unit.evals.subjects import tasks
from tests.unit.evals.subjects.stand_in import StandIn, message, ok


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    class Known:
        def get(self, _name):
            return tasks.CHAT

    monkeypatch.setattr(run, "TASKS", Known())


def test_one_of_them(tmp_path):
    for model, url in ((None, None), (tmp_path, "http://localhost:1")):
        with pytest.raises(UsageError, match="one of them"):
            open_subject(model, EvalConfig(), ServedConfig(served=url), RunConfig())
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_subject(tmp_path, EvalConfig(), ServedConfig(), RunConfig())


def test_logs_of_other_options_lie_elsewhere(tiny_llama, tmp_path):
    config, work = EvalConfig(tasks=("sums",), limit=2), RunConfig(work=tmp_path)
    found = pipeline.evaluate(tiny_llama, config=config, run=work)
    assert found.logs.parent == tmp_path
    assert found.report.benchmarks["sums"].n == 2
    assert pipeline.evaluate(tiny_llama, config=config, run=work) == found
    more = pipeline.evaluate(tiny_llama, config=EvalConfig(tasks=("sums",), limit=3), run=work)
    assert more.logs != found.logs
    rows = pipeline.estimate(tiny_llama, config, ServedConfig(), work)
    assert rows[0][0] == "sums"
    assert rows[0][1].startswith("2 answers, up to about ")


def test_a_url_through_the_spine(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIQ_API_KEY", "secret")
    replies = {"models": ok({"data": [{"id": "m"}]}), "chat/completions": message("1")}
    with StandIn(replies) as server:
        served = ServedConfig(served=f"{server.url}/v1/")
        found = pipeline.evaluate(None, tmp_path, config=EvalConfig(tasks=("sums",)), served=served)
        assert found.report.benchmarks["sums"].score == pytest.approx(1 / 12)
        assert {headers["Authorization"] for _, _, headers in server.requests} == {"Bearer secret"}
    assert "secret" not in (tmp_path / "sums.json").read_text()


def test_the_rival_of_a_model_of_ours(tmp_path):
    source = tiny_checkpoint(tmp_path)
    work = RunConfig(work=tmp_path / "work")
    made = pipeline.convert(
        str(source),
        tmp_path / "made",
        measure=MeasureConfig(method="static", rounding="rtn"),
        allocate=AllocateConfig(target_bpw=5.0),
        judge=JudgeConfig(window=16, max_windows=2),
        run=work,
    )
    rival = pipeline.rival_of(made.path, work)
    assert rival == pipeline.rival_of(made.path, work)
    assert rival.name == "uniform-5bit-g128"
    sizes = [(p / "model.safetensors").stat().st_size for p in (made.path, rival)]
    assert sizes[0] <= sizes[1] < 1.2 * sizes[0]
    info = open_subject(made.path, EvalConfig(), ServedConfig(), work).info
    assert info.source == str(source)
