"""Chunks of several prompts in one pass, against a forward pass of each alone."""

import dataclasses

import numpy as np
import pytest

from optiq.backend import mx
from optiq.engine import prefill
from optiq.engine.prefill import groups, read
from optiq.engine.scheduler import PREFILL_TOKENS, Limits
from optiq.engine.sequence import SequenceState
from optiq.engine.target import Gemma4Target
from tests import gemma4
from tests.engine import CONFIGS, Silent, request, tiny_target, uncached
from tests.tiny import VOCAB

CLOSE = 2e-4
FORGETFUL = sorted(kind for kind in CONFIGS if not tiny_target(kind).make_cache().states)
ALL = sorted(CONFIGS)


def begun(target, tokens, chunk):
    sequence = SequenceState(request(tokens, 1), Silent())
    sequence.begin(target.make_cache(), chunk)
    return sequence


def texts(*lengths):
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("chunk", [4, 9, 64])
def test_prompts_read_side_by_side_are_as_if_alone(kind, chunk):
    target = tiny_target(kind)
    prompts = texts(12, 11, 13, 12, 31, 30)
    sequences = [begun(target, tokens, chunk) for tokens in prompts]
    numbers = []
    while any(s.parts for s in sequences):
        for group in groups([s for s in sequences if s.parts]):
            numbers.append(len(group))
            read(target, group)
    assert (max(numbers) > 2) == (kind in FORGETFUL)
    for sequence, tokens in zip(sequences, prompts, strict=True):
        assert sequence.cache.length == len(tokens) - 1
        states = target.states(mx.array([tokens[-1:]]), sequence.cache)
        logits = target.logits(states)[0]
        found, expected = np.array(logits), np.array(uncached(target, tokens)[-1:])
        assert np.abs(found - expected).max() < CLOSE


@pytest.mark.parametrize("kind", FORGETFUL)
def test_the_last_state_of_each_is_given(kind):
    target = tiny_target(kind)
    prompts = texts(9, 8, 10)
    group = [begun(target, tokens, 64) for tokens in prompts]
    for state, tokens in zip(read(target, group), prompts, strict=True):
        found = np.array(target.logits(state)[0, 0])
        assert np.abs(found - np.array(uncached(target, tokens)[len(tokens) - 2])).max() < CLOSE


def test_padding_stays_small():
    target = tiny_target("full")
    sequences = [begun(target, tokens, 64) for tokens in texts(9, 9, 33, 32, 3)]
    found = []
    for group in groups(sequences):
        found.append([len(s.tokens) for s in group])
        read(target, group)
    assert found == [[9, 9], [33, 32], [3]]


def test_chunks_of_one_prompt_follow_each_other():
    target = tiny_target("full")
    first, second = (begun(target, tokens, 8) for tokens in texts(25, 9))
    found = []
    for group in groups([first, first, second, first]):
        found.append([len(s.tokens) for s in group])
        read(target, group)
    assert found == [[25], [25, 9], [25]]
    assert not first.parts
    assert first.cache.length == 24


def test_what_has_ended_is_left_out():
    target = tiny_target("full")
    sequences = [begun(target, tokens, 64) for tokens in texts(9, 9, 9)]
    sequences[1].done = True
    assert list(groups(sequences)) == [[sequences[0], sequences[2]]]
    sequences[0].done = True
    sequences[2].done = True
    assert list(groups(sequences)) == []


def test_a_prompt_with_an_image_is_read_alone():
    target = Gemma4Target(gemma4.target())
    ids, features = gemma4.inputs("image/over_window")
    plain = begun(target, ids, 512)
    asked = dataclasses.replace(
        plain.request, features=features, image_token_id=target.image_token_id
    )
    pictured = SequenceState(asked, Silent())
    pictured.begin(target.make_cache(), 512)
    found = []
    for group in groups([plain, pictured]):
        found.append(group)
        read(target, group)
    assert found[0] == [plain]
    assert all(group == [pictured] for group in found[1:])


def test_a_step_reads_what_was_asked_for_or_what_suits_the_device(monkeypatch):
    assert prefill.step_tokens(Limits(prefill_tokens=7)) == 7
    monkeypatch.setattr(prefill, "is_cuda", lambda: False)
    assert prefill.step_tokens(Limits()) == PREFILL_TOKENS
    monkeypatch.setattr(prefill, "is_cuda", lambda: True)
    assert prefill.step_tokens(Limits()) > PREFILL_TOKENS
    assert prefill.step_tokens(Limits(prefill_tokens=7)) == 7
