"""The solver against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.quant import knapsack
from optiq.quant.knapsack import hull_path, solve, total


@st.composite
def instances(draw):
    """Small classes with many ties, or with values over three decades; a budget that fits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    if draw(st.booleans()):
        values = [rng.integers(0, 6, n).astype(float) for n in counts]
        costs = [rng.integers(0, 6, n).astype(float) for n in counts]
    else:
        values = [rng.random(n) * 10 ** rng.uniform(-3, 0) for n in counts]
        costs = [rng.integers(1, 50, n) * float(10 ** rng.integers(0, 3)) for n in counts]
    least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
    return values, costs, least + draw(st.floats(0, 1)) * (most - least)


def brute_force(values, costs, budget):
    choices = itertools.product(*(range(len(value)) for value in values))
    return min(total(values, c) for c in choices if total(costs, c) <= budget)


@given(instances())
@settings(max_examples=150)
def test_equals_brute_force(instance):
    values, costs, budget = instance
    solution = solve(values, costs, budget)
    assert total(costs, solution.choice) <= budget
    assert solution.value == total(values, solution.choice)
    assert solution.value == pytest.approx(brute_force(values, costs, budget), rel=1e-8, abs=1e-14)


@given(instances())
@settings(max_examples=150)
def test_bound_holds_when_lists_are_cut(instance):
    values, costs, budget = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MAX_STATES", 1)
        solution = solve(values, costs, budget)
    best = brute_force(values, costs, budget)
    assert solution.bound <= best * (1 + 1e-8) + 1e-14
    assert solution.value >= best * (1 - 1e-8)
    assert total(costs, solution.choice) <= budget


def test_cut_lists_are_confessed():
    rng = np.random.default_rng(3)
    values = [rng.random(6) for _ in range(40)]
    costs = [rng.integers(1, 10**6, 6).astype(float) for _ in range(40)]
    budget = sum(c.min() for c in costs) * 3
    exact = solve(values, costs, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MAX_STATES", 1)
        cut = solve(values, costs, budget)
    assert cut.bound < cut.value
    assert cut.bound <= exact.value <= cut.value


@given(instances())
@settings(max_examples=100)
def test_vertices_of_the_hull_are_optimal_for_their_cost(instance):
    values, costs, _ = instance
    path = hull_path(values, costs)
    slopes = path.gains / path.costs
    assert (np.diff(slopes) <= 0).all()
    for num_steps in range(len(path.costs) + 1):
        choice = path.choice(num_steps)
        spent = total(costs, path.start) + path.costs[:num_steps].sum()
        assert total(costs, choice) == pytest.approx(spent)
        best = brute_force(values, costs, total(costs, choice))
        assert total(values, choice) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_budget_below_the_cheapest_choice():
    with pytest.raises(ValueError, match="no choice within 2"):
        solve([np.array([1.0, 0.0])], [np.array([3.0, 4.0])], 2)


def test_equal_items_take_the_first():
    solution = solve([np.array([1.0, 1.0, 1.0])], [np.array([2.0, 2.0, 2.0])], 5)
    assert solution.choice.tolist() == [0]
