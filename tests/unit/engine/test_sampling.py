"""The processed distribution against formulas, and draws against the distribution."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from optiq.backend import mx
from optiq.engine.sampling import (
    History,
    Place,
    Row,
    Sampling,
    _gumbel,
    draw,
    most_likely,
    processed,
    reported_logprobs,
    sampled,
)
from optiq.errors import UsageError
from optiq.models.generation import GenerationDefaults

V = 40


def formula(logits, sampling, prompt=(), answer=(), suppressed=(), allowed=None):
    """One row, written from the definitions: float64, one token at a time."""
    x = np.array(logits, dtype=np.float64)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    for token in set(prompt) | set(answer):
        x[token] *= sampling.repetition_penalty if x[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(answer):
        x[token] -= sampling.presence_penalty
        x[token] -= sampling.frequency_penalty * list(answer).count(token)
    if allowed is not None:
        x[~np.array(allowed)] = -np.inf
    x[list(suppressed)] = -np.inf
    if sampling.temperature == 0:
        return np.where(np.arange(len(x)) == x.argmax(), 0.0, -np.inf)
    x /= sampling.temperature
    if 0 < sampling.top_k < len(x):
        x[x < np.sort(x)[-sampling.top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(p, kind="stable")
    drop = order[np.cumsum(p[order]) <= 1 - sampling.top_p]
    if sampling.top_p < 1:
        x[[token for token in drop if token != order[-1]]] = -np.inf
    x[p < sampling.min_p * p.max()] = -np.inf
    with np.errstate(divide="ignore"):
        return x - x.max() - np.log(np.exp(x - x.max()).sum())


def check(got, want):
    got, want = np.array(got, dtype=np.float64), np.array(want)
    assert np.array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    assert np.allclose(got[finite], want[finite], atol=2e-5)


def logits(rows, seed=0, scale=3.0):
    return (np.random.default_rng(seed).normal(size=(rows, V)) * scale).astype(np.float32)


def as_row(sampling, prompt=(), answer=()):
    history = History(prompt)
    history.add(answer)
    return Row(sampling, history)


CASES = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=0.3),
    Sampling(top_k=5),
    Sampling(top_p=0.7),
    Sampling(min_p=0.2),
    Sampling(top_k=7, top_p=0.8, min_p=0.05, temperature=1.7),
    Sampling(repetition_penalty=1.8),
    Sampling(presence_penalty=1.5, frequency_penalty=-0.7),
    Sampling(logit_bias={3: 100.0, 4: -100.0, 0: 2.5}, top_k=3),
    Sampling(repetition_penalty=0.7, presence_penalty=2.0, top_p=0.9, temperature=0.8),
    Sampling(temperature=0.0, repetition_penalty=3.0, logit_bias={1: 4.0}),
    Sampling(top_p=0.0),
    Sampling(top_k=V + 3),
    Sampling(top_k=1),
    Sampling(temperature=1e-6),
]
PROMPT, ANSWER = [1, 2, 3, 3, 17], [3, 5, 5, 5, 8]


def test_every_setting_alone_follows_its_formula():
    for number, case in enumerate(CASES):
        x = logits(1, seed=number)
        got = processed(mx.array(x), [as_row(case, PROMPT, ANSWER)], (7, 9))
        check(got[0], formula(x[0], case, PROMPT, ANSWER, (7, 9)))


def test_the_same_as_the_logits_processors_of_transformers():
    """Values of transformers 4.57.6 in PyTorch 2.4.1, in the order that its generate applies."""
    with np.load(Path(__file__).parent / "transformers_sampling.npz") as stored:
        data = {name: stored[name] for name in stored.files}
    rows = [
        as_row(
            Sampling(
                temperature=float(data["t"][i]),
                top_k=int(data["k"][i]),
                top_p=float(data["p"][i]),
                min_p=float(data["m"][i]),
                repetition_penalty=float(data["r"][i]),
                logit_bias=dict(zip(data["bt"][i].tolist(), data["bias"][i].tolist(), strict=True)),
            ),
            data["hist"][i].tolist(),
        )
        for i in range(len(data["t"]))
    ]
    got = processed(mx.array(data["logits"]), rows, data["sup"].tolist())
    finite = np.isfinite(data["want"])
    assert np.array_equal(np.isfinite(np.array(got)), finite)
    assert np.abs(np.array(got)[finite] - data["want"][finite]).max() < 1e-4


def test_rows_of_a_batch_do_not_know_each_other():
    x = logits(len(CASES), seed=5)
    rows = [as_row(case, PROMPT[i % 5 :], ANSWER[: i % 4]) for i, case in enumerate(CASES)]
    together = np.array(processed(mx.array(x), rows, (7,)))
    for i, row in enumerate(rows):
        alone = processed(mx.array(x[i : i + 1]), [row], (7,))
        assert np.array_equal(together[i], np.array(alone[0])), row.sampling
        check(together[i], formula(x[i], row.sampling, PROMPT[i % 5 :], ANSWER[: i % 4], (7,)))


SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 4),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, V),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
)


@settings(max_examples=60)
@given(SETTINGS, st.integers(0, 10**6))
def test_settings_together_follow_the_formula(case, seed):
    x = logits(1, seed=seed)
    got = np.array(processed(mx.array(x), [as_row(case, PROMPT, ANSWER)]))[0]
    want = formula(x[0], case, PROMPT, ANSWER)
    different = np.isinf(got) != np.isinf(want)
    # float32 may put a token on the other side of an edge that it lies on; at most one does
    assert different.sum() <= 1
    if not different.any():
        check(got, want)


def test_top_p_beside_top_k_is_of_what_top_k_left():
    x = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32))
    got = processed(mx.array(x), [Row(Sampling(top_k=2, top_p=0.56))])
    # .4 of .7 is .571 and enough; of the whole it would not be
    assert np.isfinite(np.array(got)).tolist() == [[True, False, False, False]]
    got = processed(mx.array(x), [Row(Sampling(top_p=0.56))])
    assert np.isfinite(np.array(got)).tolist() == [[True, True, False, False]]


def test_ties_at_the_edge_of_top_k_stay():
    x = mx.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    got = np.array(processed(x, [Row(Sampling(top_k=2))]))
    assert np.isfinite(got).tolist() == [[False, True, True, True, False]]


def test_grammar_and_suppression_leave_the_rest():
    x = logits(2, seed=3)
    allowed = np.zeros((2, V), dtype=bool)
    allowed[0, [4, 5, 6]] = allowed[1, [7, 8]] = True
    rows = [Row(Sampling(logit_bias={6: 100.0})), Row(Sampling(temperature=0.0))]
    got = np.array(processed(mx.array(x), rows, (6, 8), mx.array(allowed)))
    for i, row in enumerate(rows):
        check(got[i], formula(x[i], row.sampling, (), (), (6, 8), allowed[i]))
    assert np.isfinite(got[0]).nonzero()[0].tolist() == [4, 5]
    assert got[1].argmax() == 7


def test_the_logits_given_are_not_changed():
    x = mx.array(logits(2))
    before = np.array(x)
    rows = [as_row(case, PROMPT, ANSWER) for case in (CASES[9], CASES[10])]
    mx.eval(processed(x, rows, (1,)), reported_logprobs(x, (2,)))
    assert np.array_equal(np.array(x), before)


def test_of_equal_logits_greedy_takes_the_first():
    row = Row(Sampling(temperature=0.0))
    assert sampled(mx.zeros((1, V)), [row], [Place(0)], (0,)).item() == 1
    assert draw(processed(mx.zeros((1, V)), [row], (0,)), [Place(9, 3, 1)]).item() == 1


def test_a_history_with_drafts_is_a_copy():
    history = History([1])
    later = history.after([2, 2])
    assert (history.counted(), later.counted()) == (([1], [0]), ([1, 2], [0, 2]))


def chi_square(sampling, x, draws=20_000, **others):
    log_probs = processed(mx.array(x[None]), [Row(sampling)], **others)
    p = np.exp(np.array(log_probs, dtype=np.float64)[0])
    drawn = []
    for start in range(0, draws, 2000):
        places = [Place(11, 0, start + i) for i in range(2000)]
        drawn.append(np.array(draw(mx.broadcast_to(log_probs, (2000, len(x))), places)))
    seen = np.bincount(np.concatenate(drawn), minlength=len(x))
    assert seen[p == 0].sum() == 0
    usual = p * draws >= 5
    rare = (~usual) & (p > 0)
    want, got = list(p[usual] * draws), list(seen[usual])
    if rare.any():
        want.append(p[rare].sum() * draws)
        got.append(seen[rare].sum())
    want = np.array(want) * (sum(got) / sum(want))
    return chisquare(got, want).pvalue


def test_draws_have_the_processed_distribution():
    x = logits(1, seed=8, scale=1.5)[0]
    assert chi_square(Sampling(), x) > 1e-3
    assert chi_square(Sampling(top_p=0.8, temperature=1.5), x, suppressed=(2,)) > 1e-3
    # the other way round: another distribution is told apart
    wrong = mx.array(x[None]) * 0.9
    seen = np.bincount(
        np.array(
            draw(
                mx.broadcast_to(processed(wrong, [Row(Sampling())]), (20_000, V)),
                [Place(1, 0, i) for i in range(20_000)],
            )
        ),
        minlength=V,
    )
    p = np.exp(np.array(processed(mx.array(x[None]), [Row(Sampling())]), dtype=np.float64))[0]
    usual = p * 20_000 >= 5
    scaled = p[usual] * (seen[usual].sum() / p[usual].sum())
    assert chisquare(seen[usual], scaled).pvalue < 1e-6


def test_noise_is_right_where_it_is_large_and_finite_everywhere():
    u = np.array([2.0**-32, 3 * 2.0**-32, 2.0**-25, 1e-6, 0.3, 0.999, 1 - 2.0**-24])
    got = np.array(_gumbel(mx.array(u.astype(np.float32))))
    assert np.allclose(got, -np.log(-np.log1p(-u.astype(np.float32).astype(float))), atol=1e-5)
    none = _gumbel(mx.array([0.0])).item()
    assert 22.18 < got[0] < none < 23


def test_a_draw_follows_from_its_place_alone():
    x = mx.array(logits(6, seed=2))
    rows = [Row(Sampling(temperature=1 + i / 3)) for i in range(6)]
    places = [Place(seed=7 + i % 2, choice=i % 3, position=10 * i) for i in range(6)]
    together = np.array(sampled(x, rows, places))
    alone = [sampled(x[i : i + 1], rows[i : i + 1], places[i : i + 1]).item() for i in range(6)]
    assert together.tolist() == alone
    mixed = [*rows[:3], Row(Sampling(temperature=0.0)), *rows[4:]]
    with_greedy = np.array(sampled(x, mixed, places))
    assert with_greedy[[0, 1, 2, 4, 5]].tolist() == together[[0, 1, 2, 4, 5]].tolist()
    assert with_greedy[3] == np.array(x)[3].argmax()


def test_keys_differ_in_every_part_of_a_place():
    places = [Place(s, c, p) for s in (-1, 0, 1, 2**63 - 1) for c in range(5) for p in range(50)]
    assert len({place.key() for place in places}) == len(places)
    flat = mx.zeros((3, V))
    spread = {tuple(np.array(draw(flat, [Place(1, c, p) for c in range(3)]))) for p in range(30)}
    assert len(spread) > 25


def test_reported_logprobs_know_nothing_of_the_settings():
    x = logits(2, seed=4)
    got = np.array(reported_logprobs(mx.array(x), (7,)))
    x[:, 7] = -np.inf
    want = x - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
    check(got, want)
    tokens, values = most_likely(mx.array(got), 3)
    order = np.argsort(-x, axis=-1)[:, :3]
    assert tokens == order.tolist()
    assert np.allclose(values, np.take_along_axis(got, order, axis=-1))
    assert most_likely(mx.zeros((1, 5)), 2)[0] == [[0, 1]]
    assert most_likely(mx.zeros((1, 5)), 0) == ([[]], [[]])


def test_what_is_not_given_is_the_checkpoints():
    says = GenerationDefaults(
        bos=2, stop=(1,), suppressed=(), temperature=0.7, top_k=64, top_p=0.95
    )
    assert Sampling.of(says) == Sampling(temperature=0.7, top_k=64, top_p=0.95)
    assert Sampling.of(says, top_k=0, temperature=None).top_k == 0
    assert Sampling.of() == Sampling()
    silent = GenerationDefaults(bos=None, stop=(), suppressed=())
    assert Sampling.of(silent).temperature == 1
    got = Sampling.of(None, stop="x", logit_bias={"12": 1})
    assert (got.stop, dict(got.logit_bias)) == (("x",), {12: 1})
    assert Sampling.of(None, stop=["a", "b"]).stop == ("a", "b")


def test_a_seed_is_kept_or_made():
    assert Sampling(seed=4).seeded().seed == 4
    assert Sampling().seeded().seed != Sampling().seeded().seed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.inf),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", [1]),
        ("seed", 1.0),
        ("seed", 2**63),
        ("max_tokens", -1),
        ("stop", 1),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("logprobs", 1),
        ("top_logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"^{name} is .*; give "):
        Sampling.of(None, **{name: value})


def test_other_refusals():
    with pytest.raises(UsageError, match="needs logprobs"):
        Sampling(top_logprobs=2)
    with pytest.raises(UsageError, match="no sampling setting 'temp'"):
        Sampling.of(None, temp=1)
    with pytest.raises(UsageError, match="logit_bias names token 99999999; .* up to 39"):
        processed(mx.zeros((1, V)), [Row(Sampling(logit_bias={99999999: 5.0}))])
    assert dataclasses.replace(Sampling(), logit_bias={39: 1.0}).check_vocabulary(V) is None
