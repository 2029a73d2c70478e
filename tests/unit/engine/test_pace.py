"""The number of drafts follows from acceptance and times."""

import numpy as np
import pytest

from optiq.engine.pace import MAX_DRAFTS, Experience, Pace, StepTimes


def drive(pace, chance, seconds, rounds, seed=0):
    """Rounds of a drafter that is right with a chance; seconds of a round by its drafts."""
    rng = np.random.default_rng(seed)
    total, counts = 0.0, []
    for _ in range(rounds):
        count = pace.next()
        right = 0
        while right < count and rng.random() < chance:
            right += 1
        pace.record(count, right, right + 1, seconds(count))
        counts.append(count)
        total += seconds(count)
    return total, counts


def speedup(chance, seconds, rounds=600):
    pace = Pace(Experience())
    total, counts = drive(pace, chance, seconds, rounds)
    return seconds(0) * pace.tokens / total, counts


def cheap(count):
    return 10 + 0.5 * count


def dear(count):
    return 10 + 4.0 * count


def as_dear_as_the_model(count):
    return 10 + 7 * count


def test_a_good_and_cheap_drafter_drafts_much():
    gain, counts = speedup(0.9, cheap)
    assert gain > 3
    assert np.median(counts[-200:]) >= 6


def test_a_dear_one_drafts_little():
    gain, counts = speedup(0.7, dear)
    assert gain > 1.1
    assert 1 <= np.median(counts[-200:]) <= 3


@pytest.mark.parametrize("chance", [0.0, 0.1])
def test_one_that_does_not_pay_is_switched_off(chance):
    gain, counts = speedup(chance, dear)
    assert gain > 0.95
    assert counts[-200:].count(0) > 180


def test_it_is_tried_again_when_the_text_changes():
    pace = Pace(Experience())
    drive(pace, 0.0, cheap, 300)
    _, counts = drive(pace, 0.95, cheap, 900)
    assert counts[-1] > 2


def test_it_pays_at_every_acceptance():
    for chance in np.linspace(0, 1, 11):
        for seconds in (cheap, dear, lambda count: 10 + 12 * count):
            assert speedup(chance, seconds)[0] > 0.95


def test_times_are_shared_and_guessed_from_others():
    times = StepTimes()
    assert times.of(3) is None
    for count, seconds in [(0, 1.0), (4, 3.0), (4, 300.0), (4, 3.0)]:
        times.add(count, seconds)
    assert times.of(4) == 3.0
    assert times.of(2) == pytest.approx(2.0)
    assert times.measured(0)
    assert not times.measured(2)
    experience = Experience()
    experience.times.add(0, 1.0)
    assert Pace(experience).next() > 0  # no plain step is needed again


def answers(experience, chance, seconds, count, steps=48):
    """Speed-up over `count` short answers, and the drafts of each."""
    plain, taken, drafts = 0.0, 0.0, []
    for seed in range(count):
        pace = Pace(experience)
        total, counts = drive(pace, chance, seconds, steps, seed)
        plain, taken = plain + seconds(0) * pace.tokens, taken + total
        drafts.append(sum(counts))
    return plain / taken, drafts


def test_short_answers_do_not_each_find_out_that_drafts_do_not_pay():
    experience = Experience()
    gain, drafts = answers(experience, 0.45, as_dear_as_the_model, 80)
    assert gain > 0.97
    assert drafts[0] > 0
    assert 0 < sum(drafts[40:]) < 10 * 8
    # when they begin to pay, that is found out, and later answers draft at once
    gain, drafts = answers(experience, 1.0, as_dear_as_the_model, 80)
    assert gain > 1.1
    assert all(drafts[-40:])


def test_one_text_that_drafts_do_not_suit_does_not_stop_them_for_others():
    experience = Experience()
    good, bad = Pace(experience), Pace(experience)
    for seed in range(200):
        drive(good, 0.9, cheap, 3, seed)
        drive(bad, 0.0, cheap, 3, seed)
    assert good.drafted > 5 * good.rounds
    assert bad.rounds < 60
    assert Pace(experience).next() > 0


def test_a_fixed_number_stays():
    pace = Pace(Experience(), fixed=5)
    _, counts = drive(pace, 0.0, dear, 50)
    assert set(counts) == {5}
    report = pace.report("x")
    assert (report.rounds, report.drafted, report.accepted, report.tokens) == (50, 250, 0, 50)
    assert report.speedup is None
    assert report.accepted_per_round == 0
    assert report.steps_per_token == 1


def test_the_report_of_a_mixed_run():
    pace = Pace(Experience())
    for count, right, seconds in [(0, 0, 1.0), (4, 4, 2.0), (4, 2, 2.0)]:
        pace.record(count, right, right + 1, seconds)
    report = pace.report("x")
    assert report.speedup == pytest.approx((1 + 5 + 3) * 1.0 / 5.0)
    assert report.accepted_per_round == 3
    assert report.steps_per_token == pytest.approx(3 / 9)
    assert MAX_DRAFTS >= 4
