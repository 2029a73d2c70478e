"""Sampling in the order of transformers, with a key of its own."""

import numpy as np
import pytest

from optiq.backend import mx
from optiq.evals.subjects.sampling import Sampling

LOGITS = mx.log(mx.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))


def shares(sampling, draws=4000):
    sample = sampling.sampler(3)
    tokens = [int(sample(LOGITS)[0]) for _ in range(draws)]
    return np.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(temperature=0.5), [0.7315, 0.1829, 0.0658, 0.0143, 0.0026]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0]),
        # at temperature 0.5 the first alone has 0.73: temperature comes before top-p
        (Sampling(temperature=0.5, top_p=0.7), [1, 0, 0, 0, 0]),
        (Sampling(min_p=0.4), [2 / 3, 1 / 3, 0, 0, 0]),
    ],
)
def test_shares_are_those_of_the_settings(sampling, wanted):
    assert shares(sampling) == pytest.approx(wanted, abs=0.03)


def test_a_key_gives_the_same_tokens_and_leaves_the_global_state_alone():
    mx.random.seed(0)
    before = mx.random.uniform().item()
    mx.random.seed(0)
    first = [int(Sampling().sampler(1)(LOGITS)[0]) for _ in range(3)]
    assert len(set(first)) == 1
    assert mx.random.uniform().item() == before
    one, two = Sampling().sampler(1), Sampling().sampler(2)
    assert [int(one(LOGITS)[0]) for _ in range(40)] != [int(two(LOGITS)[0]) for _ in range(40)]


def test_the_penalty_sees_the_whole_context():
    (penalty,) = Sampling(repetition_penalty=2.0).processors()
    logits = penalty(mx.array([0] + [1] * 50), mx.array([[4.0, 3.0, -1.0]]))
    assert np.array(logits).tolist() == [[2.0, 1.5, -1.0]]
    assert Sampling().processors() == []


def test_words():
    assert str(Sampling(1.0, 64, 0.95)) == "temperature 1, top_k 64, top_p 0.95"
