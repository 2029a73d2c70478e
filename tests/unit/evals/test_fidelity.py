"""The judge against plain forward passes of the whole models."""

import shutil

import numpy as np
import pytest

from optiq.artifacts import Fidelity, QuantOption
from optiq.backend import mx
from optiq.configs import JudgeConfig
from optiq.data.calibration import Record, windows
from optiq.errors import EngineFailure, UsageError
from optiq.evals.fidelity import judge, judge_many
from optiq.events import no_emit
from optiq.models.load import open_quantized, open_source
from optiq.quant.baseline import write_uniform
from tests.tiny import tiny_checkpoint

CONFIG = JudgeConfig(window=32)


def records(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"short": 40, "long": 400, "longer": 700}
    return [
        Record(name, name, text="".join(map(chr, rng.integers(33, 126, size))))
        for name, size in sizes.items()
    ]


def whole(source, tokens):
    """Float64 log-probabilities of an unstreamed float32 model."""
    model = source.model()
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(tokens))).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def judged(tiny_source, quantized, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    results = judge_many(quantized, tiny_source, records(), CONFIG, work, no_emit)
    assert list(work.iterdir()) == []
    return results


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "olmoe"])
def test_figures_equal_those_of_whole_models(tmp_path, family):
    source = open_source(str(tiny_checkpoint(tmp_path, family)))
    out = tmp_path / "out"
    write_uniform(source, QuantOption("affine", 4, 64), out, no_emit)
    found = judge(out, source, records(), CONFIG, tmp_path / "work", no_emit)

    chosen = windows(records(), source.tokenizer, source.config, window=32, count=None, seed=0)
    p, q = whole(source, chosen.tokens), whole(open_quantized(out), chosen.tokens)
    kl = (np.exp(p) * (p - q)).sum(-1)
    index = chosen.tokens[:, 1:, None]
    nll = [-np.take_along_axis(x[:, :-1], index, -1).mean() for x in (p, q)]
    assert found.num_tokens == kl.size
    assert found.num_sequences == len(chosen.tokens)
    assert found.kl_nats_per_token == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    means = kl.mean(axis=1)
    assert found.kl_se == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)), rel=1e-3)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2e-3)
    assert found.perplexity_ratio == pytest.approx(np.exp(nll[1] - nll[0]), rel=1e-4)
    for part in found.by_domain:
        member = [name == part.domain for name in chosen.domains]
        assert part.kl_nats_per_token == pytest.approx(kl[member].mean(), rel=1e-3)
        assert part.num_tokens == kl[member].size


def test_more_bits_are_closer_and_the_floor_is_below(judged):
    good, bad = judged
    assert 0 < good.kl_nats_per_token < bad.kl_nats_per_token / 20
    assert good.top1_agreement > bad.top1_agreement
    assert 0 <= good.noise_floor == bad.noise_floor < good.kl_nats_per_token / 100


def test_sizes_are_stored_ones(judged, quantized):
    good, bad = judged
    assert good.bpw == pytest.approx(9.0)
    assert bad.bpw == pytest.approx(3.5)
    assert good.size_bytes == (quantized.good / "model.safetensors").stat().st_size


def test_domains_are_in_order_and_small_ones_have_a_stderr(judged):
    good, _ = judged
    assert [part.domain for part in good.by_domain] == ["short", "long", "longer"]
    assert good.by_domain[0].num_tokens == CONFIG.window
    assert all(part.kl_se > 0 for part in good.by_domain)


def test_the_result_survives_json(judged, tmp_path):
    judged[0].save(tmp_path / "fidelity.json")
    assert Fidelity.load(tmp_path / "fidelity.json") == judged[0]


def test_fewer_windows_are_drawn_over_the_domains(tiny_source, quantized, tmp_path):
    config = JudgeConfig(window=32, max_windows=5)
    found = judge(quantized.good, tiny_source, records(), config, tmp_path, no_emit)
    assert found.num_sequences == 5
    assert [part.num_tokens // 32 for part in found.by_domain] == [1, 2, 2]


def test_an_unquantized_copy_has_no_divergence(tiny_source, tmp_path):
    found = judge(tiny_source.path, tiny_source, records(), CONFIG, tmp_path, no_emit)
    assert found.kl_nats_per_token < 1e-10
    assert found.top1_agreement == 1.0
    assert found.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert found.bpw == 16.0


def test_a_killed_run_goes_on_and_gives_the_same(tiny_source, quantized, tmp_path):
    class Killed(Exception):
        pass

    stages = []

    def kill_in_the_second_model(event):
        stages.append(getattr(event, "stage", ""))
        if stages[-1] == "good on the same":
            raise Killed

    with pytest.raises(Killed):
        judge(quantized.good, tiny_source, records(), CONFIG, tmp_path, kill_in_the_second_model)
    assert list(tmp_path.iterdir())
    seen = []
    again = judge(quantized.good, tiny_source, records(), CONFIG, tmp_path, seen.append)
    fresh = judge(quantized.good, tiny_source, records(), CONFIG, tmp_path / "b", no_emit)
    assert again == fresh
    blocks = [e for e in seen if getattr(e, "done", 0) and e.stage.startswith("source")]
    assert blocks == []


def test_another_models_directory_is_refused(tiny_source, tmp_path):
    other = tiny_checkpoint(tmp_path, intermediate_size=512)
    with pytest.raises(UsageError, match=r"not made from .*--against"):
        judge(other, tiny_source, records(), CONFIG, tmp_path / "work", no_emit)


def test_text_too_short_for_a_window(tiny_source, quantized, tmp_path):
    short = [Record("a", "d", text="abc")]
    with pytest.raises(UsageError, match="at least 32"):
        judge(quantized.good, tiny_source, short, CONFIG, tmp_path, no_emit)


def test_logits_that_are_not_finite_are_an_engine_failure(tiny_source, quantized, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(quantized.good, broken)
    weights = mx.load(str(broken / "model.safetensors"))
    name = "model.layers.1.mlp.down_proj.scales"
    weights[name] = weights[name] * 1e38
    mx.eval(weights)
    mx.save_safetensors(str(broken / "model.safetensors"), weights, metadata={"format": "mlx"})
    with pytest.raises((EngineFailure, UsageError), match="finite|NaN or inf"):
        judge(broken, tiny_source, records(), CONFIG, tmp_path / "work", no_emit)
