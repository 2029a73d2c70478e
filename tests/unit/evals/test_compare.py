"""Comparisons: what is counted, every verdict, and how often verdicts are wrong."""

import dataclasses
import math

import numpy as np
import pytest

from bench.verdicts import FULL, LIMITED, rates, shift_for
from optiq.errors import UsageError
from optiq.eval_artifacts import CAPABILITY, Comparison, Overall
from optiq.evals.compare import compare, verdict
from optiq.evals.scores import Evaluated, Scores
from optiq.evals.stats import mcnemar

GB = 10**9


def scores(task, values, version="1"):
    return Scores(task, version, tuple(map(str, range(len(values)))), tuple(map(float, values)))


def evaluated(name="a", size_bytes=GB, **tasks):
    return Evaluated(name, size_bytes, {task: scores(task, v) for task, v in tasks.items()})


def flips(gained, lost, both=40, neither=20):
    """Binary scores of two models with so many items of each kind."""
    kinds = [(1, 0)] * gained + [(0, 1)] * lost + [(1, 1)] * both + [(0, 0)] * neither
    return [a for a, _ in kinds], [b for _, b in kinds]


def pair(gained, lost, sizes=(GB, GB), task="mmlu"):
    ours, theirs = flips(gained, lost)
    return evaluated("a", sizes[0], **{task: ours}), evaluated("b", sizes[1], **{task: theirs})


def test_figures_of_one_binary_benchmark():
    found = compare(*pair(30, 10))
    (row,) = found.benchmarks
    assert (row.gained, row.lost, row.num_items, row.test) == (30, 10, 100, "mcnemar")
    assert (row.score_percent, row.rival_percent, row.delta_points) == pytest.approx((70, 50, 20))
    assert (row.p_value, row.p_mid) == mcnemar(30, 10)
    assert row.p_holm == row.p_value
    stderr = math.sqrt((0.4 - 0.2**2) / 99)
    assert row.mde_points == pytest.approx(100 * 2.8016 * stderr, rel=1e-4)
    assert row.ci_points == pytest.approx((20 - 196 * stderr, 20 + 196 * stderr), abs=1)
    assert found.overall.delta_points == pytest.approx(20)
    assert found.overall.p_value == pytest.approx(row.p_value)
    assert not found.is_capability


def test_the_mean_is_over_benchmarks_and_not_over_items():
    model = evaluated(mmlu=[1] * 10, gsm8k=[0] * 90)
    rival = evaluated("b", mmlu=[0] * 10, gsm8k=[0] * 90)
    found = compare(model, rival).overall
    assert (found.score_percent, found.rival_percent) == (50, 0)
    assert found.delta_points == 50


def test_fractions_take_the_permutation_test():
    values = np.random.default_rng(0).integers(0, 5, (2, 60)) / 4
    model, rival = evaluated(hashhop=values[0]), evaluated("b", hashhop=values[1])
    (row,) = compare(model, rival).benchmarks
    assert row.test == "permutation"
    assert row.p_mid is None
    assert row.gained == (values[0] > values[1]).sum()


def test_items_are_matched_by_id():
    ours = Scores("t", "1", ("x", "y", "z"), (1.0, 0.0, 1.0))
    theirs = Scores("t", "1", ("z", "y", "x"), (1.0, 0.0, 0.0))
    (row,) = compare(Evaluated("a", 1, {"t": ours}), Evaluated("b", 1, {"t": theirs})).benchmarks
    assert (row.gained, row.lost) == (1, 0)


def test_samples_of_an_item_are_averaged_first():
    samples = [("p", 1), ("q", 0), ("p", 0), ("q", 0), ("p", 1)]
    found = Scores.of("t", "1", samples)
    assert found.ids == ("p", "q")
    assert found.values == pytest.approx((2 / 3, 0))
    with pytest.raises(UsageError, match=r"item q of t has the score 1\.5"):
        Scores.of("t", "1", [("q", 1.5)])


def test_equal_seeds_give_equal_figures_and_json_keeps_them(tmp_path):
    found = compare(*pair(12, 9), seed=3)
    assert compare(*pair(12, 9), seed=3) == found
    assert compare(*pair(12, 9), seed=4).overall.ci_points[0] == pytest.approx(
        found.overall.ci_points[0], abs=1
    )
    found.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == found


def test_six_benchmarks_are_the_capability_score():
    six = {task: [0, 1, 1] for task in CAPABILITY}
    assert compare(evaluated(**six), evaluated("b", **six)).is_capability
    assert not compare(
        evaluated(**six, own=[1, 1, 0]), evaluated("b", **six, own=[1, 1, 0])
    ).is_capability


@pytest.mark.parametrize(
    ("gained", "lost", "sizes", "wanted", "reason"),
    [
        (30, 5, (GB, GB), "better", "as large"),
        (30, 5, (GB // 2, GB), "better", "50.0% smaller"),
        (30, 5, (1_010_000_000, GB), "better", "1.0% larger"),
        (30, 5, (1_011_000_000, GB), "not_comparable", "scores more and takes more"),
        (5, 30, (GB, GB), "worse", "as large"),
        (5, 30, (2 * GB, GB), "worse", "100.0% larger"),
        (5, 30, (GB, 1_011_000_000), "not_comparable", "scores less and takes less"),
        (15, 15, (GB, GB), "no_difference", "points would show in 80% of cases"),
        (15, 15, (GB, 2 * GB), "no_difference", "points would show in 80% of cases"),
        (4, 0, (GB, GB), "no_difference", "too few items differ"),
        (30, 5, (None, GB), "not_comparable", "bytes of the model are not known"),
        (30, 5, (GB, None), "not_comparable", "bytes of the rival are not known"),
    ],
)
def test_the_verdict(gained, lost, sizes, wanted, reason):
    found = compare(*pair(gained, lost, sizes))
    assert found.verdict == wanted
    assert reason in found.reason
    assert found.overall is not None


def test_few_flips_in_one_direction_have_an_interval_without_0_and_still_no_verdict():
    found = compare(*pair(4, 0))
    assert found.overall.ci_points[0] > 0
    assert found.overall.p_value == pytest.approx(0.125)


@pytest.mark.parametrize("gained", [3, 8, 14, 20, 30])
@pytest.mark.parametrize("size", [GB, 1_005_000_000, 1_200_000_000])
def test_verdicts_mirror_each_other(gained, size):
    model, rival = pair(gained, 10, (size, GB))
    mirror = {"better": "worse", "worse": "better"}
    found = compare(model, rival).verdict
    assert compare(rival, model).verdict == mirror.get(found, found)


def test_other_versions_items_and_failures_are_named():
    ours, theirs = flips(20, 2)
    model = evaluated(mmlu=ours, gsm8k=ours, ifeval=ours, bfcl=ours, humaneval=ours)
    rival = evaluated("b", mmlu=theirs, gsm8k=theirs[:-1], ifeval=[math.nan, *theirs[1:]])
    rival.scores["bfcl"] = scores("bfcl", theirs, version="2")
    found = compare(model, rival)
    assert found.verdict == "not_comparable"
    assert found.overall is None
    assert [row.task for row in found.benchmarks] == ["mmlu"]
    assert "gsm8k: items differ (1 of the model's only, 0 of the rival's only)" in found.reason
    assert "ifeval: the harness failed on 1 items" in found.reason
    assert "task versions differ (1 and 2)" in found.reason
    assert found.reason.endswith("and 1 more")


def test_other_prompts_are_another_question():
    ours, theirs = (Evaluated(name, GB, {"t": asked(name)}) for name in ("short", "long"))
    found = compare(ours, theirs)
    assert found.verdict == "not_comparable"
    assert found.reason == "t: the prompts, or the most tokens of an answer, differ"
    unknown = Evaluated("b", GB, {"t": dataclasses.replace(asked("long"), prompts=frozenset())})
    for one, other in ((ours, ours), (ours, unknown), (unknown, ours)):
        assert compare(one, other).overall is not None


def asked(prompt):
    """Scores of items that were all asked with a prompt."""
    return Scores.of("t", "1", [("0", 1.0), ("1", 0.0)], [prompt])


def test_nothing_in_common():
    found = compare(evaluated(), evaluated("b"))
    assert (found.verdict, found.reason) == ("not_comparable", "there is no benchmark to compare")
    assert "a has no results of mmlu" in compare(evaluated(), evaluated("b", mmlu=[1])).reason


def test_the_boundary_of_an_interval_is_no_difference():
    touching = Overall(50, 49, 1.0, (0.0, 2.0), 0.04, 1.4)
    assert verdict(touching, GB, GB)[0] == "no_difference"
    clear = dataclasses.replace(touching, ci_points=(0.1, 2.0))
    assert verdict(clear, GB, GB)[0] == "better"


@pytest.mark.parametrize("sizes", [FULL, LIMITED], ids=["full", "limited"])
def test_a_model_against_itself_is_rarely_called_better_or_worse(sizes):
    """200 pairs: at most 5% and two standard errors."""
    found = rates(sizes, shift=0.0, pairs=200, resamples=1000, seed=0)
    assert found["better"] + found["worse"] <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    assert found["interval_holds_0"] >= 0.9


def test_a_model_better_by_the_printed_mde_is_found_four_times_in_five():
    """200 pairs: two standard errors of the rate, and 0.02 for the normal approximation."""
    mde = rates(FULL, 0.0, 50, 100, seed=1)["mean_mde_points"]
    shift = shift_for(mde, FULL, np.random.default_rng(2))
    found = rates(FULL, shift, pairs=200, resamples=1000, seed=3)
    assert abs(found["better"] - 0.8) <= 2 * math.sqrt(0.8 * 0.2 / 200) + 0.02
    assert found["worse"] == 0
    assert found["mean_mde_points"] == pytest.approx(mde, rel=0.05)
