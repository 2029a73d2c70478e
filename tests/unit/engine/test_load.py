"""Many answers at a time: choices of one prompt, pasts that are kept, and too little memory."""

import pytest

from optiq.engine import scheduler
from optiq.engine.loop import Loop
from optiq.engine.scheduler import Limits
from optiq.engine.sharing import Sharing
from optiq.engine.store import Cost, Storage
from tests.drafters import Forced
from tests.engine import CONFIGS, Silent, request, tiny_target, written
from tests.tiny import VOCAB

KINDS = sorted(CONFIGS)
SCALE = 4.0


def alone(target, *asked):
    return [written(Loop(target), each)[0] for each in asked]


def together(loop, *groups):
    """Answers to groups of choices, and the sequences."""
    begun = [s for group in groups for s in loop.add_choices(group, [Silent() for _ in group])]
    while not loop.idle:
        loop.step()
    for sequence in begun:
        if sequence.error:
            raise sequence.error
    return [s.tokens[len(s.request.tokens) :] for s in begun], begun


# -- choices -------------------------------------------------------------------------------------


def choices(prompt, count, max_tokens=9):
    return [request(prompt, max_tokens, seed=5, choice=number) for number in range(count)]


class Counting:
    """A target that counts the tokens it reads."""

    def __init__(self, target):
        self._target, self.count = target, 0
        self.vocab_size, self.image_token_id = target.vocab_size, target.image_token_id

    def make_cache(self, slack=0):
        return self._target.make_cache(slack)

    def states(self, tokens, cache, features=None):
        self.count += tokens.size
        return self._target.states(tokens, cache, features)

    def logits(self, states):
        return self._target.logits(states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 512])
def test_choices_are_separate_answers_and_their_prompt_is_read_once(kind, chunk):
    target = Counting(tiny_target(kind, scale=SCALE))
    asked = choices(range(40), 4)
    expected = alone(target, *asked)
    assert len({tuple(answer) for answer in expected}) > 1
    target.count = 0
    found, _ = together(Loop(target, limits=Limits(prefill_tokens=chunk)), asked, [request([3])])
    assert found[:4] == expected
    assert target.count == 39 + 4 * 9 + 24


@pytest.mark.parametrize("count", [1, 3])
def test_choices_that_wait_or_lose_their_leader_are_answered_too(count):
    target = tiny_target("sliding", scale=SCALE)
    asked = choices(range(40), 4)
    expected = alone(target, *asked)
    assert together(Loop(target, limits=Limits(count, 7)), asked)[0] == expected
    loop = Loop(target, limits=Limits(count, 7))
    begun = loop.add_choices(asked, [Silent() for _ in asked])
    loop.step()
    loop.cancel(begun[0])
    while not loop.idle:
        loop.step()
    assert [s.tokens[40:] for s in begun[1:]] == expected[1:]


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "run_ahead"), [(kind, kind == "sliding") for kind in KINDS] + [("sliding", False)]
)
def test_answers_that_were_put_back_are_unchanged(kind, run_ahead):
    target = tiny_target(kind, scale=SCALE)
    asked = [request(range(n, 3 * n), 30, seed=n) for n in (3, 8, 20)]
    expected = alone(target, *asked)
    cost = Cost.of(target, 0, 16)
    storage = Storage(memory_bytes=2 * cost(500))
    loop = Loop(target, limits=Limits(8, 16), storage=storage, run_ahead=run_ahead)
    lost = 0
    begun = [loop.add(each, Silent()) for each in asked]
    while not loop.idle:
        loop.step()
        held = {id(x): x.nbytes for s in begun if not s.done for x in s.cache.arrays}
        held |= {id(x): x.nbytes for x in loop._batch.cache.arrays}
        assert sum(held.values()) <= storage.memory_bytes
        lost += loop._scheduler.num_waiting
    assert [s.tokens[len(s.request.tokens) :] for s in begun] == expected
    assert lost


def test_a_sequence_is_put_back_with_what_it_has_written(monkeypatch):
    monkeypatch.setattr(scheduler, "_HEADROOM", 40)
    target = tiny_target("full", scale=SCALE)
    cost = Cost.of(target, 0, 512)
    asked = [request([3, n], 60, seed=n, temperature=0.5) for n in range(3)]
    expected = alone(target, *asked)
    storage = Storage(memory_bytes=3 * cost(70))
    drafter = Forced({a.tokens: e for a, e in zip(asked, expected, strict=True)}, 0.7, VOCAB)
    loop = Loop(target, drafter=drafter, storage=storage)
    sequences = [loop.add(each, Silent()) for each in asked]
    written_by_then = None
    while not loop.idle:
        loop.step()
        if written_by_then is None and loop._scheduler.num_waiting:
            written_by_then = sequences[2].written
    assert [s.error for s in sequences] == [None] * 3
    assert [s.tokens[2:] for s in sequences] == expected
    assert written_by_then > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 300, 700])
def test_a_past_costs_what_was_computed_or_less(kind, count):
    target = tiny_target(kind)
    cost = Cost.of(target, 0, 64)
    loop = Loop(target, limits=Limits(8, 64))
    sequence = loop.add(request([n % VOCAB for n in range(count)], 12), Silent())
    most = 0
    while not loop.idle:
        loop.step()
        held = [*sequence.cache.arrays, *loop._batch.cache.arrays]
        most = max(most, sum({id(x): x.nbytes for x in held}.values()))
        assert most <= cost(len(sequence.tokens))
    assert most > 0.4 * cost(count + 12)


# -- drafters under load -------------------------------------------------------------------------


def simulated(count, round_tokens, round_seconds, pass_seconds, steps=3000):
    """Tokens a second under the rule, and the share of steps in rounds."""
    sharing, tokens, seconds, apart = Sharing(), 0, 0.0, 0
    for _ in range(8):  # one sequence has been alone
        sharing.add_round(round_tokens, round_seconds)
    for _ in range(steps):
        if sharing.apart(count):
            apart += 1
            for _ in range(count):
                sharing.add_round(round_tokens, round_seconds)
            tokens, seconds = tokens + count * round_tokens, seconds + count * round_seconds
        else:
            sharing.add_pass(count, pass_seconds)
            tokens, seconds = tokens + count, seconds + pass_seconds
    return tokens / seconds, apart / steps


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("round_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("pass_seconds", [1.0, 3.0])
def test_the_faster_of_rounds_and_passes_is_taken(count, round_tokens, pass_seconds):
    best = max(round_tokens / 1.3, count / pass_seconds)
    rate, apart = simulated(count, round_tokens, 1.3, pass_seconds)
    assert rate > 0.9 * best
    if abs(round_tokens / 1.3 - count / pass_seconds) > 0.2 * best:
        assert (apart > 0.5) == (round_tokens / 1.3 > count / pass_seconds)


def test_rounds_and_passes_are_timed_and_the_rule_is_asked():
    """Two answers with a drafter, whatever the machine says, are those without."""
    target = tiny_target("sliding", scale=SCALE)
    asked = [request([3, n], 50, temperature=0) for n in range(2)]
    expected = alone(target, *asked)
    answers = {a.tokens: e for a, e in zip(asked, expected, strict=True)}
    for apart in (True, False):
        loop = Loop(target, drafter=Forced(answers, 1.0, VOCAB))
        loop._sharing.apart = lambda count, apart=apart: apart or count < 2
        found, begun = together(loop, *([each] for each in asked))
        assert found == expected
        assert all((s.report.drafted > 0) == apart for s in begun)
        assert bool(loop._sharing._passes[2]) != apart
        assert bool(loop._sharing._rounds) == apart
