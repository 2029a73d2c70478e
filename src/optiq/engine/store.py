"""Where the pasts of sequences come from, what they cost, and which are kept for others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from optiq.engine.kv_cache import FULL_ROOM, ROOM, SequenceCache
from optiq.engine.prefix_cache import PrefixCache, needs_snapshots
from optiq.engine.scheduler import Memory
from optiq.engine.sequence import SequenceState
from optiq.engine.target import Target, as_row


@dataclasses.dataclass(frozen=True)
class Storage:
    """How much is kept.

    Attributes:
        slack: see `Target.make_cache`.
        memory_bytes: of the pasts of running sequences and of those kept; None: no limit.
        prefix_bytes: of the pasts that are kept for later texts.
        least_gain: tokens that a snapshot in the middle of a prompt must save a later one.
    """

    slack: int = 0
    memory_bytes: int | None = None
    prefix_bytes: int = 0
    least_gain: int = 64


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of the past of one sequence.

    Attributes:
        fixed_bytes: of states.
        column_bytes: of a token, by the tokens that a layer keeps at most; None for all.
    """

    fixed_bytes: int
    column_bytes: Mapping[int | None, int]

    @classmethod
    def of(cls, target: Target, slack: int, chunk: int) -> Cost:
        """What a model's layers say when they have read a token; nothing is computed.

        Args:
            target: the model.
            slack: tokens beyond their window that sliding layers keep.
            chunk: tokens that are read at a time.
        """
        cache = target.make_cache(slack)
        target.states(as_row([0]), cache)
        columns: Counter[int | None] = Counter()
        for leaf in cache.attention:
            most = None if leaf.window is None else leaf.window + slack + chunk
            columns[most] += leaf.column_bytes
        states = (x for leaf in cache.states for x in leaf.cache if x is not None)
        return cls(sum(x.nbytes for x in states), dict(columns))

    def __call__(self, tokens: int) -> int:
        """Of a sequence of so many tokens, with the room that its caches grow by."""
        total = self.fixed_bytes
        for most, size in self.column_bytes.items():
            kept = tokens if most is None else min(tokens, most)
            total += size * (kept + max(ROOM, tokens // FULL_ROOM if most is None else 0))
        return total


class Store:
    """The pasts of one model.

    Args:
        target: the model.
        storage: how much is kept.
        chunk: tokens that are read at a time.

    Attributes:
        memory: what running sequences may take; None for as much as they want.
    """

    def __init__(self, target: Target, storage: Storage, chunk: int) -> None:
        self._target, self._storage, self._chunk = target, storage, chunk
        self.memory: Memory | None = None
        if storage.memory_bytes is not None:
            self.memory = Memory(storage.memory_bytes, Cost.of(target, storage.slack, chunk))
        self.prefixes = PrefixCache(storage.prefix_bytes) if storage.prefix_bytes else None
        self._has_snapshots = needs_snapshots(target.make_cache(storage.slack))

    @property
    def needs_marks(self) -> bool:
        """Whether it is worth knowing where turns begin."""
        return self.prefixes is not None and self._has_snapshots

    def begin(self, sequence: SequenceState) -> None:
        """Give a sequence a past that holds as much of its text as is known."""
        cache, marks = self._target.make_cache(self._storage.slack), set()
        if self.prefixes is not None:
            request, limit = sequence.request, sequence.readable
            keys = sequence.keys(len(sequence.tokens))
            found = self.prefixes.find(request.namespace, keys, limit, cache)
            marks = {limit}
            if self._has_snapshots:
                gain = found.length + self._storage.least_gain
                marks |= {at for at in (found.matched, *request.marks) if gain <= at < limit}
            if found.past is not None:
                found.past.put(cache)
        sequence.begin(cache, self._chunk, marks)

    def keep(self, sequence: SequenceState, cache: SequenceCache) -> None:
        """Keep the past of a sequence for others.

        Args:
            sequence: it.
            cache: its past, which may be cut to the tokens that it has; it is not used any more.
        """
        if self.prefixes is None or not cache.length:
            return
        excess = cache.length - len(sequence.tokens)  # drafts behind the end of the answer
        if excess > 0:
            if cache.states:
                return
            cache.back_to(cache.checkpoint(), len(sequence.tokens))
        keys = sequence.keys(cache.length)
        self.prefixes.insert(sequence.request.namespace, keys, cache)

    def make_room(self, needed_bytes: int) -> None:
        """Give up what is kept for others where the running need it."""
        if self.prefixes is not None and self.memory is not None:
            room = max(0, self.memory.budget_bytes - needed_bytes)
            self.prefixes.capacity_bytes = min(self._storage.prefix_bytes, room)
            self.prefixes.shrink(self.prefixes.capacity_bytes)
