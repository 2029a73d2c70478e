"""Answers that are being written, as who asked for them sees them."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

from optiq.engine.events import (
    Answer,
    Event,
    Finished,
    FinishReason,
    TokenLogprob,
    ToolCallDone,
    Usage,
    collect,
)
from optiq.engine.loop import Loop
from optiq.engine.pace import DraftReport
from optiq.engine.requests import Reader, Request
from optiq.engine.sequence import SequenceState
from optiq.errors import EngineFailure, OptiqError


class Writing:
    """A loop under a lock: who waits for an event runs steps for all answers.

    Args:
        loop: of the model.

    Attributes:
        lock: held while the model runs.
    """

    def __init__(self, loop: Loop) -> None:
        self.lock = threading.RLock()
        self._loop = loop
        self._abandoned: deque[SequenceState] = deque()

    def begin(self, requests: Sequence[Request], readers: Sequence[Reader]) -> list[Generation]:
        """Queue several answers to one prompt."""
        with self.lock:
            self._clear()
            begun = self._loop.add_choices(requests, readers)
            return [Generation(self, sequence) for sequence in begun]

    @property
    def idle(self) -> bool:
        """Whether every answer that was begun has ended."""
        with self.lock:
            self._clear()
            return self._loop.idle

    def step(self) -> None:
        """Run one step for all answers."""
        with self.lock:
            self._clear()
            self._loop.step()

    def next_event(self, sequence: SequenceState) -> Event | None:
        """The next event of an answer, None at its end; steps are run until there is one.

        Raises:
            OptiqError: if it failed.
        """
        with self.lock:
            while not sequence.events and not sequence.done:
                self._clear()
                self._loop.step()
            if sequence.events:
                return sequence.events.popleft()
            if sequence.error is not None:
                raise _failure(sequence)
            return None

    def pending(self, sequence: SequenceState) -> list[Event]:
        """Events of an answer that are there already.

        Raises:
            OptiqError: if it failed and there are none.
        """
        with self.lock:
            events = list(sequence.events)
            sequence.events.clear()
            if not events and sequence.error is not None:
                raise _failure(sequence)
            return events

    def cancel(self, sequence: SequenceState) -> None:
        """Write no more of an answer."""
        with self.lock:
            self._loop.cancel(sequence)

    def abandon(self, sequence: SequenceState) -> None:
        """Nobody holds an answer any more; may be called from anywhere, also with the lock held."""
        self._abandoned.append(sequence)

    def _clear(self) -> None:
        """Cancel answers that nobody holds any more."""
        while self._abandoned:
            self._loop.cancel(self._abandoned.popleft())


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished answer.

    Attributes:
        text: of the answer.
        reasoning: text of the thinking before it.
        tool_calls: calls in it, in order.
        token_ids: all that were drawn, a stop token among them.
        finish_reason: why it ended.
        stop: the stop string that ended it, if one did.
        usage: counts of tokens.
        logprobs: one a token, where they were asked for.
        acceptance: what the drafter was good for; None without one.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCallDone, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...]
    acceptance: DraftReport | None


class Generation:
    """An answer that is being written: iterate over its events, or take the `result`."""

    def __init__(self, writing: Writing, sequence: SequenceState) -> None:
        self._writing, self._sequence = writing, sequence
        self._seen: list[Event] = []
        weakref.finalize(self, writing.abandon, sequence)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """The next event; the model runs until there is one.

        Raises:
            EngineFailure: if the machine fails, or optiq does.
        """
        event = self._writing.next_event(self._sequence)
        if event is None:
            raise StopIteration
        self._seen.append(event)
        return event

    def pending(self) -> list[Event]:
        """Events that are there already, in order; for who calls `Engine.step` himself.

        Raises:
            EngineFailure: if the machine fails, or optiq does.
        """
        events = self._writing.pending(self._sequence)
        self._seen += events
        return events

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens of the prompt, one for each soft token of an image."""
        return self._sequence.request.tokens

    @property
    def done(self) -> bool:
        """Whether no more is written; there may be events that were not taken."""
        return self._sequence.done

    def cancel(self) -> None:
        """Write no more; the last event says `cancelled`."""
        self._writing.cancel(self._sequence)

    @property
    def acceptance(self) -> DraftReport | None:
        """What the drafter was good for so far; None without one."""
        return self._sequence.report

    def result(self) -> Result:
        """Everything, when it has ended.

        Raises:
            EngineFailure: if the machine fails, or optiq does.
        """
        for _ in self:
            pass
        answer: Answer = collect(self._seen)
        finish = answer.finish
        assert isinstance(finish, Finished)
        return Result(
            text=answer.text,
            reasoning=answer.reasoning,
            tool_calls=tuple(answer.tool_calls),
            token_ids=tuple(answer.token_ids),
            finish_reason=finish.reason,
            stop=finish.stop,
            usage=finish.usage,
            logprobs=tuple(answer.logprobs),
            acceptance=self.acceptance,
        )


def _failure(sequence: SequenceState) -> OptiqError:
    """What ended a sequence, as an error of ours."""
    if isinstance(sequence.error, OptiqError):
        return sequence.error
    failure = EngineFailure(
        f"the engine failed at token {len(sequence.tokens)} ({sequence.error!r})"
    )
    failure.__cause__ = sequence.error
    return failure
