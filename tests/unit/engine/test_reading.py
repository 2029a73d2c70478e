"""Embeddings of several texts at a time, for every kind of past."""

import contextlib

import numpy as np
import pytest

from optiq.engine.reading import drained, embedded
from tests.engine import CONFIGS, tiny_target
from tests.tiny import VOCAB

SPECIAL = {3}


def embeddings(target, texts):
    return drained(embedded(target, texts, SPECIAL, contextlib.nullcontext()))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_texts_of_one_call_do_not_know_of_each_other(kind):
    target = tiny_target(kind)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCAB, n).tolist() for n in (7, 40, 8, 1, 41, 9, 38, 8)]
    alone = [embeddings(target, [text])[0] for text in texts]
    together = embeddings(target, texts)
    for one, other in zip(alone, together, strict=True):
        assert one.dtype == other.dtype == np.float32
        assert abs(float(np.linalg.norm(other)) - 1) < 1e-6
        assert np.abs(one - other).max() < 1e-5
    assert np.abs(together[0] - together[2]).max() > 1e-2


def test_like_lengths_share_a_pass():
    target = tiny_target("full")
    texts = [[1] * n for n in (9, 9, 8, 200, 9, 199)]
    assert len(list(embedded(target, texts, SPECIAL, contextlib.nullcontext()))) == 2
