"""The generation loop: text, images, batches and speculative decoding.

One thread drives it, step by step. A step reads chunks of prompts and lets every sequence that has
read its prompt write: one sequence alone in a round with drafts, several side by side in one pass
of the model, a token each. Which sequences share a step changes what they write no more than
rounding does.

Reference: sample-match acceptance: the target draws its token with the key of the place, and a
draft is accepted if it equals that draw. The text is that of plain decoding, at any temperature.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from optiq.backend import mx
from optiq.engine.drafters.base import Drafter
from optiq.engine.events import FinishReason, TokenLogprob
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.pace import MAX_DRAFTS, Pace, StepTimes
from optiq.engine.requests import Constraint, Reader, Request
from optiq.engine.sampling import Place, Row, most_likely, reported_logprobs, sampled
from optiq.engine.scheduler import Limits, Scheduler
from optiq.engine.sequence import Drafting, SequenceState
from optiq.engine.target import Target, as_row


class Loop:
    """Sequences that are read and written together.

    Args:
        target: the model.
        suppressed: tokens that are never written.
        drafter: what proposes tokens.
        limits: of a step.
        slack: see `Target.make_cache`.
    """

    def __init__(
        self,
        target: Target,
        suppressed: Sequence[int] = (),
        drafter: Drafter | None = None,
        limits: Limits | None = None,
        slack: int = 0,
    ) -> None:
        self.target, self.drafter = target, drafter
        self._suppressed = tuple(suppressed)
        self._slack = slack
        self._scheduler = Scheduler(limits)
        self._sequences: dict[int, SequenceState] = {}
        self._numbers = itertools.count()
        self._times = StepTimes()
        self._batch = _Batch()

    # -- what drivers call -----------------------------------------------------------------------

    def add(self, request: Request, reader: Reader) -> SequenceState:
        """Queue a request; its events appear in `SequenceState.events` as steps are taken."""
        drafting = None
        if self.drafter is not None and request.num_drafts != 0:
            pace = Pace(self._times, request.num_drafts)
            drafting = Drafting(self.drafter.name, self.drafter.start(), pace)
        chunk = self._scheduler.limits.prefill_tokens
        cache = self.target.make_cache(self._slack)
        sequence = SequenceState(request, cache, reader, drafting, chunk)
        if request.max_tokens < 1:
            sequence.end("length")
            return sequence
        number = next(self._numbers)
        self._sequences[number] = sequence
        self._scheduler.add(number, tuple(sequence.parts))
        return sequence

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle

    def step(self) -> None:
        """Run one step. What fails for one sequence ends that sequence, with its `error`."""
        step = self._scheduler.next()
        writing = [self._sequences[number] for number in step.decode]
        alone = [s for s in writing if len(writing) == 1 or s.begins_alone]
        together = [s for s in writing if s not in alone]
        if len(together) == 1:  # its company begins
            alone, together = writing, []
        self._batch.arrange(together)
        for sequence in alone:
            _guarded([sequence], self._round)
        if together:
            _guarded(together, self._pass)
        for number in step.prefill:
            _guarded([self._sequences[number]], self._read)
        self._forget(number for number, s in list(self._sequences.items()) if s.done)

    def cancel(self, sequence: SequenceState, reason: FinishReason = "cancelled") -> None:
        """End a sequence before the next step."""
        if not sequence.done:
            sequence.end(reason)
        self._forget(n for n, other in list(self._sequences.items()) if other is sequence)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._scheduler.remove(number)
            del self._sequences[number]

    # -- reading and writing ---------------------------------------------------------------------

    def _read(self, sequences: Sequence[SequenceState]) -> None:
        """The next chunk of a prompt."""
        (sequence,) = sequences
        tokens = sequence.unread[: sequence.parts.popleft()]
        features = sequence.features_of(tokens)
        states = self.target.states(as_row(tokens), sequence.cache, features)
        if self.drafter is not None and self.drafter.reads_states:
            sequence.state = states[:, -1:]
            mx.eval(sequence.state)
        mx.eval(sequence.cache.arrays)

    def _round(self, sequences: Sequence[SequenceState]) -> None:
        """One round of a sequence: drafts, if it has a drafter, and a token that is no draft."""
        (sequence,) = sequences
        start = time.perf_counter()
        drafts, allowed = _constrained(sequence.request.constraint, self._drafts(sequence))
        unread, cache = sequence.unread, sequence.cache
        features = sequence.features_of(unread)
        point, tokens = cache.checkpoint(), [*unread, *drafts]
        states = self.target.states(as_row(tokens), cache, features)[:, -len(drafts) - 1 :]
        logits = self.target.logits(states)[0]
        rows, places = sequence.rows(drafts), sequence.places(len(drafts) + 1)
        drawn, logprobs = self._drawn(logits, rows, places, allowed)
        right = accepted(drafts, drawn)
        if right < len(drafts):
            kept = cache.length - len(drafts) + right
            left = cache.back_to(point, kept)
            if left < kept:  # a layer that cannot forget reads again what was right
                again = tokens[: kept - left]
                self.target.states(as_row(again), cache, features)
                mx.eval(cache.arrays)
        sequence.state = states[:, right : right + 1]
        new = sequence.up_to_stop(drawn[: right + 1])
        if sequence.drafting is not None:
            seconds = time.perf_counter() - start
            sequence.drafting.pace.record(len(drafts), right, len(new), seconds)
        sequence.take(new, logprobs[: len(new)])

    def _pass(self, sequences: Sequence[SequenceState]) -> None:
        """One token for each sequence of the batch."""
        constraints = [s.request.constraint for s in sequences]
        allowed = _stacked([None if c is None else c.allowed() for c in constraints])
        last = mx.array([[s.tokens[-1]] for s in sequences], dtype=mx.int32)
        states = self.target.states(last, self._batch.cache)
        logits = self.target.logits(states)[:, 0]
        rows = [s.rows()[0] for s in sequences]
        places = [s.places(1)[0] for s in sequences]
        drawn, logprobs = self._drawn(logits, rows, places, allowed)
        for index, sequence in enumerate(sequences):
            sequence.cache.length += 1
            sequence.state = states[index : index + 1]
            _guarded([sequence], _taker(drawn[index : index + 1], logprobs[index : index + 1]))

    def _drafts(self, sequence: SequenceState) -> list[int]:
        """What a drafter proposes, as far as the answer can go."""
        drafting, request = sequence.drafting, sequence.request
        if drafting is None:
            return []
        room = request.max_tokens - sequence.written - 1
        count = min(drafting.pace.next(), MAX_DRAFTS, room)
        if count < 1:
            return []
        proposed = drafting.session.propose(sequence.tokens, sequence.state, sequence.cache, count)[
            :count
        ]
        ends = [i for i, token in enumerate(proposed) if token in request.stop]
        return proposed[: ends[0] + 1] if ends else proposed

    def _drawn(
        self,
        logits: mx.array,
        rows: Sequence[Row],
        places: Sequence[Place],
        allowed: mx.array | None,
    ) -> tuple[list[int], list[TokenLogprob]]:
        """A token for each row of logits, and log-probabilities where a row asks for them."""
        tokens = _numbers(sampled(logits, rows, places, self._suppressed, allowed))
        if not any(row.sampling.logprobs for row in rows):
            return tokens, []
        reported = reported_logprobs(logits, self._suppressed)
        own = _numbers(mx.take_along_axis(reported, mx.array(tokens)[:, None], axis=-1)[:, 0])
        count = max(row.sampling.top_logprobs for row in rows)
        ids, values = most_likely(reported, count)
        found = []
        for index, row in enumerate(rows):
            pairs = zip(ids[index], values[index], strict=True)
            top = tuple(itertools.islice(pairs, row.sampling.top_logprobs))
            found.append(TokenLogprob(tokens[index], own[index], top))
        return tokens, found


class _Batch:
    """Sequences that write side by side, and their joined caches."""

    def __init__(self) -> None:
        self.members: list[SequenceState] = []
        self.cache = SequenceCache(())

    def arrange(self, members: Sequence[SequenceState]) -> None:
        """Let these sequences be the batch; those that leave get their own cache back.

        Cost: nothing while they stay the same, else a copy of all their keys and values.
        """
        if len(members) == len(self.members) and all(
            a is b for a, b in zip(members, self.members, strict=True)
        ):
            return
        for index, sequence in enumerate(self.members):
            if not sequence.done:
                sequence.cache = self.cache.row(index, sequence.cache.length)
        self.members, self.cache = list(members), SequenceCache(())
        if not members:
            return
        self.cache = SequenceCache.join([sequence.cache for sequence in members])
        for sequence in members:
            sequence.cache = SequenceCache.elsewhere(sequence.cache.length)
        mx.eval(self.cache.arrays)


def accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """Drafts before the first that is not what was drawn in its place."""
    pairs = zip(drafts, drawn, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _constrained(
    constraint: Constraint | None, drafts: list[int]
) -> tuple[list[int], mx.array | None]:
    """Drafts up to the first that the grammar forbids, and what it allows at each and after."""
    if constraint is None:
        return drafts, None
    masks, good = [constraint.allowed()], 0
    for token in drafts:
        if not constraint.accept(token):
            break
        good += 1
        masks.append(constraint.allowed())
    constraint.rollback(good)
    return drafts[:good], _stacked(masks)


def _stacked(masks: Sequence[mx.array | None]) -> mx.array | None:
    """(n, vocabulary) bool of masks, of which None allows all; None if all are."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    free = mx.ones_like(given[0])
    return mx.stack([free if mask is None else mask for mask in masks])


def _numbers(array: mx.array) -> list[Any]:
    return cast(list[Any], array.tolist())


def _taker(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> Callable[[Sequence[SequenceState]], None]:
    """Gives one sequence its tokens."""
    return lambda sequences: sequences[0].take(tokens, logprobs)


def _guarded(
    sequences: Sequence[SequenceState], work: Callable[[Sequence[SequenceState]], object]
) -> None:
    """Do work for sequences that are not done; an error ends them and nobody else."""
    going = [sequence for sequence in sequences if not sequence.done]
    if not going:
        return
    try:
        work(going)
    except Exception as error:  # noqa: BLE001  whatever it is belongs to these sequences
        for sequence in going:
            sequence.error, sequence.done = error, True
