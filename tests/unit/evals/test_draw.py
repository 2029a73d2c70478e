"""Draws of items."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.evals.draw import apportion, evenly, raw, sample

sizes = st.dictionaries(st.text(max_size=3), st.integers(0, 400), min_size=1).filter(
    lambda d: sum(d.values()) > 0
)


@given(sizes, st.integers(0, 3000))
def test_shares_add_up_and_are_within_one_of_the_proportion(groups, total):
    shares = apportion(groups, total)
    whole = sum(groups.values())
    assert sum(shares.values()) == min(total, whole)
    for name, size in groups.items():
        assert shares[name] <= size
        assert abs(shares[name] - min(total, whole) * size / whole) < 1


def test_the_largest_remainder_gets_what_is_left():
    assert apportion({"a": 41, "b": 33, "c": 26}, 10) == {"a": 4, "b": 3, "c": 3}


@given(st.lists(st.integers(), max_size=60), st.integers(0, 80), st.integers(0, 5))
def test_a_sample_is_a_part_in_order(items, size, seed):
    places = sample(list(range(len(items))), size, seed, "x")
    assert len(places) == min(size, len(items))
    assert places == sorted(set(places))


def test_samples_depend_on_seed_and_label_and_never_change():
    numbers = list(range(1000))
    drawn = sample(numbers, 5, 0, "a")
    assert drawn == GOLDEN
    assert drawn != sample(numbers, 5, 1, "a")
    assert drawn != sample(numbers, 5, 0, "b")


def test_raw_numbers_never_change():
    assert raw([1, 2], 2).tolist() == GOLDEN_RAW


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, "abcdef"), (9, "abcdef"), (3, "ace"), (4, "abde")]
)
def test_even_draws(limit, kept):
    assert "".join(evenly("abcdef", limit)) == kept


GOLDEN = [39, 173, 376, 466, 715]
GOLDEN_RAW = [8271799387826207682, 7948369750201702571]
