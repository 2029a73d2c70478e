"""Every drafter fits its target or is refused, proposes tokens, and leaves the text as it is."""

import dataclasses
import json
import shutil

import pytest

import optiq
from optiq.engine.drafters import DRAFTERS, open_drafter
from optiq.engine.drafters.base import Pairing
from optiq.engine.engine import EngineOptions
from optiq.engine.loading import open_target
from optiq.engine.target import as_row
from optiq.errors import UsageError
from optiq.models.load import load_tokenizer
from tests.gemma4 import ASSISTANT, INFO, TARGET, apart, inputs, reference, stored_patches
from tests.tiny import tiny_checkpoint, write_tokenizer

PROMPT = [2, *range(100, 130), *range(100, 120)]


@pytest.fixture(scope="module")
def pairing():
    opened = open_target(TARGET)
    return Pairing(opened.target, load_tokenizer(TARGET, opened.config), (510, 509))


@pytest.fixture(params=DRAFTERS.names())
def given(request):
    """What a user gives for a drafter of that name."""
    return {"gemma4_assistant": ASSISTANT, "draft_model": TARGET}.get(request.param, request.param)


def test_the_kind_follows_from_what_is_given(given, pairing):
    drafter = open_drafter(given, pairing)
    assert drafter.name in DRAFTERS.names()
    assert type(drafter) is type(DRAFTERS.get(drafter.name)(_path(given), pairing))


def _path(given):
    return given if given in {ASSISTANT, TARGET} else None


def test_proposals_are_tokens_that_may_be_written(given, pairing):
    session = open_drafter(given, pairing).start()
    target = pairing.target
    cache = target.make_cache()
    state = target.states(as_row(PROMPT[:-1]), cache)[:, -1:]
    before = cache.length
    for count in (0, 1, 5):
        proposed = session.propose(PROMPT, state, cache, count)
        assert len(proposed) <= count
        assert all(0 <= token < target.vocab_size for token in proposed)
        assert not {510, 509} & set(proposed)
    assert cache.length == before
    assert len(session.propose(PROMPT, state, cache, 2)) > 0


def test_sampled_text_is_the_same(given):
    def text(drafter, num_drafts):
        engine = optiq.load(TARGET, drafter, EngineOptions(num_drafts=num_drafts))
        settings = {"seed": 5, "max_tokens": 40, "repetition_penalty": 1.1, "top_p": 0.9}
        settings |= {"logprobs": True, "top_logprobs": 2}
        return engine.generate("Hello, MLX! Hello, MLX!", **settings).result()

    plain = text(None, None)
    for num_drafts in (4, None):
        drafted = text(given, num_drafts)
        assert drafted.token_ids == plain.token_ids
        assert drafted.text == plain.text
        assert drafted.finish_reason == plain.finish_reason
        assert drafted.acceptance.tokens >= len(drafted.token_ids)
        pairs = zip(drafted.logprobs, plain.logprobs, strict=True)
        assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)
    assert plain.acceptance is None


def test_a_drafter_of_a_plug_in_is_found_by_name(monkeypatch):
    monkeypatch.setitem(DRAFTERS._targets, "silent", "tests.drafters:open_silent")
    settings = {"seed": 5, "max_tokens": 12}
    plain = optiq.load(TARGET).generate("Hello", **settings).result()
    found = optiq.load(TARGET, "silent").generate("Hello", **settings).result()
    assert found.token_ids == plain.token_ids
    assert found.acceptance.drafted > found.acceptance.accepted == 0


# -- what does not fit ---------------------------------------------------------------------------


def edited(source, folder, change):
    """A copy of a directory with another config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_another_tokenizer_is_refused(pairing, tmp_path, given):
    folder = tmp_path / "drafter"
    if _path(given) is None:
        pytest.skip("it has no tokenizer")
    shutil.copytree(given, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.get)[300:302]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="another tokenizer"):
        open_drafter(folder, pairing)


def test_a_model_of_another_family_is_refused(pairing, tiny_llama):
    with pytest.raises(UsageError, match="another tokenizer"):
        open_drafter(tiny_llama, pairing)


def test_an_assistant_for_a_model_that_is_no_gemma_is_refused(tiny_llama):
    opened = open_target(tiny_llama)
    other = Pairing(opened.target, load_tokenizer(tiny_llama, opened.config))
    with pytest.raises(UsageError, match="drafts for Gemma-4 models"):
        open_drafter(ASSISTANT, other)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("backbone_hidden_size", 96, "(hidden size|cannot be loaded)")],
)
def test_an_assistant_of_another_target_is_refused(pairing, tmp_path, field, value, words):
    folder = edited(ASSISTANT, tmp_path / "a", lambda config: config.update({field: value}))
    with pytest.raises(UsageError, match=words):
        open_drafter(folder, pairing)


def test_an_assistant_with_other_heads_is_refused(tmp_path):
    tiny_checkpoint(tmp_path, "gemma4_text", num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    opened = open_target(tmp_path / "gemma4_text")
    folder = tmp_path / "assistant"
    shutil.copytree(ASSISTANT, folder)
    write_tokenizer(folder)
    tokenizer = load_tokenizer(tmp_path / "gemma4_text", opened.config)
    with pytest.raises(UsageError, match="vocabulary is 512 in the drafter and 320 in the target"):
        open_drafter(folder, Pairing(opened.target, tokenizer))


@pytest.mark.parametrize("given", ["nowhere", "draft_model", "gemma4_assistant"])
def test_a_drafter_that_is_not_there(given, pairing):
    with pytest.raises(UsageError, match="no model directory|give its directory"):
        open_drafter(given, pairing)


def test_an_assistant_alone_is_refused():
    with pytest.raises(UsageError, match="pass it as drafter="):
        optiq.load(ASSISTANT)


def test_a_drafter_without_logits():
    engine = optiq.load(TARGET, "ngram")
    with pytest.raises(UsageError, match="has no logits"):
        engine.draft_logits([2, 5, 6])
    with pytest.raises(UsageError, match="no drafter"):
        optiq.load(TARGET).draft_logits([2, 5, 6])


@pytest.mark.parametrize("name", list(INFO["drafter"]))
def test_logits_of_the_assistant_are_those_of_pytorch(name):
    """From our own state, so the bound is wider than from the stored one."""
    info = INFO["drafter"][name]
    ids, features = inputs(info["prompt_of"])
    images = [] if features is None else stored_patches(info["prompt_of"].removeprefix("image/"))
    for entry in info["entries"]:
        keys, base = entry.removeprefix("sliding_keys_").split("/position_n-")
        options = EngineOptions(position_base=int(base), sliding_keys=int(keys))
        engine = optiq.load(TARGET, ASSISTANT, options)
        found = engine.draft_logits(ids, images)
        assert apart(found, reference()[f"drafter/{name}/{entry}/logits"]) <= 5e-3, entry


def test_options_are_checked():
    with pytest.raises(UsageError, match="num_drafts is 99"):
        dataclasses.replace(EngineOptions(), num_drafts=99)
