"""What the next step of the loop runs; pure, without arrays.

Every running sequence that has read its prompt writes in every step. Beside that a step reads as
much of the oldest prompts as one chunk, so that a long prompt delays the others by the time of one
chunk and no more.

Memory is preempted and not reserved: an answer may go on to the end of the context, mostly does
not, and reserving that would let few sequences run. A sequence begins when its prompt and some
growth fit beside the others as they are. When they outgrow the budget, the youngest loses its past,
waits, and reads again what it had read and written, in one go. The running are always the oldest of
all, so the oldest is never put back and every sequence gets its turn.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence

PREFILL_TOKENS = 512
"""Tokens of prompts read in a step where nobody says how many."""
GROWTH = 32
"""Tokens by which a sequence grows in a step at most."""

_HEADROOM = 256  # tokens of growth that a sequence needs to begin, so that it is not put back soon


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        running: sequences that are read or written at a time.
        prefill_tokens: tokens of prompts read in a step; a single chunk may be longer. None for
            what suits the device, see `engine.prefill.step_tokens`.
    """

    running: int = 32
    prefill_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the pasts of running sequences may take.

    Attributes:
        budget_bytes: for all of them.
        cost: tokens of a sequence -> bytes of its past; it does not fall.
    """

    budget_bytes: int
    cost: Callable[[int], int]

    def needed(self, lengths: Sequence[int]) -> int:
        """Bytes of sequences side by side, which take as many columns as the longest, each."""
        return len(lengths) * self.cost(max(lengths)) if lengths else 0

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether they may run together."""
        return self.needed(lengths) <= self.budget_bytes

    def longest(self) -> int:
        """Tokens of the longest sequence that may run alone, 0 if there is none."""
        low, high = 0, 1
        while self.fits([high + GROWTH]) and high < 1 << 40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits([middle + GROWTH]) else (low, middle)
        return low


@dataclasses.dataclass(frozen=True)
class Step:
    """Work of one step, in this order.

    Attributes:
        preempted: sequences that lose their past and wait.
        forks: pairs: the second takes over what the first has read, and writes.
        decode: sequences that write.
        prefill: sequences of which the next chunk is read, in order; one may come several times.
    """

    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    forks: tuple[tuple[int, int], ...] = ()
    preempted: tuple[int, ...] = ()


class Scheduler:
    """Sequences by number, first come, first served.

    Args:
        begin: called with a sequence that begins, or begins again: sizes of the chunks that it has
            to read before it writes; there may be none.
        limits: of a step.
        memory: of the pasts; None for as much as they want.
    """

    def __init__(
        self,
        begin: Callable[[int], Iterable[int]],
        limits: Limits | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.limits, self.memory = limits or Limits(), memory
        self._begin = begin
        self._lengths: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self._running: list[int] = []
        self._chunks: dict[int, deque[int]] = {}
        self._leaders: dict[int, int] = {}

    def add(self, sequence: int, length: int, leader: int | None = None) -> None:
        """A new sequence.

        Args:
            sequence: its number, above all before it.
            length: its tokens.
            leader: the one before it, of which it shares all tokens: where both run it reads
                nothing, and writes when the leader has read.
        """
        self._lengths[sequence] = length
        self._waiting.append(sequence)
        if leader is not None:
            self._leaders[sequence] = leader

    def grown(self, sequence: int, length: int) -> None:
        """A sequence has so many tokens now."""
        self._lengths[sequence] = length

    def remove(self, sequence: int) -> None:
        """Forget a sequence, wherever it is."""
        del self._lengths[sequence]
        self._chunks.pop(sequence, None)
        self._leaders.pop(sequence, None)
        self._waiting = deque(n for n in self._waiting if n != sequence)
        self._running = [n for n in self._running if n != sequence]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._lengths

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were put back."""
        return len(self._waiting)

    @property
    def needed_bytes(self) -> int:
        """What the running may take in the next step."""
        return self.memory.needed(self._sizes(GROWTH)) if self.memory else 0

    def next(self) -> Step:
        """The next step; the chunks in it count as read."""
        preempted = self._preempt()
        if not preempted:
            self._admit()
        forks = self._forks()
        ready = (n for n in self._running if not self._chunks[n] and n not in self._leaders)
        return Step(decode=tuple(ready), prefill=self._prefill(), forks=forks, preempted=preempted)

    def _sizes(self, growth: int) -> list[int]:
        return [self._lengths[n] + growth for n in self._running]

    def _preempt(self) -> tuple[int, ...]:
        """Put back the youngest until the rest fit."""
        out = []
        while self.memory and len(self._running) > 1 and not self.memory.fits(self._sizes(GROWTH)):
            number = self._running.pop()
            del self._chunks[number]
            self._leaders.pop(number, None)
            self._waiting.appendleft(number)
            out.append(number)
        return tuple(out)

    def _admit(self) -> None:
        """Let the oldest of those that wait begin; none overtakes another."""
        while self._waiting and len(self._running) < self.limits.running:
            number = self._waiting[0]
            sizes = [*self._sizes(_HEADROOM), self._lengths[number] + _HEADROOM]
            if self._running and self.memory and not self.memory.fits(sizes):
                break
            self._waiting.popleft()
            self._running.append(number)
            if not self._chunks.get(self._leaders.get(number, -1)):  # it has read, or is gone
                self._leaders.pop(number, None)
            follows = number in self._leaders
            self._chunks[number] = deque(() if follows else self._begin(number))

    def _forks(self) -> tuple[tuple[int, int], ...]:
        """Followers whose leader has read; those whose leader is gone read themselves."""
        out = []
        for number, leader in list(self._leaders.items()):
            if number not in self._chunks:
                continue
            if leader not in self._chunks:
                self._chunks[number] = deque(self._begin(number))
            elif not self._chunks[leader]:
                out.append((leader, number))
            else:
                continue
            del self._leaders[number]
        return tuple(out)

    def _prefill(self) -> tuple[int, ...]:
        prefill: list[int] = []
        budget = self.limits.prefill_tokens or PREFILL_TOKENS
        for number in self._running:
            chunks = self._chunks[number]
            while chunks and (chunks[0] <= budget or not prefill):
                budget -= chunks.popleft()
                prefill.append(number)
            if chunks:
                break
        return tuple(prefill)
