"""Scores, standard errors, intervals and pass@k against their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.artifacts import EvalLog, SubjectInfo
from optiq.eval_artifacts import CAPABILITY
from optiq.evals.log import ItemRecord
from optiq.evals.report import finished, interval, report
from optiq.evals.task import Response, Score
from tests.unit.quant.tables import PROVENANCE

SUBJECT = SubjectInfo("local", "model", "f" * 64, 10**6, 4.5, source="source")


def record(item, sample, value, **more):
    response = Response("x", truncated=more.get("truncated", False))
    looped = more.get("looped", False)
    return ItemRecord(item, sample, "", response, "", looped, Score(value))


def header(task="t", version="1"):
    return EvalLog(task, task.title(), version, "", {}, SUBJECT, "", "", 2, 0, PROVENANCE)


def test_scores_are_means_over_items_of_means_over_answers():
    records = [record("a", 0, 1.0), record("b", 0, 0.0), record("b", 1, 1.0), record("b", 2, 0.5)]
    found = finished(header(), records)
    assert found.score_percent == 75
    assert found.se_percent == pytest.approx(100 * np.std([1, 0.5], ddof=1) / 2**0.5)
    assert found.num_answers == 4
    assert found.pass_at == {}


def test_what_is_counted():
    records = [
        record("a", 0, 1.0, truncated=True),
        record("b", 0, None, looped=True),
        record("c", 0, None, truncated=True),
    ]
    found = finished(header(), records)
    assert (found.num_truncated, found.num_looped, found.num_null) == (2, 1, 2)
    assert (found.score_percent, found.se_percent) == (None, None)
    row = report(SUBJECT, {"t": (found, records)}).benchmarks["t"]
    assert (row.truncated, row.looped, row.ci95) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
        None,
    )


def test_one_item_has_no_standard_error():
    found = finished(header(), [record("a", 0, 1.0)])
    assert (found.score_percent, found.se_percent) == (100, None)
    assert interval([1.0]) is None


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=8), min_size=1, max_size=4))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(groups):
    records = [
        record(str(i), j, float(value))
        for i, group in enumerate(groups)
        for j, value in enumerate(group)
    ]
    found = finished(header(), records).pass_at
    assert list(found) == ["1", "5"]
    for k, value in found.items():
        draws = [
            np.mean([any(draw) for draw in itertools.combinations(group, int(k))])
            for group in groups
        ]
        assert value == pytest.approx(np.mean(draws))


def test_an_interval_of_right_and_wrong_is_wilsons():
    low, high = interval([1.0] * 8 + [0.0] * 2)
    z, n, p = 1.959964, 10, 0.8
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert interval([1.0] * 20)[0] < 0.9  # no certainty from twenty


def test_an_interval_of_fractions_is_of_the_t_distribution():
    values = [0.2, 0.4, 0.9, 0.5]
    half = 3.182446 * np.std(values, ddof=1) / 2
    assert interval(values) == pytest.approx((max(0, 0.5 - half), min(1, 0.5 + half)), abs=1e-6)
    low, high = interval([0.5, 1.0, 1.0])
    assert 0 <= low < high == 1.0


def test_the_mean_wants_six_whole_benchmarks():
    records = [record("a", 0, 1.0), record("b", 0, 0.0)]
    logs = {name: (finished(header(name), records), records) for name in CAPABILITY}
    whole = report(SUBJECT, logs | {"mine": logs["mmlu"]})
    assert whole.mean == 0.5
    assert list(whole.benchmarks) == [*CAPABILITY, "mine"]
    assert (whole.model, whole.source, whole.bpw, whole.size_bytes) == (
        "model",
        "source",
        4.5,
        10**6,
    )
    for name in CAPABILITY:
        assert report(SUBJECT, {k: v for k, v in logs.items() if k != name}).mean is None
    nulls = [*records, record("c", 0, None)]
    broken = logs | {"bfcl": (finished(header("bfcl"), nulls), nulls)}
    assert report(SUBJECT, broken).mean is None
    partial = logs | {"bfcl": (finished(header("bfcl", "1+responses+partial"), records), records)}
    assert report(SUBJECT, partial).mean is None
