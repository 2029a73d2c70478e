"""Drafts change the speed and never the text: greedy answers with and without each drafter."""

import functools

import numpy as np
import pytest

from optiq.backend import mx
from optiq.engine.drafters.base import Pairing
from optiq.engine.drafters.draft_model import DraftModelSession
from optiq.engine.drafters.gemma4_assistant import AssistantDrafter
from optiq.engine.drafters.ngram import NgramDrafter
from optiq.engine.loop import Loop
from optiq.engine.target import Gemma4Target
from optiq.models.families.gemma4_assistant import Gemma4Drafter
from tests import gemma4
from tests.drafters import Forced
from tests.engine import CONFIGS, request, tiny_target, uncached, written
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
    loop = Loop(target, SUPPRESSED)
    asked = list(prompts(NUM_PROMPTS // len(KINDS), VOCAB))
    return {tuple(p): written(loop, request(p, NUM_TOKENS, temperature=0))[0] for p in asked}


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


@pytest.mark.parametrize("name", ["ngram", "draft_model", "itself", "0", "0.5", "1"])
@pytest.mark.parametrize("num_drafts", [1, 5, None])
def test_greedy_answers_are_the_same(name, num_drafts):
    wrong, near, rounds, drafted, accepted = [], 0, 0, 0, 0
    for kind in KINDS:
        target, expected = tiny_target(kind, scale=SCALE), plain(kind)
        loop = Loop(target, SUPPRESSED, drafter_of(name, kind, expected))
        found = []
        for prompt in expected:
            sequence = request(prompt, NUM_TOKENS, temperature=0, num_drafts=num_drafts)
            found += written(loop, sequence)
            rounds += 1
        different = differences(target, expected, found, SUPPRESSED)
        wrong, near = wrong + different[0], near + different[1]
    assert rounds == NUM_PROMPTS
    assert not wrong
    assert near <= MOST_DIFFERENT * NUM_PROMPTS
    del drafted, accepted
