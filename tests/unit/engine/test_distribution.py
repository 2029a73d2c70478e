"""At temperature 1 the tokens are drawn with the exact processed probabilities, drafts or not.

The loop runs as it is, over a model whose logits after a text are computed once: three tokens after
one prompt have few beginnings. Exact probabilities come from numpy, in float64.
"""

import functools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2

from optiq.backend import mx
from optiq.engine import loop
from optiq.engine.drafters.draft_model import DraftModelSession
from optiq.engine.drafters.gemma4_assistant import AssistantDrafter
from optiq.engine.drafters.ngram import NgramDrafter
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.loop import Loop
from optiq.engine.target import Gemma4Target, as_row
from optiq.models.families.gemma4_assistant import Gemma4Drafter
from tests import gemma4
from tests.engine import Silent, request

NUM_TOKENS, NUM_DRAFTS = 3, 2
DRAWS = 20_000
ALPHA = 1e-3
SETTINGS = {"temperature": 1.0, "top_p": 0.7, "repetition_penalty": 1.3, "top_k": 12}
FEWEST = 5


class Log(SequenceCache):
    """A past that is only the tokens."""

    def __init__(self):
        super().__init__(())
        self.tokens: tuple[int, ...] = ()

    def back_to(self, point, length):
        del point
        self.tokens, self.length = self.tokens[:length], length
        return length


class Remembered:
    """A target, and drafters for it, that compute what follows a text once."""

    def __init__(self, prompt, features=None):
        self.real = Gemma4Target(gemma4.target())
        self.vocab_size, self.image_token_id = self.real.vocab_size, self.real.image_token_id
        self.prompt, self.features = tuple(prompt), features
        self._known = {}

    def make_cache(self, slack=0):
        del slack
        return Log()

    def states(self, tokens, cache, features=None):
        del features
        rows = []
        for token in tokens[0].tolist():
            cache.tokens += (token,)
            rows.append(self.after(cache.tokens))
        cache.length = len(cache.tokens)
        return mx.stack(rows)[None]

    def logits(self, states):
        return states

    @functools.cache  # noqa: B019  a test's
    def read(self, tokens):
        """The real past of a text, and its last state."""
        cache = self.real.make_cache()
        states = self.real.states(as_row(tokens), cache, self.features)
        return cache, states[:, -1:]

    @functools.cache  # noqa: B019
    def after(self, tokens):
        """Logits after a text; of a prompt that ends within its image nobody asks."""
        if len(tokens) < len(self.prompt):
            return mx.zeros((self.vocab_size,))
        row = self.real.logits(self.read(tokens)[1])[0, 0]
        mx.eval(row)
        return row


class RememberedDrafter:
    """A real drafter over the real past of the text."""

    def __init__(self, target, drafter):
        self.name, self.reads_states = drafter.name, drafter.reads_states
        self._target, self._drafter = target, drafter
        self._known = {}

    def start(self):
        return self

    def propose(self, tokens, state, cache, count):
        del cache
        key = (*tokens, count, state is None)
        if key not in self._known:
            past = self._target.real.make_cache()
            if state is not None:
                past, state = self._target.read(tuple(tokens[:-1]))
            self._known[key] = self._drafter.start().propose(tokens, state, past, count)
        return self._known[key]


class Copies:
    """Drafts of a model that is the target itself, for text."""

    name = "draft_model"
    reads_states = False

    def __init__(self, target):
        self._target = target

    def start(self):
        return DraftModelSession(self._target, self._target.vocab_size, gemma4.SUPPRESSED)


class Likely:
    """Drafts the most likely tokens after processing."""

    name = "likely"
    reads_states = False

    def __init__(self, target):
        self._target = target

    def start(self):
        return self

    def propose(self, tokens, state, cache, count):
        del state, cache
        return list(self._best(tuple(tokens), count))

    @functools.cache  # noqa: B019
    def _best(self, tokens, count):
        for _ in range(count):
            tokens += (int(exact(self._target.after(tokens), tokens).argmax()),)
        return tokens[-count:]


def exact(logits, history):
    """Processed probabilities, in float64."""
    scores = np.array(logits, dtype=np.float64)
    for token in set(history):
        factor = SETTINGS["repetition_penalty"]
        scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    scores[list(gemma4.SUPPRESSED)] = -np.inf
    order = np.argsort(-scores)
    scores[order[SETTINGS["top_k"] :]] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= SETTINGS["top_p"]]] = 0
    return p / p.sum()


def expected(target):
    """Beginnings of answers by length -> probability."""
    levels = [{(): 1.0}]
    for _ in range(NUM_TOKENS):
        level = {}
        for tokens, chance in levels[-1].items():
            p = exact(target.after((*target.prompt, *tokens)), (*target.prompt, *tokens))
            level |= {(*tokens, int(t)): chance * p[t] for t in np.flatnonzero(p)}
        levels.append(level)
    return levels[1:]


def draw(target, drafter, draws):
    """Answers of as many seeds."""
    machine = Loop(target, gemma4.SUPPRESSED, drafter)
    out = []
    for seed in range(draws):
        asked = request(
            target.prompt,
            NUM_TOKENS,
            seed=seed,
            num_drafts=NUM_DRAFTS if drafter else 0,
            features=target.features,
            image_token_id=target.image_token_id if target.features is not None else None,
            **SETTINGS,
        )
        sequence = machine.add(asked, Silent())
        while not machine.idle:
            machine.step()
        assert sequence.error is None
        out.append(tuple(sequence.tokens[len(target.prompt) :]))
    return out


def p_values(target, answers):
    """Chi-square tests, position by position, of the beginnings up to it."""
    out = []
    for size, level in enumerate(expected(target), start=1):
        seen = Counter(answer[:size] for answer in answers)
        if seen.keys() - level.keys():
            out.append(0.0)  # something that cannot be
            continue
        wanted = {tokens: chance * len(answers) for tokens, chance in level.items()}
        large = [t for t, n in wanted.items() if n >= FEWEST]
        cells = [(seen[t], wanted[t]) for t in large]
        rest = len(answers) - sum(s for s, _ in cells), len(answers) - sum(w for _, w in cells)
        cells += [rest] if rest[1] >= FEWEST else []
        statistic = sum((s - w) ** 2 / w for s, w in cells)
        out.append(float(chi2.sf(statistic, len(cells) - 1)))
    return out


@functools.cache
def text_target():
    return Remembered(gemma4.inputs("text/over_window")[0])


@functools.cache
def image_target():
    return Remembered(*gemma4.inputs("image/over_window"))


def drafter_of(name, target):
    if name == "assistant":
        pair = Gemma4Drafter(gemma4.assistant(), target.real.model)
        return RememberedDrafter(target, AssistantDrafter(pair, gemma4.SUPPRESSED))
    if name == "draft_model":
        return RememberedDrafter(target, Copies(target.real))
    if name == "ngram":
        return NgramDrafter()
    return Likely(target) if name == "likely" else None


DRAFTERS = ("none", "assistant", "draft_model", "ngram", "likely")
CASES = [(kind, name) for kind in ("text", "image") for name in DRAFTERS]
NUM_TESTS = len(CASES) * NUM_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_draws_follow_the_exact_distribution(kind, name):
    target = text_target() if kind == "text" else image_target()
    answers = draw(target, drafter_of(name, target), DRAWS)
    assert min(p_values(target, answers)) > ALPHA / NUM_TESTS


@pytest.mark.parametrize("name", ["none", "likely"])
def test_some_draws_follow_the_exact_distribution(name):
    target = text_target()
    answers = draw(target, drafter_of(name, target), 1_000)
    assert min(p_values(target, answers)) > ALPHA / NUM_TESTS


def every(drafts, drawn):
    """All drafts are right."""
    del drawn
    return len(drafts)


def most(drafts, drawn, strict=loop.accepted):
    """One wrong draft in four is right."""
    count = strict(drafts, drawn)
    return count + (count < len(drafts) and sum(drawn) % 4 == 0)


@pytest.mark.parametrize("rule", [every, most])
def test_a_biased_rule_is_found(rule, monkeypatch):
    monkeypatch.setattr(loop, "accepted", rule)
    target = text_target()
    answers = draw(target, drafter_of("likely", target), 4_000)
    assert min(p_values(target, answers)) < ALPHA / NUM_TESTS


def test_drafts_are_accepted_at_times():
    """Else the tests above would show nothing."""
    target = text_target()
    machine = Loop(target, gemma4.SUPPRESSED, drafter_of("likely", target))
    accepted = 0
    for seed in range(100):
        asked = request(target.prompt, NUM_TOKENS, seed=seed, num_drafts=NUM_DRAFTS, **SETTINGS)
        sequence = machine.add(asked, Silent())
        while not machine.idle:
            machine.step()
        accepted += sequence.report.accepted
    assert 10 < accepted < 190
    assert math.isfinite(sequence.report.accepted_per_round)
