"""Drawing a share of the items of a benchmark, the same with every version of numpy."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


def raw(seed: Sequence[int], size: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit numbers, (size,), from seeds >= 0.

    Numpy promises the streams of its bit generators for good, and those of its distributions not.
    """
    return np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(size)


def sample(items: Sequence[T], size: int, seed: int, label: str) -> list[T]:
    """`size` of the items without replacement, in their order; all if there are not more.

    Args:
        items: what is drawn from.
        size: how many, >= 0.
        seed: seed >= 0.
        label: makes draws with one seed independent of each other.
    """
    keys = raw([seed, zlib.crc32(label.encode())], len(items))
    chosen = np.argsort(keys, kind="stable")[:size]
    return [items[index] for index in np.sort(chosen)]


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items at even distances, in their order; all without a limit."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def apportion(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Shares of a total in proportion to sizes, by largest remainder; ties by order.

    Args:
        sizes: size of every group, > 0 in sum.
        total: sum of the shares; cut to the sum of the sizes, so that no share is over its size.
    """
    whole = sum(sizes.values())
    total = min(total, whole)
    shares = {name: total * size // whole for name, size in sizes.items()}
    missing = total - sum(shares.values())
    by_remainder = sorted(sizes, key=lambda name: -(total * sizes[name] % whole))
    for name in by_remainder[:missing]:
        shares[name] += 1
    return shares
