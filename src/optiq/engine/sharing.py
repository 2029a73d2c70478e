"""Whether sequences with a drafter write one after another, in rounds, or side by side, in passes.

A round writes some tokens of one sequence, a pass of n sequences n tokens. Which is faster depends
on the machine, the model, the drafter and the text, so both are timed, and the faster one in tokens
a second is taken: rounds for one sequence, mostly passes for many. What was not taken is looked at
again now and then.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

_KEPT_ROUNDS, _KEPT_PASSES = 32, 7
_FEWEST = 3  # times that a comparison needs, of each
_GAIN = 1.05  # a change copies all keys and values
_HOLD = 32  # steps between decisions
_LOOK = 1024  # steps after which the other way is timed again
_LOOK_ROUNDS = 8  # rounds or passes of such a look


class Sharing:
    """Times of rounds and passes, and what follows from them."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[int, float]] = deque(maxlen=_KEPT_ROUNDS)
        self._passes: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_PASSES))
        self._count = 0
        self._apart = False
        self._held = 0
        self._since_look = 0

    def add_round(self, tokens: int, seconds: float) -> None:
        """A round of one sequence wrote so many tokens in so long."""
        self._rounds.append((tokens, seconds))

    def add_pass(self, count: int, seconds: float) -> None:
        """A pass of so many sequences took so long."""
        self._passes[count].append(seconds)

    def apart(self, count: int) -> bool:
        """Whether so many sequences, all of which have a drafter, write in rounds in this step."""
        if count < 2:
            return True
        self._held += 1
        self._since_look += 1
        if count != self._count or self._held >= _HOLD:
            self._count, self._held = count, 0
            self._apart = self._decided(count)
        return self._apart

    def _decided(self, count: int) -> bool:
        passes = self._passes[count]
        if len(passes) < _FEWEST:
            return False
        if len(self._rounds) < _FEWEST or self._since_look >= _LOOK:
            return self._other(count)
        tokens = sum(tokens for tokens, _ in self._rounds)
        seconds = sum(seconds for _, seconds in self._rounds)
        rounds, together = tokens / seconds, count / statistics.median(passes)
        if self._apart:
            return _GAIN * rounds > together
        return rounds > _GAIN * together

    def _other(self, count: int) -> bool:
        """The way that is not taken now, whose times are forgotten."""
        self._since_look = 0
        if self._apart:
            self._passes[count].clear()
            self._held = _HOLD - _LOOK_ROUNDS
        else:
            self._rounds.clear()
            self._held = _HOLD - max(1, _LOOK_ROUNDS // count)
        return not self._apart
