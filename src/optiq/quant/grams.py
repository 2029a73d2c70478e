"""Gram matrices of the inputs of every matrix of a block."""

from __future__ import annotations

from collections.abc import Iterator

from optiq.backend import mx
from optiq.models.taps import Call
from optiq.numerics.gram import gram


class GramStore:
    """Gram matrices of the matrices of one block; matrices that read the same array share one.

    Sums keep their rounding errors in a second array, so that they do not depend on the order of
    the terms: error feedback amplifies a difference in the last bit, and processes that share a run
    must agree.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[mx.array, mx.array]] = []
        self._of: dict[str, int] = {}

    def add(self, calls: list[Call]) -> None:
        """Add the inputs of one micro-batch; call it with every micro-batch of the block."""
        fresh: dict[int, int] = {}
        added: set[tuple[int, int]] = set()
        for call in calls:
            if call.lookup:
                continue
            key = id(call.x)
            if call.path not in self._of:
                if key not in fresh:
                    fresh[key] = len(self._sums)
                    zero = mx.zeros((call.x.shape[-1],) * 2)
                    self._sums.append((zero, zero))
                self._of[call.path] = fresh[key]
            slot = self._of[call.path]
            if (slot, key) not in added:
                self._sums[slot] = _added(self._sums[slot], gram(call.x))
                added.add((slot, key))
        mx.eval(self._sums)

    def gather(self, group: mx.distributed.Group) -> None:
        """Take in the sums of the other processes, which have seen the same matrices."""
        for slot, parts in enumerate(self._sums):
            totals, rests = (mx.distributed.all_gather(part[None], group=group) for part in parts)
            total = (mx.zeros_like(parts[0]), rests.sum(axis=0))
            for other in totals:
                total = _added(total, other)
            self._sums[slot] = total
            mx.eval(total)

    def groups(self) -> Iterator[tuple[list[str], mx.array]]:
        """(paths, Gram matrix) of every shared input, in order of first use."""
        for slot, (total, rest) in enumerate(self._sums):
            yield [path for path, index in self._of.items() if index == slot], total + rest

    def clear(self) -> None:
        """Forget everything."""
        self._sums, self._of = [], {}


def _added(total: tuple[mx.array, mx.array], new: mx.array) -> tuple[mx.array, mx.array]:
    """A sum and what rounding took from it, with one more term.

    Reference: two-sum of Knuth, The Art of Computer Programming 2, 4.2.2.
    """
    high, rest = total
    s = high + new
    part = s - high
    return s, rest + ((high - (s - part)) + (new - part))
