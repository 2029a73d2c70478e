"""Drafts change the speed and never the text: greedy answers with and without each drafter."""

import dataclasses
import functools

import numpy as np
import pytest

from optiq.backend import mx
from optiq.engine import loop
from optiq.engine.drafters.draft_model import DraftModelSession
from optiq.engine.drafters.gemma4_assistant import AssistantDrafter
from optiq.engine.drafters.ngram import NgramDrafter
from optiq.engine.loop import Loop
from optiq.engine.target import Gemma4Target
from optiq.models.families.gemma4_assistant import Gemma4Drafter
from tests import gemma4
from tests.drafters import Forced
from tests.engine import CONFIGS, Silent, request, tiny_target, uncached, written
from tests.tiny import VOCAB

KINDS = sorted(CONFIGS)
NUM_PROMPTS, NUM_TOKENS = 200, 12
MARGIN, MOST_DIFFERENT = 1e-3, 0.005
SCALE = 4.0
SUPPRESSED = (5, 6)


def prompts(count, size, longest=30):
    """Random prompts, some of which repeat themselves."""
    rng = np.random.default_rng(1)
    for number in range(count):
        text = rng.integers(0, size, rng.integers(1, longest)).tolist()
        yield text + text[: len(text) // 2] if number % 3 == 0 else text


@functools.cache
def plain(kind):
    """Prompts and their answers without a drafter: 40 of each kind make 200."""
    target = tiny_target(kind, scale=SCALE)
    machine = Loop(target, SUPPRESSED)
    asked = list(prompts(NUM_PROMPTS // len(KINDS), VOCAB))
    return {tuple(p): written(machine, request(p, NUM_TOKENS, temperature=0))[0] for p in asked}


def differences(target, expected, found, suppressed):
    """Answers that differ otherwise than at a margin that rounding decides, and those that do."""
    wrong, near = [], 0
    for (prompt, before), after in zip(expected.items(), found, strict=True):
        assert len(before) == len(after) == NUM_TOKENS
        at = next((i for i in range(len(before)) if before[i] != after[i]), None)
        if at is None:
            continue
        logits = uncached(target, [*prompt, *before[:at]])[-1]
        logits[mx.array(list(suppressed))] = -mx.inf
        two = np.sort(np.array(logits))[-2:]
        near += two[1] - two[0] < MARGIN
        wrong += [] if two[1] - two[0] < MARGIN else [(prompt, at)]
    return wrong, near


class Smaller:
    """A draft model without files."""

    name = "draft_model"
    reads_states = False

    def __init__(self, model, vocab_size):
        self._parts = model, vocab_size, SUPPRESSED

    def start(self):
        return DraftModelSession(*self._parts)


def drafter_of(name, kind, expected):
    if name == "ngram":
        return NgramDrafter()
    if name == "draft_model":
        return Smaller(tiny_target(kind, seed=1, scale=SCALE), VOCAB)
    if name == "itself":
        return Smaller(tiny_target(kind, scale=SCALE), VOCAB)
    return Forced(expected, float(name), VOCAB)


def run(name, num_drafts, kinds, limit=None):
    """Answers that are wrong, that differ by rounding, and how many there were; and drafts."""
    wrong, near, count, drafted, accepted = [], 0, 0, 0, 0
    for kind in kinds:
        target, expected = tiny_target(kind, scale=SCALE), dict(list(plain(kind).items())[:limit])
        machine = Loop(target, SUPPRESSED, drafter_of(name, kind, expected))
        found = []
        for prompt in expected:
            asked = request(prompt, NUM_TOKENS, temperature=0, num_drafts=num_drafts)
            sequence = machine.add(asked, Silent())
            while not machine.idle:
                machine.step()
            found.append(sequence.tokens[len(prompt) :])
            drafted += sequence.report.drafted
            accepted += sequence.report.accepted
        different = differences(target, expected, found, SUPPRESSED)
        wrong, near, count = wrong + different[0], near + different[1], count + len(found)
    return wrong, near, count, drafted, accepted


@pytest.mark.parametrize("name", ["ngram", "draft_model", "0", "0.5", "1"])
def test_some_greedy_answers_are_the_same(name):
    wrong, near, count, drafted, accepted = run(name, 3, KINDS, limit=4)
    assert (wrong, near, count) == ([], 0, 4 * len(KINDS))
    assert drafted > 0
    if name in {"0", "1"}:
        assert accepted == int(name) * drafted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram", "draft_model", "itself", "0", "0.5", "1"])
@pytest.mark.parametrize("num_drafts", [1, 5, None])
def test_greedy_answers_are_the_same(name, num_drafts):
    """Two hundred prompts, over every kind of past."""
    wrong, near, count, drafted, accepted = run(name, num_drafts, KINDS)
    assert count == NUM_PROMPTS
    assert not wrong
    assert near <= MOST_DIFFERENT * NUM_PROMPTS
    if name in {"0", "1", "itself"}:
        assert accepted == (name != "0") * drafted
    if name == "0.5" and num_drafts == 1:
        assert 0.4 < accepted / drafted < 0.6


def test_an_acceptance_that_is_too_kind_is_found(monkeypatch):
    """The check above can fail."""
    monkeypatch.setattr(loop, "accepted", lambda drafts, drawn: len(drafts))
    assert run("0", 3, ["full"], limit=4)[0]


# -- Gemma-4 and its own drafter -----------------------------------------------------------------


@functools.cache
def gemma_pair():
    """The tiny Gemma-4 and its drafter."""
    target = gemma4.target()
    drafter = Gemma4Drafter(gemma4.assistant(), target)
    return Gemma4Target(target), AssistantDrafter(drafter, gemma4.SUPPRESSED)


def gemma_answers(requests, drafter, num_drafts):
    target, _ = gemma_pair()
    machine = Loop(target, gemma4.SUPPRESSED, drafter)
    out = []
    for each in requests:
        asked = dataclasses.replace(each, num_drafts=num_drafts)
        out += written(machine, asked)
    return out


def gemma_requests(count):
    size = gemma_pair()[0].vocab_size
    texts = [request(p, NUM_TOKENS, temperature=0) for p in prompts(count, size - 8)]
    images = [
        request(
            (inputs := gemma4.inputs(f"image/{name}"))[0],
            NUM_TOKENS,
            temperature=0,
            features=inputs[1],
            image_token_id=gemma_pair()[0].image_token_id,
        )
        for name in gemma4.INFO["image"]
    ]
    return texts + images


@pytest.mark.parametrize(
    "count", [4, pytest.param(NUM_PROMPTS, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_gemma_and_its_drafter(count):
    """Text and images; the window of sixteen is passed by most."""
    requests = gemma_requests(count)
    before = gemma_answers(requests, None, 0)
    after = gemma_answers(requests, gemma_pair()[1], 3)
    texts = {each.tokens: answer for each, answer in zip(requests, before, strict=True)}
    forced = gemma_answers(requests, Forced(texts, 0.5, gemma_pair()[0].vocab_size), 3)
    for found in (after, forced):
        wrong, near = gemma_differences(requests, before, found)
        assert not wrong
        assert near <= max(1, MOST_DIFFERENT * len(requests))


def gemma_differences(requests, before, after):
    wrong, near = [], 0
    target = gemma_pair()[0].model
    for each, one, two in zip(requests, before, after, strict=True):
        at = next((i for i in range(len(one)) if one[i] != two[i]), None)
        if at is None:
            continue
        tokens = mx.array([[*each.tokens, *one[:at]]])
        logits = target.logits(target.hidden(tokens, None, each.features))[0, -1]
        logits[mx.array(list(gemma4.SUPPRESSED))] = -mx.inf
        last = np.sort(np.array(logits))[-2:]
        near += last[1] - last[0] < MARGIN
        wrong += [] if last[1] - last[0] < MARGIN else [(each.tokens, at)]
    return wrong, near
