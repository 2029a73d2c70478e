"""Exact multiple-choice knapsack: one item of every class, least value within a budget of cost.

Three steps, each deterministic:

1. Per class, the lower convex hull of its items in cost and value. The hull's steps of all classes,
   merged by slope, are the path of optimal solutions of the linear relaxation. Where the budget
   cuts a step, the fraction gives a bound that no choice can beat, and the step's slope prices cost
   in units of value: an item's reduced cost is what it loses against the relaxation at that price.
2. A greedy walk down the rest of the path gives a first choice. Only items whose reduced cost is
   below the distance between that choice and the bound can be part of a better one.
3. Dynamic programming over these: the classes one after the other, least reduced cost first, as
   lists of undominated (cost, value) states. A state lives while its value plus the relaxation of
   the classes to come is below the best choice, and is completed along their path to find better
   ones. Long lists keep the states of the best bounds; the least bound dropped is certified.

Reference: Pisinger, A minimal algorithm for the multiple-choice knapsack problem (EJOR 83, 1995).
    The bound of a state is the relaxation of all other classes, not that of the break class alone,
    and lists are capped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]

_MAX_STATES = 2048
_TOLERANCE = 1e-9  # relative distance to the bound at which a choice counts as optimal


@dataclasses.dataclass(frozen=True)
class Solution:
    """A choice within the budget.

    Attributes:
        choice: item of every class, (classes,).
        value: total value.
        bound: no choice within the budget has a smaller value.
    """

    choice: IntArray
    value: float
    bound: float


@dataclasses.dataclass(frozen=True)
class HullPath:
    """Optimal solutions of the linear relaxation, from the cheapest to the best.

    Attributes:
        start: cheapest item of every class, (classes,).
        classes: class that changes at each step, (steps,).
        before: item it leaves, (steps,).
        after: item it takes, (steps,).
        costs: added cost of each step, > 0.
        gains: value saved by each step, > 0; gains / costs never rises along the path.
    """

    start: IntArray
    classes: IntArray
    before: IntArray
    after: IntArray
    costs: FloatArray
    gains: FloatArray

    def choice(self, num_steps: int) -> IntArray:
        """Items after the first `num_steps` steps: the optimum for the cost they add up to."""
        choice = self.start.copy()
        choice[self.classes[:num_steps]] = self.after[:num_steps]
        return choice


def hull_path(values: Sequence[FloatArray], costs: Sequence[FloatArray]) -> HullPath:
    """Merge the hull steps of all classes by slope.

    Args:
        values: value of every item, by class; lower is better.
        costs: cost of every item, by class.

    Returns:
        The path; equal slopes in the order of the classes, equal items: the first one.
    """
    start, rows = [], []
    for index, (value, cost) in enumerate(zip(values, costs, strict=True)):
        hull = _hull(value, cost)
        start.append(hull[0])
        for before, after in zip(hull, hull[1:], strict=False):
            added, saved = cost[after] - cost[before], value[before] - value[after]
            rows.append((-(saved / added), index, before, after, added, saved))
    rows.sort(key=lambda row: row[:2])
    steps = np.array([row[1:4] for row in rows], np.intp).reshape(-1, 3)
    amounts = np.array([row[4:] for row in rows], np.float64).reshape(-1, 2)
    return HullPath(np.array(start, np.intp), *steps.T, *amounts.T)


def _hull(value: FloatArray, cost: FloatArray) -> list[int]:
    """Items on the lower convex hull, from the cheapest on; slopes fall strictly."""

    def slope(before: int, after: int) -> float:
        return float((value[before] - value[after]) / (cost[after] - cost[before]))

    hull: list[int] = []
    for item in np.lexsort((value, cost)).tolist():
        if hull and value[item] >= value[hull[-1]]:
            continue
        while len(hull) > 1 and slope(*hull[-2:]) <= slope(hull[-1], item):
            hull.pop()
        hull.append(item)
    return hull


def total(columns: Sequence[FloatArray], choice: IntArray) -> float:
    """Sum over classes of the chosen entries."""
    return float(sum(column[item] for column, item in zip(columns, choice, strict=True)))


def solve(values: Sequence[FloatArray], costs: Sequence[FloatArray], budget: float) -> Solution:
    """Least total value with a total cost within the budget.

    Args:
        values: value of every item, by class, >= 0.
        costs: cost of every item, by class, >= 0; sums below 2^53 are exact if these are integers.
        budget: largest total cost; at least the sum of each class's least cost.

    Returns:
        The choice with its certified bound.

    Raises:
        ValueError: if no choice fits.

    Cost: 0.03 to 0.3 s for 328 classes of 18 items on one core.
    """
    path = hull_path(values, costs)
    slack = budget - total(costs, path.start)
    if slack < 0:
        raise ValueError(f"no choice within {budget}")
    taken = int(np.searchsorted(np.cumsum(path.costs), slack, side="right"))
    base = path.choice(taken)
    bound = total(values, base)
    if taken == len(path.costs):
        return Solution(base, bound, bound)
    slack = budget - total(costs, base)
    slope = float(path.gains[taken] / path.costs[taken])
    bound -= slope * slack
    reduced = [
        value - value[item] + slope * (cost - cost[item])
        for value, cost, item in zip(values, costs, base, strict=True)
    ]
    search = _Search(values, costs, path, budget)
    return search.run(_greedy(path, taken, base, slack), bound, reduced)


def _greedy(path: HullPath, taken: int, base: IntArray, slack: float) -> IntArray:
    """Take every later step of the path that still fits."""
    choice = base.copy()
    for step in range(taken, len(path.costs)):
        index = path.classes[step]
        if choice[index] == path.before[step] and path.costs[step] <= slack:
            choice[index] = path.after[step]
            slack -= float(path.costs[step])
    return choice


class _Rest:
    """The relaxation of the classes that are still open, as a function of the room for them."""

    def __init__(self, path: HullPath, start: tuple[float, float], is_open: BoolArray) -> None:
        self.steps: IntArray = np.flatnonzero(is_open[path.classes])
        self.costs = start[0] + np.append(0.0, np.cumsum(path.costs[self.steps]))
        self.values = start[1] - np.append(0.0, np.cumsum(path.gains[self.steps]))

    def bound(self, room: FloatArray) -> FloatArray:
        """Least value the open classes could have within `room`; infinite if none fits."""
        bound: FloatArray = np.interp(room, self.costs, self.values, left=np.inf)
        return bound

    def completed(self, room: FloatArray) -> FloatArray:
        """Value of the open classes with the whole steps that fit; infinite if none fits."""
        last = np.searchsorted(self.costs, room, side="right") - 1
        return np.where(last >= 0, self.values[last], np.inf)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """States after one more class: where each came from and which item it took."""

    index: int
    parents: IntArray
    items: IntArray


class _Search:
    """Dynamic programming over the classes that the bound leaves open."""

    def __init__(
        self,
        values: Sequence[FloatArray],
        costs: Sequence[FloatArray],
        path: HullPath,
        budget: float,
    ) -> None:
        self.values, self.costs, self.path, self.budget = values, costs, path, budget
        self.layers: list[_Layer] = []

    def run(self, choice: IntArray, bound: float, reduced: Sequence[FloatArray]) -> Solution:
        """The best choice within the budget.

        Args:
            choice: one within the budget.
            bound: value of the relaxation.
            reduced: reduced cost of every item, by class; >= 0 but for rounding.
        """
        best = total(self.values, choice)
        floor = np.inf  # least bound of the states dropped for their number
        is_open = np.ones(len(choice), bool)
        start = [total(columns, self.path.start) for columns in (self.costs, self.values)]
        cost, value = np.zeros(1), np.zeros(1)
        for index in _order(reduced, best - bound):
            items = np.flatnonzero(reduced[index] < best - bound)
            if best - bound <= _TOLERANCE * bound or len(items) < 2:
                break
            is_open[index] = False
            start[0] -= self.costs[index][self.path.start[index]]
            start[1] -= self.values[index][self.path.start[index]]
            rest = _Rest(self.path, (start[0], start[1]), is_open)
            parents = np.repeat(np.arange(len(cost)), len(items))
            taken = np.tile(items, len(cost))
            cost = np.add.outer(cost, self.costs[index][items]).ravel()
            value = np.add.outer(value, self.values[index][items]).ravel()
            bounds = value + rest.bound(self.budget - cost)
            kept, dropped = _select(cost, value, bounds, best)
            floor = min(floor, dropped)
            if len(kept) == 0:
                break
            cost, value = cost[kept], value[kept]
            self.layers.append(_Layer(index, parents[kept], taken[kept]))
            completed = value + rest.completed(self.budget - cost)
            state = int(np.argmin(completed))
            if completed[state] < best:
                best = float(completed[state])
                choice = self._trace(state, rest, self.budget - float(cost[state]))
        best = total(self.values, choice)
        return Solution(choice, best, min(best, max(bound, floor)))

    def _trace(self, state: int, rest: _Rest, room: float) -> IntArray:
        """The choice of a state of the last layer, open classes as far along the path as fits."""
        fitting = int(np.searchsorted(rest.costs, room, side="right")) - 1
        steps = rest.steps[:fitting]
        choice = self.path.start.copy()
        choice[self.path.classes[steps]] = self.path.after[steps]
        for layer in reversed(self.layers):
            choice[layer.index] = layer.items[state]
            state = int(layer.parents[state])
        return choice


def _order(reduced: Sequence[FloatArray], gap: float) -> list[int]:
    """Classes with at least two items of reduced cost below `gap`, least second one first."""
    second = [float(np.partition(row, 1)[1]) if len(row) > 1 else np.inf for row in reduced]
    open_classes = [index for index in range(len(reduced)) if second[index] < gap]
    return sorted(open_classes, key=lambda index: second[index])


def _select(
    cost: FloatArray, value: FloatArray, bounds: FloatArray, best: float
) -> tuple[IntArray, float]:
    """States that can lead below `best` and that no other beats in cost and value.

    Returns:
        At most `_MAX_STATES` states in order of cost, and the least bound among those cut for their
        number (else infinity).
    """
    alive = np.flatnonzero(bounds < best)
    order = alive[np.lexsort((value[alive], cost[alive]))]
    lowest = np.minimum.accumulate(value[order])
    better = np.ones(len(order), bool)
    better[1:] = value[order][1:] < lowest[:-1]
    kept = order[better]
    if len(kept) <= _MAX_STATES:
        return kept, np.inf
    ranked = np.argsort(bounds[kept], kind="stable")
    dropped = float(bounds[kept[ranked[_MAX_STATES]]])
    return kept[np.sort(ranked[:_MAX_STATES])], dropped
