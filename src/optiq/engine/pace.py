"""How many drafts a round is worth, from measured acceptance and measured times.

With c_i the chance that draft i is right given that those before it were, a round of k drafts
writes 1 + c_1 + c_1 c_2 + ... tokens on average. Of all k the one with the most tokens a second is
taken. Where that is none, drafting is off, and tried again ever more rarely: in the same sequence,
and in those that begin, so that many short answers do not each pay for finding out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict, deque

MAX_DRAFTS = 16
_FIRST = 4
_KEPT_TIMES = 7
_DECAY = 0.97
_MIN_GAIN = 1.02
_PLAIN_EVERY = 64
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512
_PROVEN = 4  # rounds with drafts that are enough to know that they pay


@dataclasses.dataclass(frozen=True)
class DraftReport:
    """What a drafter was good for.

    Attributes:
        drafter: its name.
        rounds: passes of the target in which drafts were checked.
        plain_steps: passes without drafts.
        drafted: drafts that were checked.
        accepted: of these, right; with a fixed number, those behind the end of the answer too.
        tokens: written in all passes.
        speedup: time of as many plain steps over the time taken; None where no plain step was
            measured.
    """

    drafter: str
    rounds: int = 0
    plain_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    speedup: float | None = None

    @property
    def accepted_per_round(self) -> float | None:
        """Drafts accepted in a round with drafts."""
        return self.accepted / self.rounds if self.rounds else None

    @property
    def steps_per_token(self) -> float | None:
        """Passes of the target for a token."""
        return (self.rounds + self.plain_steps) / self.tokens if self.tokens else None


class StepTimes:
    """Seconds of a round by the number of its drafts, as last measured on this model."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_TIMES))

    def add(self, count: int, seconds: float) -> None:
        """A round took so long."""
        self._seen[count].append(seconds)

    def of(self, count: int) -> float | None:
        """Measured median, else a line through what was measured; None without two points."""
        if self._seen[count]:
            return statistics.median(self._seen[count])
        known = {n: statistics.median(times) for n, times in self._seen.items() if times}
        if len(known) < 2:
            return None
        slope, start = statistics.linear_regression(list(known), list(known.values()))
        return max(start + slope * count, min(known.values()))

    def measured(self, count: int) -> bool:
        """Whether there is a time for it."""
        return bool(self._seen[count])


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """Sums over rounds with drafts."""

    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, tokens: int, seconds: float) -> _Rounds:
        return _Rounds(self.rounds + 1, self.tokens + tokens, self.seconds + seconds)


class _Pauses:
    """Plain steps to wait after each failure in a row, twice as many as before.

    Args:
        first: after the first failure.
    """

    def __init__(self, first: int = _FIRST_PAUSE) -> None:
        self._next = first

    def next(self) -> int:
        pause = self._next
        self._next = min(2 * pause, _LONGEST_PAUSE)
        return pause


class Experience:
    """What the sequences of a model know together of its drafter.

    Attributes:
        times: of rounds.
    """

    def __init__(self) -> None:
        self.times = StepTimes()
        self._wait = 0
        self._pauses = _Pauses()

    @property
    def may_look(self) -> bool:
        """Whether a sequence that begins tries drafts."""
        return self._wait == 0

    def plain_step(self) -> None:
        """A sequence took a step without drafts."""
        self._wait = max(0, self._wait - 1)

    def failed(self) -> int:
        """Drafts did not pay for a sequence that began; returns the plain steps to wait now."""
        self._wait = self._pauses.next()
        return self._wait

    def paid(self) -> None:
        """Drafts pay for a sequence, so others try them when they begin."""
        self._wait, self._pauses = 0, _Pauses()


class Pace:
    """The number of drafts for one sequence, round by round.

    Args:
        experience: shared by the sequences of a model.
        fixed: this many always; None to decide by measurement.
    """

    def __init__(self, experience: Experience, fixed: int | None = None) -> None:
        self._experience, self._fixed = experience, fixed
        self._times = experience.times
        self._looked = False
        self._since_off = _Rounds()
        self._tried = [0.0] * MAX_DRAFTS
        self._right = [0.0] * MAX_DRAFTS
        self._steps_since_plain = 0
        self._pause = 0
        self._pauses = _Pauses()
        self._seconds = 0.0
        self.rounds = self.plain_steps = self.drafted = self.accepted = self.tokens = 0

    @property
    def is_fixed(self) -> bool:
        """Whether every round has the number of drafts that was asked for."""
        return self._fixed is not None

    def next(self) -> int:
        """Drafts of the next round."""
        if self._fixed is not None:
            return self._fixed
        if not self._times.measured(0) or self._steps_since_plain >= _PLAIN_EVERY:
            return 0
        if self._pause > 0:
            return 0
        if not self._tried[0]:
            return _FIRST if self._looked or self._experience.may_look else 0
        best = self._best()
        if best == 0:
            if not self._looked:
                self._pauses = _Pauses(self._experience.failed())
            self._looked = True
            self._pause = self._pauses.next()
        elif self._proven:
            self._experience.paid()
            self._looked = True
            self._pauses = _Pauses()
        return best

    def record(self, count: int, accepted: int, tokens: int, seconds: float) -> None:
        """What became of a round.

        Args:
            count: drafts in it.
            accepted: of these, right.
            tokens: that it wrote: those accepted and one more, or fewer where the answer ended.
            seconds: that it took, drafting and checking.
        """
        self._times.add(count, seconds)
        self._seconds += seconds
        self.tokens += tokens
        self.drafted += count
        self.accepted += accepted
        self._count(count, accepted)
        if count:
            self.rounds += 1
            self._since_off = self._since_off.plus(tokens, seconds)
            self._steps_since_plain += 1
            return
        self.plain_steps += 1
        self._experience.plain_step()
        self._steps_since_plain = 0
        if self._pause > 0:
            self._pause -= 1
            if self._pause == 0:  # one more look, with the memory of failure faded
                self._since_off = _Rounds()
                self._tried = [0.0] * MAX_DRAFTS
                self._right = [0.0] * MAX_DRAFTS

    @property
    def _proven(self) -> bool:
        """Whether the rounds since drafts were last off were faster than plain steps."""
        plain, since = self._times.of(0), self._since_off
        return (
            plain is not None and since.rounds >= _PROVEN and since.tokens * plain > since.seconds
        )

    def report(self, drafter: str) -> DraftReport:
        """What the drafter was good for so far."""
        plain = self._times.of(0) if self._times.measured(0) else None
        speedup = plain * self.tokens / self._seconds if plain and self._seconds else None
        return DraftReport(
            drafter,
            self.rounds,
            self.plain_steps,
            self.drafted,
            self.accepted,
            self.tokens,
            speedup,
        )

    def _count(self, count: int, accepted: int) -> None:
        if not count:
            return
        self._tried = [_DECAY * n for n in self._tried]
        self._right = [_DECAY * n for n in self._right]
        for number in range(min(accepted + 1, count)):
            self._tried[number] += 1
            self._right[number] += number < accepted

    def _best(self) -> int:
        """The number of drafts with the most tokens a second; 0 unless it clearly pays."""
        plain = self._times.of(0)
        assert plain is not None
        best, best_rate = 0, _MIN_GAIN / plain
        tokens, chance, share = 1.0, 1.0, 0.5
        for count in range(1, MAX_DRAFTS + 1):
            tried = self._tried[count - 1]
            if tried:  # the prior is worth one draft, as right as the one before it
                share = (self._right[count - 1] + share) / (tried + 1)
            chance *= share
            tokens += chance
            seconds = self._times.of(count)
            if seconds is not None and tokens / seconds > best_rate:
                best, best_rate = count, tokens / seconds
        return best
