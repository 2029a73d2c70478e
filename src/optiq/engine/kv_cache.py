"""Keys and values of sequences, one by one or side by side, that can take back rejected drafts.

A layer's keys lie in order of time, the newest last, so that masks are simple and taking tokens
back is moving an end. Sequences of a batch end at the same column and begin where their length puts
them. A sliding layer keeps its window and some slack: as many tokens may be taken back.

States that cannot forget (mlx-lm's arrays of convolutions and state spaces) are kept as they were
before a round, and the round is played again as far as it was right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optiq.backend import mx
from optiq.engine.kv_coding import PLAIN, Coding, Columns, coding_of
from optiq.errors import EngineFailure, UnsupportedModel
from optiq.upstream import ArraysCache, CacheList, KVCache, RotatingKVCache

ROOM = 256
"""Columns by which a cache grows at least."""

FULL_ROOM = 8
"""A cache without a window grows by its length over this."""


class KeyValueCache:
    """Keys and values of one attention layer, for one or more sequences.

    mlx-lm's models and `models.families.gemma4` drive it as they drive mlx-lm's own caches.

    Args:
        window: tokens that a query sees, itself included; None for all.
        slack: tokens that can be taken back at a time where there is a window.
        coding: how keys and values are held.

    Attributes:
        lengths: tokens taken in, by sequence.
        held: arrays of the coding; none while nothing was taken in.
    """

    def __init__(self, window: int | None = None, slack: int = 0, coding: Coding = PLAIN) -> None:
        self.window, self.slack, self.coding = window, slack, coding
        self.lengths = [0]
        self.held: Columns = ()
        self._end = 0
        self._seen = 0

    # -- what models ask for ---------------------------------------------------------------------

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: a number for one sequence, else (B,) int32."""
        return self.lengths[0] if len(self.lengths) == 1 else _positions(tuple(self.lengths))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in the keys and values of new tokens.

        Args:
            keys: (B, heads, N, head_dim).
            values: (B, heads, N, value_dim).

        Returns:
            Those that the new tokens may see, the new ones last.
        """
        count = keys.shape[2]
        self._seen = self._visible() + count
        new = self.coding.encoded(keys, values)
        self._make_room(new)
        for array, columns in zip(self.held, new, strict=True):
            array[:, :, self._end : self._end + count] = columns
        self._end += count
        self.lengths = [length + count for length in self.lengths]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What the last call of `update_and_fetch` returned."""
        return self.coding.decoded(self.newest(self._seen))

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Who sees whom among N new tokens and what `update_and_fetch` will return.

        Args:
            N: new tokens.
            window_size: of the layer; default: of the cache.
            return_array: no shorthand.

        Returns:
            (N, keys) or (B, 1, N, keys) bool; "causal" or None where that says the same.
        """
        past = self._visible()
        window = window_size or self.window
        cuts = window is not None and past + N > window and (N > 1 or self.window is None)
        padding = self._padding(past)
        if not (return_array or cuts or any(padding)):
            return "causal" if N > 1 else None
        query = mx.arange(past, past + N)[:, None]
        key = mx.arange(past + N)[None]
        mask = query >= key
        if cuts and window is not None:
            mask = mask & (query < key + window)
        if any(padding):
            mask = mask & (key >= mx.array(padding)[:, None, None, None])
        return mask

    def _visible(self) -> int:
        """Columns before the new tokens that they may see."""
        return self._end if self.window is None else min(self._end, self.window - 1)

    def _padding(self, past: int) -> list[int]:
        """Empty columns by sequence among the last `past`."""
        return [max(0, past - length) for length in self.lengths]

    def newest(self, count: int) -> Columns:
        """What is held in the last columns."""
        return self._columns(self._end - count, self._end)

    def _columns(self, start: int, stop: int) -> Columns:
        return tuple(x[:, :, start:stop] for x in self.held)

    def _make_room(self, new: Columns) -> None:
        count = new[0].shape[2]
        room = self.held[0].shape[2] if self.held else 0
        if self._end + count <= room:
            return
        kept = self._most
        room = kept + count + max(ROOM, kept // FULL_ROOM if self.window is None else 0)
        old = self.newest(kept) or (None,) * len(new)
        self.held = tuple(_moved(*pair, room) for pair in zip(old, new, strict=True))
        self._end = kept

    # -- what the engine asks for ----------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(x.nbytes for x in self.held)

    def last(self, count: int | None) -> tuple[mx.array, mx.array]:
        """The last keys and values of one sequence, oldest first.

        Args:
            count: how many at most; None for all.

        Raises:
            EngineFailure: if they are no longer there.
        """
        return self.coding.decoded(self.last_held(count))

    def last_held(self, count: int | None) -> Columns:
        """What is held of the tokens of `last`.

        Raises:
            EngineFailure: if they are no longer there.
        """
        (length,) = self.lengths
        wanted = length if count is None else min(count, length)
        if wanted > self._end or not self.held:
            raise EngineFailure(
                f"the cache keeps {self._end} of {length} tokens, fewer than the {wanted} that are "
                "needed; make it with more slack"
            )
        return self.newest(wanted)

    def piece(self, start: int, stop: int) -> Columns:
        """Copies of what is held of some tokens of one sequence, and of no others."""
        first = self._end - self.lengths[0]
        return tuple(mx.contiguous(x) for x in self._columns(first + start, first + stop))

    def fill(self, pieces: Sequence[Columns], length: int) -> None:
        """Take the last tokens of a text of this length, which are copied; the cache is empty."""
        self._end = sum(piece[0].shape[2] for piece in pieces)
        self.held = tuple(
            _padded(mx.concatenate(list(part), axis=2), self._end, ROOM)
            for part in zip(*pieces, strict=True)
        )
        self.lengths = [length]

    @property
    def column_bytes(self) -> int:
        """Bytes of a token of one sequence; 0 while nothing was taken in."""
        return sum(x.shape[1] * x.shape[3] * x.itemsize for x in self.held)

    def fork(self) -> KeyValueCache:
        """The same past for another sequence; arrays are shared until one is written."""
        out = KeyValueCache(self.window, self.slack, self.coding)
        out.lengths, out._end, out._seen = list(self.lengths), self._end, self._seen
        # MLX writes into arrays in place: another handle keeps what is there now
        out.held = tuple(mx.array(x) for x in self.held)
        return out

    def trim(self, counts: Sequence[int]) -> None:
        """Take back the last tokens.

        Args:
            counts: how many, by sequence.

        Raises:
            EngineFailure: if what they would have to see is no longer there.
        """
        least, most = min(counts), max(counts)
        for length, count in zip(self.lengths, counts, strict=True):
            left = length - count
            needed = left if self.window is None else min(left, self.window - 1)
            if left < 0 or self._end - count < needed:
                raise EngineFailure(
                    f"{count} tokens cannot be taken back from a cache of {length} that keeps the "
                    f"last {self._end}; make it with more slack"
                )
        self.lengths = [n - count for n, count in zip(self.lengths, counts, strict=True)]
        self._end -= least
        if most > least:
            # every sequence must end at the same column
            back = mx.array(list(counts))[:, None] - least
            column = mx.maximum(mx.arange(self._end)[None] - back, 0)[:, None, :, None]
            self.held = tuple(mx.take_along_axis(x, column, axis=2) for x in self.held)

    def rows(self, indices: Sequence[int]) -> KeyValueCache:
        """Some of the sequences, by ascending number; itself for all of them."""
        if len(indices) == len(self.lengths):
            return self
        out = KeyValueCache(self.window, self.slack, self.coding)
        out.lengths = [self.lengths[index] for index in indices]
        out._end = min(max(out.lengths), self._most)
        out.held = tuple(picked(x, indices) for x in self.newest(out._end))
        return out

    @property
    def _most(self) -> int:
        """Columns that are worth keeping."""
        return self._end if self.window is None else min(self._end, self.window + self.slack)

    @property
    def num_kept(self) -> int:
        """Columns that are worth keeping and hold a token of some sequence."""
        return min(max(self.lengths), self._most)

    @classmethod
    def join(cls, caches: Sequence[KeyValueCache]) -> KeyValueCache:
        """Caches side by side."""
        first = caches[0]
        out = cls(first.window, first.slack, first.coding)
        kept = [cache.num_kept for cache in caches]
        out.lengths = [length for cache in caches for length in cache.lengths]
        out._end = max(kept)
        kind = next((cache.held for cache in caches if cache.held), ())
        nothing = tuple(x[:1, :, :0] for x in kind)
        columns = [c.newest(n) or nothing for c, n in zip(caches, kept, strict=True)]
        out.held = tuple(
            mx.concatenate([_padded(x, out._end, ROOM) for x in part])
            for part in zip(*columns, strict=True)
        )
        return out


@functools.lru_cache(maxsize=8)
def _positions(lengths: tuple[int, ...]) -> mx.array:
    """One array for all layers of a pass, which ask twice each."""
    return mx.array(lengths)


def picked(x: mx.array, indices: Sequence[int]) -> mx.array:
    """Some entries of the first axis, by ascending number."""
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return x[first : last + 1]
    return mx.take(x, mx.array(list(indices)), axis=0)


def _padded(x: mx.array, columns: int, room: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (columns - x.shape[2], room), (0, 0)])


def _moved(old: mx.array | None, new: mx.array, room: int) -> mx.array:
    """Columns at the beginning of a larger array, of the kind of new ones."""
    batch, heads, _, dim = new.shape
    kept = 0 if old is None else old.shape[2]
    fresh = mx.zeros((batch, heads, room - kept, dim), new.dtype)
    return fresh if old is None or not kept else mx.concatenate([old, fresh], axis=2)


# -- kinds ---------------------------------------------------------------------------------------


def _full(cache: Any, slack: int, coding: Coding) -> KeyValueCache:  # noqa: ANN401  mlx-lm's
    del cache, slack
    return KeyValueCache(coding=coding)


def _sliding(cache: Any, slack: int, coding: Coding) -> KeyValueCache:  # noqa: ANN401
    del coding  # a window does not grow
    if cache.keep:
        raise UnsupportedModel(
            f"this model keeps its first {cache.keep} tokens beside a sliding window, which "
            "optiq's engine does not do; run it with mlx-lm"
        )
    return KeyValueCache(cache.max_size, slack)


def _arrays(cache: Any, slack: int, coding: Coding) -> Any:  # noqa: ANN401
    del slack, coding
    return cache


def _several(cache: Any, slack: int, coding: Coding) -> Any:  # noqa: ANN401
    return CacheList(*(_own(part, slack, coding) for part in cache.caches))


KINDS: dict[type, Callable[[Any, int, Coding], Any]] = {
    KVCache: _full,
    RotatingKVCache: _sliding,
    ArraysCache: _arrays,
    CacheList: _several,
}
"""mlx-lm's kinds -> what stands for them here."""


def _own(cache: Any, slack: int, coding: Coding) -> Any:  # noqa: ANN401
    make = KINDS.get(type(cache))
    if make is None:
        raise UnsupportedModel(
            f"this model keeps its past in a {type(cache).__name__}, which optiq's engine does not "
            f"know; it knows {[kind.__name__ for kind in KINDS]}; run it with mlx-lm"
        )
    return make(cache, slack, coding)


States = list[list[mx.array | None]]
"""Arrays of the layers that cannot forget, by layer."""


class Checkpoint:
    """Where a sequence was: its length, and the states that cannot be taken back."""

    def __init__(self, length: int, states: States) -> None:
        self.length, self.states = length, states


class SequenceCache:
    """The past of one or more sequences in all layers.

    Args:
        layers: as a model makes them, of mlx-lm's kinds or ours.
        slack: tokens that can be taken back in sliding layers.
        bits: of keys and values of layers without a window, 8 or 4; None for the model's own
            type.

    Raises:
        UnsupportedModel: naming a kind that is not known.
    """

    def __init__(self, layers: Sequence[Any], slack: int = 0, bits: int | None = None) -> None:
        coding = coding_of(bits)
        self.layers: list[Any] = [
            x if isinstance(x, KeyValueCache) else _own(x, slack, coding) for x in layers
        ]
        self.length = 0

    @property
    def attention(self) -> list[KeyValueCache]:
        """The layers that have keys."""
        return [leaf for leaf in self._leaves() if isinstance(leaf, KeyValueCache)]

    @property
    def states(self) -> list[Any]:
        """The layers that cannot forget: mlx-lm's ArraysCache."""
        return [leaf for leaf in self._leaves() if not isinstance(leaf, KeyValueCache)]

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, to evaluate."""
        kept = [x for leaf in self.attention for x in leaf.held]
        return kept + [x for leaf in self.states for x in leaf.cache if x is not None]

    def _leaves(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from layer.caches if isinstance(layer, CacheList) else (layer,)

    def checkpoint(self) -> Checkpoint:
        """Where a single sequence is now."""
        return Checkpoint(self.length, [_handles(leaf.cache) for leaf in self.states])

    def restore(self, states: States) -> None:
        """Take the states of a checkpoint."""
        for leaf, kept in zip(self.states, states, strict=True):
            leaf.cache = _handles(kept)

    def back_to(self, point: Checkpoint, length: int) -> int:
        """Take back the last tokens of a single sequence.

        Args:
            point: from before them.
            length: tokens to be left, not fewer than at the point.

        Returns:
            Tokens that are left: `length`, or those of the point where a layer cannot forget; the
            tokens between them have to be given again.
        """
        left = point.length if self.states else length
        for leaf in self.attention:
            leaf.trim([self.length - left])
        self.restore(point.states)
        self.length = left
        return left

    def fork(self) -> SequenceCache:
        """The same past for another sequence; nothing is copied until one of them goes on."""
        return _gathered([_forked(layer) for layer in self.layers], self.length)

    def rows(self, indices: Sequence[int]) -> SequenceCache:
        """Some of the sequences, by ascending number; layers are not copied for all of them."""
        return _gathered([_rows(layer, indices) for layer in self.layers], 0)

    def row(self, index: int, length: int) -> SequenceCache:
        """One of the sequences as a cache of its own, which has so many tokens."""
        out = self.rows([index])
        out.length = length
        return out

    @classmethod
    def elsewhere(cls, length: int) -> SequenceCache:
        """Stands for a cache whose arrays are part of a batch."""
        return _gathered([], length)

    @classmethod
    def join(cls, caches: Sequence[SequenceCache]) -> SequenceCache:
        """Caches side by side, a single one as it is; those that have states are not empty."""
        if len(caches) == 1:
            return caches[0]
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return _gathered([_joined(layer) for layer in layers], 0)


def _gathered(layers: list[Any], length: int) -> SequenceCache:
    out = SequenceCache(())
    out.layers, out.length = layers, length
    return out


def _rows(layer: Any, indices: Sequence[int]) -> Any:  # noqa: ANN401
    if isinstance(layer, KeyValueCache):
        return layer.rows(indices)
    if isinstance(layer, CacheList):
        return CacheList(*(_rows(part, indices) for part in layer.caches))
    out: Any = ArraysCache(len(layer.cache))
    out.cache = [None if x is None else picked(x, indices) for x in layer.cache]
    return out


def _forked(layer: Any) -> Any:  # noqa: ANN401
    if isinstance(layer, KeyValueCache):
        return layer.fork()
    if isinstance(layer, CacheList):
        return CacheList(*map(_forked, layer.caches))
    out: Any = ArraysCache(len(layer.cache))
    out.cache = _handles(layer.cache)
    return out


def _handles(arrays: Sequence[mx.array | None]) -> list[mx.array | None]:
    """The same arrays under other handles: MLX writes into arrays in place."""
    return [None if x is None else mx.array(x) for x in arrays]


def _joined(layers: Sequence[Any]) -> Any:  # noqa: ANN401
    first = layers[0]
    if isinstance(first, KeyValueCache):
        return KeyValueCache.join(layers)
    if isinstance(first, CacheList):
        return CacheList(*map(_joined, zip(*(layer.caches for layer in layers), strict=True)))
    out: Any = ArraysCache(len(first.cache))
    columns = zip(*(layer.cache for layer in layers), strict=True)
    out.cache = [None if xs[0] is None else mx.concatenate(list(xs)) for xs in columns]
    return out
