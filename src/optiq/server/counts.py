"""What the supervisor counts."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

from optiq.engine.events import Finished
from optiq.server.answers import Outcome
from optiq.server.jobs import Embedded, Reply, Said, Started, Written
from optiq.server.messages import Load, Value

_REMEMBERED: Final = 32
_WAIT_S: Final = (1.0, 60.0)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """How the engine does now, and all it has done.

    Every request is in one of `queued`, `running` and `outcomes`, and `submitted` is their sum.

    Attributes:
        submitted: requests, those refused among them.
        queued: requests of which nothing was written yet.
        running: requests that are being answered.
        outcomes: requests that ended, by how.
        prompt_tokens: read.
        completion_tokens: written.
        cached_tokens: of the prompts of finished answers, found in a cache.
        drafted_tokens: proposed by drafters, in finished answers.
        accepted_tokens: of these, equal to what was drawn.
        restarts: of the engine process.
        steps: of the engine.
        step_seconds: that they took in all.
        longest_step_s: of the steps of the last second that was reported.
        active_memory_bytes: arrays of the engine process.
        peak_memory_bytes: most of them since it started.
        loaded: names of the models in memory.
    """

    submitted: int
    queued: int
    running: int
    outcomes: Mapping[Outcome, int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    restarts: int
    steps: int
    step_seconds: float
    longest_step_s: float
    active_memory_bytes: int
    peak_memory_bytes: int
    loaded: tuple[str, ...]


class Counts:
    """Adds up what comes from the engine process.

    Attributes:
        submitted: requests.
        restarts: of the engine process.
    """

    def __init__(self) -> None:
        self.submitted = 0
        self.restarts = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._tokens: Counter[str] = Counter()
        self._steps, self._step_seconds = 0, 0.0
        self._load = Load(0, 0.0, 0.0, 0, 0)
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    def outcome(self, outcome: Outcome, now: float) -> None:
        """A request has ended."""
        self._outcomes[outcome] += 1
        if outcome == "finished":
            self._ends.append(now)

    def reply(self, reply: Reply | Value) -> None:
        """A reply has come."""
        match reply:
            case Written(_, pieces):
                self._tokens["completion_tokens"] += len(pieces)
            case Started(count) | Embedded(_, count):
                self._tokens["prompt_tokens"] += count
            case Said(_, Finished(_, usage)):
                self._tokens["cached_tokens"] += usage.cached_tokens
                self._tokens["drafted_tokens"] += usage.drafted_tokens
                self._tokens["accepted_tokens"] += usage.accepted_tokens

    def load(self, load: Load) -> None:
        """Steps were reported."""
        self._load = load
        self._steps += load.steps
        self._step_seconds += load.step_seconds

    def wait_s(self, queued: int) -> float:
        """About when so many requests will have been answered, by how fast the last ones were."""
        between = 1.0
        if len(self._ends) > 1:
            between = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        shortest, longest = _WAIT_S
        return min(max(between * queued, shortest), longest)

    def snapshot(self, *, queued: int, running: int, loaded: tuple[str, ...]) -> Snapshot:
        """Everything that was counted, with what is known elsewhere."""
        return Snapshot(
            submitted=self.submitted,
            queued=queued,
            running=running,
            outcomes=dict(self._outcomes),
            prompt_tokens=self._tokens["prompt_tokens"],
            completion_tokens=self._tokens["completion_tokens"],
            cached_tokens=self._tokens["cached_tokens"],
            drafted_tokens=self._tokens["drafted_tokens"],
            accepted_tokens=self._tokens["accepted_tokens"],
            restarts=self.restarts,
            steps=self._steps,
            step_seconds=self._step_seconds,
            longest_step_s=self._load.longest_step_s,
            active_memory_bytes=self._load.active_memory_bytes,
            peak_memory_bytes=self._load.peak_memory_bytes,
            loaded=loaded,
        )
