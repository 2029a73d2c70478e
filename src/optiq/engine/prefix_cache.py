"""Pasts of texts that were read, for the next text that begins like one of them.

A radix tree of tokens. A node is a run of tokens with the keys and values that full layers have for
them, so that a text of which a part is here is found at any length and nothing is held twice. A
sliding layer has dropped what a shorter text would need, and a state cannot go back: nodes hold
those layers as they were at their end, in a snapshot, at the places where someone thought that
another text may go on. What was least recently used goes first, a snapshot on its own.

Everything is copied in and out; nothing that a sequence writes to is held.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from optiq.backend import mx
from optiq.engine.kv_cache import SequenceCache, States
from optiq.engine.kv_coding import Columns

IMAGE_KEYS = 1 << 32
"""Keys from here on are of tokens of images, a run of equal ones for each image."""

Keys = np.ndarray[tuple[int], np.dtype[np.int64]]
"""What tells tokens apart: ids, and hashes of images for their tokens."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What is known of a text.

    Attributes:
        length: tokens of it that need not be read.
        matched: tokens that are in the tree, with or without a snapshot at their end.
        past: of the first `length` tokens; None where there are none.
    """

    length: int
    matched: int
    past: Past | None = None


@dataclasses.dataclass(frozen=True)
class Past:
    """The layers after a text, to be put into an empty cache.

    Attributes:
        length: tokens of the text.
        runs: by full layer, what it holds, run by run.
        snapshot: of the other layers.
    """

    length: int
    runs: Sequence[Sequence[Columns]]
    snapshot: _Snapshot | None

    def put(self, cache: SequenceCache) -> None:
        """Fill an empty cache of the same model."""
        full = [leaf for leaf in cache.attention if leaf.window is None]
        for leaf, runs in zip(full, self.runs, strict=True):
            leaf.fill(runs, self.length)
        if self.snapshot is not None:
            sliding = [leaf for leaf in cache.attention if leaf.window is not None]
            for leaf, kept in zip(sliding, self.snapshot.windows, strict=True):
                leaf.fill([kept], self.length)
            cache.restore(self.snapshot.states)
        cache.length = self.length


@dataclasses.dataclass(eq=False)
class _Snapshot:
    """Layers that cannot be cut back, as they were at the end of a node."""

    node: _Node
    windows: list[Columns]
    states: States

    @property
    def arrays(self) -> list[mx.array]:
        kept = [x for held in self.windows for x in held]
        return kept + [x for state in self.states for x in state if x is not None]


@dataclasses.dataclass(eq=False)
class _Node:
    """A run of tokens after that of its parent."""

    keys: Keys
    parent: _Node | None
    columns: list[Columns]
    snapshot: _Snapshot | None = None
    children: dict[int, _Node] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> list[mx.array]:
        return [x for held in self.columns for x in held]


class PrefixCache:
    """Pasts by text, for one model.

    Args:
        capacity_bytes: of all arrays that are held.

    Attributes:
        nbytes: of the arrays that are held.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes, self.nbytes = capacity_bytes, 0
        self._roots: dict[str, _Node] = {}
        # Least recently used first. A node is younger than its children and its snapshot, so that
        # the first of all is always one that can go.
        self._ages: OrderedDict[_Node | _Snapshot, None] = OrderedDict()

    def find(self, namespace: str, keys: Keys, limit: int, empty: SequenceCache) -> Found:
        """The longest beginning of a text that is known.

        Args:
            namespace: what else the past depends on.
            keys: of the text.
            limit: tokens of it that are of use at most, fewer than there are.
            empty: a cache of the model, which tells the kinds of its layers.

        Cost: O(tokens of the text), and lazy copies.
        """
        path, ends = self._walk(namespace, keys)
        matched = _outside_images(keys, min(ends[-1], limit))
        if not needs_snapshots(empty):
            length, snapshot = matched, None
        else:
            length, snapshot = _last_snapshot(path, min(ends[-1], limit))
        if not length:
            return Found(0, matched)
        used = [node for node, start in zip(path[1:], ends, strict=False) if start < length]
        self._touch(used, snapshot)
        return Found(length, matched, Past(length, _runs(used, length), snapshot))

    def insert(self, namespace: str, keys: Keys, cache: SequenceCache) -> None:
        """Keep the past of a text, if there is room for it.

        Args:
            namespace: what else the past depends on.
            keys: of the text.
            cache: after exactly this text; it is not changed.

        Cost: O(tokens of the text), and a copy of what is not here yet.
        """
        path, ends = self._walk(namespace, keys)
        known, at, node = ends[-1], ends[-2] if len(ends) > 1 else 0, path[-1]
        whole = known - at == len(node.keys)
        wants_snapshot = needs_snapshots(cache)
        if known == len(keys) and whole and (node.snapshot is not None or not wants_snapshot):
            self._touch(path[1:], node.snapshot)
            return
        if not wants_snapshot and known == len(keys):
            self._touch(path[1:])  # it lies within a run, and a run can be cut
            return
        self._touch(path[1:])
        if not self._evict(self.capacity_bytes - _added(cache, len(keys) - known), path):
            return
        if not whole:
            node = self._split(node, known - at)
        if known < len(keys):
            node = self._grow(node, keys[known:], _columns(cache, known, len(keys)))
        if wants_snapshot and node.snapshot is None:
            node.snapshot = _snapshot(node, cache)
            self._hold(node.snapshot)
        self._touch(_above(node), node.snapshot)

    def shrink(self, size_bytes: int) -> None:
        """Give up what was least recently used, until so much is left at most."""
        self._evict(size_bytes, ())

    # -- the tree --------------------------------------------------------------------------------

    def _walk(self, namespace: str, keys: Keys) -> tuple[list[_Node], list[int]]:
        """Nodes along a text, of the last of which a part may match, and where each match ends."""
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = _Node(keys[:0], None, [])
        path, ends, at = [node], [0], 0
        while at < len(keys) and (child := node.children.get(int(keys[at]))) is not None:
            same = _common(child.keys, keys[at:])
            at += same
            path.append(child)
            ends.append(at)
            if same < len(child.keys):
                break
            node = child
        return path, ends

    def _grow(self, parent: _Node, keys: Keys, columns: list[Columns]) -> _Node:
        node = _Node(keys.copy(), parent, columns)
        parent.children[int(keys[0])] = node
        self._hold(node)
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a run in two; what comes back is the first part."""
        parent = node.parent
        assert parent is not None
        upper = self._grow(parent, node.keys[:at], [_part(s, 0, at) for s in node.columns])
        self.nbytes -= _nbytes(node.arrays)
        node.columns = [_part(held, at, len(node.keys)) for held in node.columns]
        node.keys, node.parent = node.keys[at:].copy(), upper
        mx.eval(node.arrays)
        self.nbytes += _nbytes(node.arrays)
        upper.children[int(node.keys[0])] = node
        return upper

    # -- memory ----------------------------------------------------------------------------------

    def _hold(self, item: _Node | _Snapshot) -> None:
        mx.eval(item.arrays)
        self.nbytes += _nbytes(item.arrays)
        self._ages[item] = None

    def _touch(self, path: Sequence[_Node], snapshot: _Snapshot | None = None) -> None:
        """Renew a snapshot and the nodes of a path, the first of them last."""
        for item in [snapshot, *reversed(path)]:
            if item is not None:
                self._ages.move_to_end(item)

    def _evict(self, size_bytes: int, path: Sequence[_Node]) -> bool:
        """Give up the oldest until so much is left; False if this path would have to go."""
        kept = set(path)
        while self.nbytes > size_bytes:
            oldest = next(iter(self._ages), None)
            if oldest is None or oldest in kept:
                return False
            self._drop(oldest)
        return size_bytes >= 0

    def _drop(self, item: _Node | _Snapshot) -> None:
        del self._ages[item]
        self.nbytes -= _nbytes(item.arrays)
        if isinstance(item, _Snapshot):
            item.node.snapshot = None
            return
        assert item.parent is not None
        del item.parent.children[int(item.keys[0])]


def needs_snapshots(cache: SequenceCache) -> bool:
    """Whether a model has layers whose past cannot be cut back to any length."""
    return bool(cache.states) or any(leaf.window is not None for leaf in cache.attention)


def _runs(path: Sequence[_Node], length: int) -> list[list[Columns]]:
    """What layers hold of the first tokens of a path, by layer and run."""
    if not path:
        return []
    out: list[list[Columns]] = [[] for _ in path[0].columns]
    for node in path:
        count = min(len(node.keys), length)
        length -= count
        for runs, held in zip(out, node.columns, strict=True):
            runs.append(tuple(x[:, :, :count] for x in held))
    return out


def _columns(cache: SequenceCache, start: int, stop: int) -> list[Columns]:
    return [leaf.piece(start, stop) for leaf in cache.attention if leaf.window is None]


def _snapshot(node: _Node, cache: SequenceCache) -> _Snapshot:
    sliding = [leaf for leaf in cache.attention if leaf.window is not None]
    kept = [leaf.piece(cache.length - leaf.num_kept, cache.length) for leaf in sliding]
    return _Snapshot(node, kept, cache.checkpoint().states)


def _added(cache: SequenceCache, count: int) -> int:
    """Bytes that are held more with so many more tokens and a snapshot."""
    total = sum(int(x.nbytes) for leaf in cache.states for x in leaf.cache if x is not None)
    for leaf in cache.attention:
        total += leaf.column_bytes * (count if leaf.window is None else leaf.num_kept)
    return total


def _above(node: _Node) -> list[_Node]:
    """A node and those above it, the highest first, without the root."""
    out = []
    at: _Node | None = node
    while at is not None and at.parent is not None:
        out.append(at)
        at = at.parent
    return out[::-1]


def _part(held: Columns, start: int, stop: int) -> Columns:
    return tuple(mx.contiguous(x[:, :, start:stop]) for x in held)


def _last_snapshot(path: Sequence[_Node], limit: int) -> tuple[int, _Snapshot | None]:
    """The last snapshot of a path within a limit, and tokens up to it."""
    found: tuple[int, _Snapshot | None] = (0, None)
    end = 0
    for node in path:
        end += len(node.keys)
        if node.snapshot is not None and end <= limit:
            found = end, node.snapshot
    return found


def _common(first: Keys, second: Keys) -> int:
    """Tokens at the beginning that are the same."""
    count = min(len(first), len(second))
    apart = np.flatnonzero(first[:count] != second[:count])
    return int(apart[0]) if len(apart) else count


def _outside_images(keys: Keys, length: int) -> int:
    """The length, or less where it lies within an image."""
    while (
        0 < length < len(keys) and keys[length] >= IMAGE_KEYS and keys[length] == keys[length - 1]
    ):
        length -= 1
    return length


def _nbytes(arrays: Sequence[mx.array]) -> int:
    return sum(x.nbytes for x in arrays)
