"""Teacher-forced acceptance against a loop over the places of a text."""

import itertools
import math

import numpy as np
import pytest

from optiq.backend import mx
from optiq.evals.acceptance import Tally, teacher_forced
from optiq.models.families.gemma4_assistant import Drafting, Gemma4Drafter
from tests.gemma4 import INFO, assistant, inputs, reference, target

NUM_DRAFTS = 3


def by_hand(drafter, tokens, features, start, suppressed):
    """One round at every place, as the engine would run it."""
    model = drafter.target
    tally = Tally.empty(NUM_DRAFTS)
    for count in range(start, len(tokens)):  # tokens known at the start of the round
        cache = model.make_cache(slack=len(tokens))
        states = mx.concatenate(list(model.prefill(tokens[: count - 1], cache, features)), axis=1)
        rows = model.logits(model.hidden(mx.array([tokens]), None, features))[0]
        rows[:, mx.array(suppressed)] = -mx.inf
        chosen = np.array(rows.argmax(axis=-1))
        rounds = drafter.drafts(tokens[count - 1], states[:, -1:], drafter.shared(cache), count)
        for number, draft in enumerate(itertools.islice(rounds, NUM_DRAFTS)):
            at = count + number
            if at >= len(tokens) or chosen[at - 1] != tokens[at]:
                break
            tally.tried[number] += 1
            if int(draft.logits.argmax().item()) != tokens[at]:
                break
            tally.accepted[number] += 1
    return tally


@pytest.mark.parametrize("drafting", [Drafting(), Drafting(2, 15), Drafting(1, 17)])
@pytest.mark.parametrize("name", list(INFO["greedy"]))
def test_all_places_at_once_are_the_places_one_by_one(name, drafting):
    """On a text that the target wrote, so that drafts count, and one that breaks off."""
    ids, features = inputs(INFO["greedy"][name]["prompt_of"])
    suppressed = INFO["suppress_tokens"]
    written = reference()[f"greedy/{name}/tokens"][:9].tolist()
    text = [*ids, *written[:6], 77, *written[6:]]
    drafter = Gemma4Drafter(assistant(), target(), drafting)
    settings = {"features": features, "num_drafts": NUM_DRAFTS, "suppressed": suppressed}
    found = teacher_forced(drafter, text, start=len(ids), **settings)
    expected = by_hand(drafter, text, features, len(ids), suppressed)
    np.testing.assert_array_equal(found.tried, expected.tried)
    np.testing.assert_array_equal(found.accepted, expected.accepted)
    assert found.tried[0] >= 6


def test_drafts_of_the_target_itself_are_always_right(monkeypatch):
    """With the target's own choices in place of drafts every draft that counts is accepted."""
    ids, _ = inputs("text/over_window")
    text = [*ids, *reference()["greedy/text/tokens"].tolist()]
    padded = np.array([*text, 0, 0, 0])
    monkeypatch.setattr(
        "optiq.evals.acceptance._drafts",
        lambda _d, _t, _s, _k, rows, count: [padded[rows + n + 1] for n in range(count)],
    )
    drafter = Gemma4Drafter(assistant(), target())
    found = teacher_forced(
        drafter, text, start=len(ids), num_drafts=3, suppressed=INFO["suppress_tokens"]
    )
    assert found.tried.tolist() == [32, 31, 30]
    assert found.rates == (1.0, 1.0, 1.0)


def test_tallies_add_up():
    one = Tally(np.array([4, 0]), np.array([3, 0]))
    both = one + one
    assert both.rates[0] == 0.75
    assert math.isnan(both.rates[1])
    assert both.tried.tolist() == [8, 0]
