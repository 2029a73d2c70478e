"""The loop: sequences side by side, ends, constraints, errors and log-probabilities."""

import dataclasses

import numpy as np
import pytest

from optiq.backend import mx
from optiq.engine.drafters.ngram import NgramDrafter
from optiq.engine.events import Finished, Tokens
from optiq.engine.loop import Loop
from optiq.engine.sampling import Sampling
from optiq.engine.scheduler import Limits
from optiq.engine.target import Gemma4Target
from tests import gemma4
from tests.drafters import Forced
from tests.engine import CONFIGS, Silent, request, tiny_target, uncached, written
from tests.tiny import VOCAB

KINDS = sorted(CONFIGS)
SCALE = 4.0


def sampled_requests():
    """Many lengths, settings and seeds."""
    rng = np.random.default_rng(2)
    for number in range(7):
        prompt = rng.integers(0, VOCAB, 1 + 9 * number).tolist()
        yield request(
            prompt,
            5 + 3 * number,
            seed=number % 3,
            temperature=number % 2,
            top_p=0.9,
            repetition_penalty=1.2,
            frequency_penalty=0.1 * number,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("limits", "run_ahead"), [(Limits(8, 512), False), (Limits(3, 4), True)])
def test_tokens_are_the_same_alone_and_in_a_batch(kind, limits, run_ahead):
    """Sequences come and go at different times; prompts are read in chunks beside them."""
    target = tiny_target(kind, scale=SCALE)
    asked = list(sampled_requests())
    asked += [dataclasses.replace(a, sampling=Sampling(seed=4, top_p=0.9)) for a in asked]
    alone = [written(Loop(target, drafter=Forced({}, 0, VOCAB)), each)[0] for each in asked]
    machine = Loop(target, limits=limits, run_ahead=run_ahead)
    assert written(machine, *asked) == alone
    assert written(machine, asked[-1]) == alone[-1:]


def test_drafts_pause_in_a_batch_and_go_on_after_it():
    target = tiny_target("sliding", scale=SCALE)
    asked = [request(range(20), 40, temperature=0), request(range(5), 3, temperature=0)]
    alone = [written(Loop(target), each)[0] for each in asked]
    machine = Loop(target, drafter=Forced({asked[0].tokens: alone[0]}, 1.0, VOCAB))
    first, second = (machine.add(each, Silent()) for each in asked)
    while not second.done:
        machine.step()
    assert first.report.drafted == 0
    while not machine.idle:
        machine.step()
    assert first.tokens[20:] == alone[0]
    assert first.report.accepted > 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_other_tokens_for_another_choice(kind):
    target = tiny_target(kind)
    answers = [written(Loop(target), request([3], 12, choice=c))[0] for c in (0, 1, 0)]
    assert answers[0] == answers[2] != answers[1]


def test_a_stop_token_ends_the_answer_whatever_was_drafted_behind_it():
    target = tiny_target("full")
    plain = written(Loop(target), request([3, 4], 20))[0]
    at = next(i for i in range(2, 20) if plain[i] not in plain[:i])
    for drafter in (None, Forced({(3, 4): plain}, 1.0, VOCAB)):
        for num_drafts in (8, None):
            asked = request([3, 4], 20, stop=frozenset({plain[at]}), num_drafts=num_drafts)
            machine = Loop(target, drafter=drafter)
            sequence = machine.add(asked, Silent())
            while not machine.idle:
                machine.step()
            assert sequence.tokens[2:] == plain[: at + 1]
            last = sequence.events[-1]
            assert (last.reason, last.usage.completion_tokens) == ("stop", at + 1)
            assert num_drafts or last.usage.drafted_tokens <= at + 1
            assert (last.usage.accepted_tokens > 0) == (drafter is not None)


def test_lengths():
    target = tiny_target("full")
    for count in (0, 1, 2):
        machine = Loop(target, drafter=Forced({}, 0.0, VOCAB))
        sequence = machine.add(request([3], count, num_drafts=6), Silent())
        while not machine.idle:
            machine.step()
        assert sequence.written == count
        assert sequence.events[-1].reason == "length"


def test_suppressed_tokens_are_never_written():
    target = tiny_target("full", scale=SCALE)
    plain = written(Loop(target), request([3], 30, temperature=0))[0]
    banned = tuple(set(plain[:3]))
    for drafter in (None, Forced({(3,): plain}, 1.0, VOCAB)):
        found = written(Loop(target, banned, drafter), request([3], 30, temperature=0))[0]
        assert not set(banned) & set(found)


class Alternating:
    """A grammar: even and odd tokens in turn; it counts how it is asked."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        return (mx.arange(VOCAB) % 2) == (len(self.accepted) % 2)

    def accept(self, token):
        if token % 2 != len(self.accepted) % 2:
            return False
        self.accepted.append(token)
        return True

    def rollback(self, num_tokens):
        del self.accepted[len(self.accepted) - num_tokens :]


@pytest.mark.parametrize("chance", [None, 0.0, 0.5, 1.0])
def test_a_grammar_holds_in_every_row_and_is_rolled_back(chance):
    target = tiny_target("full", scale=SCALE)
    plain_grammar = Alternating()
    plain = written(Loop(target), request([3], 24, constraint=plain_grammar))[0]
    assert [token % 2 for token in plain] == [0, 1] * 12
    drafter = None if chance is None else Forced({(3,): plain}, chance, VOCAB)
    grammar = Alternating()
    found = written(Loop(target, drafter=drafter), request([3], 24, constraint=grammar))[0]
    assert found == plain == grammar.accepted


def test_grammars_of_a_batch_are_their_own():
    target = tiny_target("full", scale=SCALE)
    both = written(Loop(target), request([3], 9, constraint=Alternating()), request([3], 9))
    assert [token % 2 for token in both[0]] == [0, 1] * 4 + [0]
    assert both[1] == written(Loop(target), request([3], 9))[0]


def test_logprobs_are_of_the_model_and_not_of_the_settings():
    target, suppressed = tiny_target("full"), (1, 2)
    asked = request(
        [3, 4], 6, temperature=0.3, top_p=0.4, repetition_penalty=2.0, logprobs=True, top_logprobs=3
    )
    for drafter in (None, NgramDrafter()):
        machine = Loop(target, suppressed, drafter)
        sequence = machine.add(asked, Silent())
        while not machine.idle:
            machine.step()
        events = [event for event in sequence.events if isinstance(event, Tokens)]
        reported = [entry for event in events for entry in event.logprobs]
        logits = np.array(uncached(target, sequence.tokens))[1:-1].astype(np.float64)
        logits[:, list(suppressed)] = -np.inf
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert len(reported) == 6
        for row, entry, token in zip(logits, reported, sequence.tokens[2:], strict=True):
            assert entry.token == token
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            assert [t for t, _ in entry.top] == np.argsort(-row)[:3].tolist()
            assert [p for _, p in entry.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


def test_only_who_asks_gets_logprobs():
    target = tiny_target("full")
    machine = Loop(target)
    pair = [machine.add(request([3], 4, logprobs=flag), Silent()) for flag in (True, False)]
    while not machine.idle:
        machine.step()
    counts = [sum(len(e.logprobs) for e in s.events if isinstance(e, Tokens)) for s in pair]
    assert counts == [4, 0]


class Failing(Silent):
    """A reader that breaks at the third token."""

    def __init__(self):
        self.count = 0

    def feed(self, tokens):
        self.count += len(tokens)
        if self.count == 3:
            raise RuntimeError("broken")
        return []


@pytest.mark.parametrize("run_ahead", [False, True])
def test_an_error_ends_one_sequence_and_no_other(run_ahead):
    target = tiny_target("sliding", scale=SCALE)
    machine = Loop(target, run_ahead=run_ahead)
    asked = [request([i], 9, temperature=0) for i in (3, 4, 5)]
    readers = [Silent(), Failing(), Silent()]
    sequences = [machine.add(*pair) for pair in zip(asked, readers, strict=True)]
    while not machine.idle:
        machine.step()
    assert str(sequences[1].error) == "broken"
    for index in (0, 2):
        assert sequences[index].error is None
        assert sequences[index].tokens[1:] == written(Loop(target), asked[index])[0]


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_cancel_takes_effect_before_the_next_step(after, run_ahead):
    target = tiny_target("sliding", scale=SCALE)
    machine = Loop(target, limits=Limits(8, 4), run_ahead=run_ahead)
    first = machine.add(request(range(9), 9, temperature=0), Silent())
    other = machine.add(request([7], 9, temperature=0), Silent())
    for _ in range(after):
        machine.step()
    count = len(first.tokens)
    machine.cancel(first)
    while not machine.idle:
        machine.step()
    assert len(first.tokens) == count
    assert first.events[-1] == Finished("cancelled", first.events[-1].usage)
    assert other.tokens[1:] == written(Loop(target), request([7], 9, temperature=0))[0]


def test_a_pass_that_nobody_waits_for_is_forgotten():
    """One that was begun for sequences that are cancelled does not reach the next ones."""
    target = tiny_target("sliding", scale=SCALE)
    machine = Loop(target, run_ahead=True)
    asked = [request([i, i + 1], 9, temperature=0) for i in (3, 8)]
    first = machine.add(asked[0], Silent())
    for _ in range(4):
        machine.step()
    second = machine.add(asked[1], Silent())
    machine.cancel(first)
    while not machine.idle:
        machine.step()
    assert second.tokens[2:] == written(Loop(target), asked[1])[0]
    assert not machine._batch.members


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("name", list(gemma4.INFO["greedy"]))
def test_greedy_text_is_that_of_pytorch(name, chunk):
    """With images or without, in any chunks; an image is never split."""
    info = gemma4.INFO["greedy"][name]
    ids, features = gemma4.inputs(info["prompt_of"])
    target = Gemma4Target(gemma4.target())
    asked = request(
        ids,
        32,
        temperature=0,
        features=features,
        image_token_id=None if features is None else target.image_token_id,
    )
    machine = Loop(target, gemma4.SUPPRESSED, limits=Limits(prefill_tokens=chunk))
    expected = gemma4.reference()[f"greedy/{name}/tokens"].tolist()
    margins = gemma4.reference()[f"greedy/{name}/margins"]
    found = written(machine, asked)[0]
    same = next((i for i in range(32) if found[i] != expected[i]), 32)
    assert same == 32 or margins[same] < 1e-3


@pytest.mark.parametrize("chunk", [1, 512])
def test_a_prompt_that_ends_with_its_image(chunk):
    """The image is read as a whole in the step that draws the first token."""
    target = Gemma4Target(gemma4.target())
    ids, features = gemma4.inputs("image/over_window")
    end = len(ids) - ids[::-1].index(target.image_token_id)
    states = target.model.hidden(mx.array([ids[:end]]), None, features)
    logits = target.logits(states[:, -1])[0]
    logits[mx.array(list(gemma4.SUPPRESSED))] = -mx.inf
    asked = request(
        ids[:end], 1, temperature=0, features=features, image_token_id=target.image_token_id
    )
    machine = Loop(target, gemma4.SUPPRESSED, limits=Limits(prefill_tokens=chunk))
    assert written(machine, asked) == [[logits.argmax().item()]]


@pytest.mark.parametrize(("num_drafts", "drafted"), [(3, 3), (None, 1)])
def test_a_fixed_number_of_drafts_goes_on_behind_a_stop_token(num_drafts, drafted):
    target = tiny_target("full")
    plain = written(Loop(target), request([3, 4], 9))[0]
    asked = request([3, 4], 9, stop=frozenset(plain[:1]), num_drafts=num_drafts)
    machine = Loop(target, drafter=Forced({(3, 4): plain}, 1.0, VOCAB))
    for seconds in (1.0, 1.0):  # a plain step need not be timed first
        machine._experience.times.add(0, seconds)
    sequence = machine.add(asked, Silent())
    while not machine.idle:
        machine.step()
    assert sequence.tokens[2:] == plain[:1]
    assert sequence.report.drafted == drafted
