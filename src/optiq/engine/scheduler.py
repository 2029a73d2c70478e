"""What the next step of the loop runs; pure, without arrays.

Every running sequence that has read its prompt writes in every step. Beside that a step reads as
much of the oldest prompts as one chunk, so that a long prompt delays the others by the time of one
chunk and no more.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        running: sequences that are read or written at a time.
        prefill_tokens: tokens of prompts read in a step; a single chunk may be longer.
    """

    running: int = 32
    prefill_tokens: int = 512


@dataclasses.dataclass(frozen=True)
class Step:
    """Work of one step.

    Attributes:
        prefill: sequences of which the next chunk is read, in order; one may come several times.
        decode: sequences that write.
    """

    prefill: tuple[int, ...]
    decode: tuple[int, ...]


class Scheduler:
    """Sequences by number, first come, first served."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._waiting: deque[int] = deque()
        self._chunks: dict[int, deque[int]] = {}
        self._running: list[int] = []

    def add(self, sequence: int, chunks: Sequence[int]) -> None:
        """A new sequence.

        Args:
            sequence: its number.
            chunks: tokens of each chunk to read before it writes; may be empty.
        """
        self._chunks[sequence] = deque(chunks)
        self._waiting.append(sequence)

    def remove(self, sequence: int) -> None:
        """Forget a sequence, wherever it is."""
        del self._chunks[sequence]
        self._waiting = deque(n for n in self._waiting if n != sequence)
        self._running = [n for n in self._running if n != sequence]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._chunks

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun."""
        return len(self._waiting)

    def next(self) -> Step:
        """The next step; the chunks in it count as read."""
        while self._waiting and len(self._running) < self.limits.running:
            self._running.append(self._waiting.popleft())
        decode = tuple(n for n in self._running if not self._chunks[n])
        prefill: list[int] = []
        budget = self.limits.prefill_tokens
        for number in self._running:
            chunks = self._chunks[number]
            while chunks and (chunks[0] <= budget or not prefill):
                budget -= chunks.popleft()
                prefill.append(number)
            if chunks:
                break
        return Step(tuple(prefill), decode)
