"""Divergence taken apart, against plain sums over hand-made figures."""

import dataclasses

import numpy as np
import pytest

from optiq.artifacts import Fidelity
from optiq.cli import judge as cli
from optiq.configs import JudgeConfig
from optiq.data.calibration import Record, windows
from optiq.errors import UnsupportedModel, UsageError
from optiq.evals import fidelity as module
from optiq.evals.depth import depth
from optiq.evals.fidelity import judge
from optiq.events import Notice, no_emit
from optiq.models.load import context_length, open_source
from optiq.numerics.divergence import Divergence
from tests.tiny import tiny_checkpoint


def records():
    rng = np.random.default_rng(1)
    rows = [("prose", "en", 90), ("prose", "de", 200), ("code", None, 150), ("code", "en", 130)]
    return [
        Record(str(n), domain, language, text="".join(map(chr, rng.integers(33, 126, size))))
        for n, (domain, language, size) in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def chosen(tiny_source):
    return windows(
        records(), tiny_source.tokenizer, tiny_source.config, window=96, count=None, seed=0
    )


@pytest.fixture(scope="module")
def made(chosen):
    rng = np.random.default_rng(2)
    shape = chosen.tokens.shape

    def some(high=1.0):
        return rng.uniform(0, high, shape).astype(np.float32)

    tops = rng.integers(65, 90, (2, *shape))
    return Divergence(some(0.1), *tops, some(), some(), some(0.01), some(0.01), some(), some())


@pytest.fixture(scope="module")
def taken(made, chosen, tiny_tokenizer):
    return depth(made, chosen, [record.language for record in records()], tiny_tokenizer)


def test_positions_are_in_buckets_that_double(made, taken):
    assert [(part.part, part.num_tokens) for part in taken.by_position] == [
        ("0-63", 64 * len(made.kl)),
        ("64-95", 32 * len(made.kl)),
    ]
    for part, columns in zip(taken.by_position, (slice(64), slice(64, 96)), strict=True):
        assert part.kl_nats_per_token == pytest.approx(made.kl[:, columns].mean(), rel=1e-5)
        means = made.kl[:, columns].mean(axis=1)
        assert part.kl_se == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)), rel=1e-4)


def test_languages_are_those_of_the_records_and_unknown_is_none(made, chosen, taken):
    language = np.array([record.language or "" for record in records()])[chosen.records]
    assert {part.part for part in taken.by_language} == {"en", "de"}
    for part in taken.by_language:
        member = language == part.part
        assert part.num_tokens == member.sum()
        assert part.kl_nats_per_token == pytest.approx(made.kl[member].mean(), rel=1e-5)
    assert sum(part.num_tokens for part in taken.by_language) < made.kl.size
    assert [p.num_tokens for p in taken.by_language] == sorted(
        (p.num_tokens for p in taken.by_language), reverse=True
    )


def test_tail_and_worst_share(made, taken):
    assert taken.tail_source == pytest.approx(made.tail_p.mean(), rel=1e-5)
    assert taken.tail_model == pytest.approx(made.tail_q.mean(), rel=1e-5)
    ranked = np.sort(made.kl.ravel())[::-1]
    assert taken.worst_share == pytest.approx(
        ranked[: round(0.01 * ranked.size)].sum() / ranked.sum(), rel=1e-5
    )


def test_worst_tokens_are_shown_in_their_text(made, chosen, taken):
    assert [token.kl_nats for token in taken.worst] == pytest.approx(
        np.sort(made.kl.ravel())[::-1][:20]
    )
    first = taken.worst[0]
    row, position = np.unravel_index(made.kl.argmax(), made.kl.shape)
    text = bytes(t + 33 for t in chosen.tokens[row] if t < 94).decode("latin-1")
    assert first.position == position
    assert first.domain == chosen.domains[row]
    assert first.source_probability == pytest.approx(made.sure_p[row, position])
    assert first.model_probability == pytest.approx(made.sure_q[row, position])
    assert len(first.context) == min(48, position + 1)
    assert first.context + (first.following or "") in text
    assert len(first.source_token) == len(first.model_token) == 1


def test_no_divergence_has_no_worst_share(made, chosen, tiny_tokenizer):
    none = made._replace(kl=np.zeros_like(made.kl))
    assert depth(none, chosen, [None] * 4, tiny_tokenizer).worst_share == 0.0
    assert depth(none, chosen, [None] * 4, tiny_tokenizer).by_language == ()


def test_judge_deep_adds_up_and_survives_json(tiny_source, quantized, tmp_path, capsys):
    config = JudgeConfig(window=96, deep=True)
    found = judge(quantized.bad, tiny_source, records(), config, tmp_path / "w", no_emit)
    whole = sum(p.kl_nats_per_token * p.num_tokens for p in found.depth.by_position)
    assert whole / found.num_tokens == pytest.approx(found.kl_nats_per_token, rel=1e-5)
    assert found.depth.worst[0].kl_nats > found.kl_p99
    assert 0 < found.depth.worst_share < 1
    found.save(tmp_path / "f.json")
    assert Fidelity.load(tmp_path / "f.json") == found
    plain = judge(
        quantized.bad, tiny_source, records(), JudgeConfig(window=96), tmp_path / "w", no_emit
    )
    assert plain == dataclasses.replace(found, depth=None)
    cli._show(found.depth)
    text = capsys.readouterr().out
    assert "position" in text
    assert text.count(" nats in ") == 20


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "llama_untied"])
def test_a_window_judged_in_pieces_gives_the_same(tmp_path, family, monkeypatch):
    source = open_source(str(tiny_checkpoint(tmp_path, family)))
    (tmp_path / "b").mkdir()
    other = tiny_checkpoint(tmp_path / "b", family, seed=1)
    config = JudgeConfig(window=96, deep=True)
    whole = judge(other, source, records(), config, tmp_path / "w", no_emit)
    sizes = []
    divergence = module.divergence

    def spied(p, q, tokens):
        sizes.append(p.shape[1])
        return divergence(p, q, tokens)

    monkeypatch.setattr(module, "divergence", spied)
    monkeypatch.setattr(module, "_MOST_LOGITS", 40 * 320)
    cut = judge(other, source, records(), config, tmp_path / "w", no_emit)
    assert set(sizes) == {40, 16}
    assert cut.num_tokens == whole.num_tokens
    for name in ("kl_nats_per_token", "kl_se", "kl_p99", "perplexity_ratio", "top1_agreement"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    for ours, theirs in zip(cut.depth.worst, whole.depth.worst, strict=True):
        assert ours.kl_nats == pytest.approx(theirs.kl_nats, rel=1e-4)


def test_a_head_that_mixes_positions_is_not_cut(tiny_source, quantized, tmp_path, monkeypatch):
    logits = module._LastOutputs.logits

    def mixing(self, positions):
        found = logits(self, positions)
        return found + found.mean(axis=1, keepdims=True)

    monkeypatch.setattr(module._LastOutputs, "logits", mixing)
    monkeypatch.setattr(module, "_MOST_LOGITS", 40 * 320)
    with pytest.raises(UnsupportedModel, match="shorter --window"):
        judge(quantized.bad, tiny_source, records(), JudgeConfig(window=96), tmp_path, no_emit)


def test_a_window_beyond_the_context_is_refused(tiny_source, quantized, tmp_path):
    config = JudgeConfig(window=513)
    with pytest.raises(UsageError, match="--window 513 is longer than the 512 tokens"):
        judge(quantized.good, tiny_source, records(), config, tmp_path, no_emit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        (
            {"text_config": {"max_position_embeddings": 131072}, "max_position_embeddings": 1},
            131072,
        ),
        ({"n_positions": 1024}, 1024),
        ({"model_type": "mamba"}, None),
    ],
)
def test_context_length(config, wanted):
    assert context_length(config) == wanted


def test_domains_without_a_window_are_named(tiny_source, quantized, tmp_path):
    seen = []
    short = Record("s", "short", text="too short")
    config = JudgeConfig(window=96)
    judge(quantized.good, tiny_source, [*records(), short], config, tmp_path, seen.append)
    notices = [event.text for event in seen if isinstance(event, Notice)]
    assert notices == ["not judged, for want of a window of text or of --max-windows: short"]
