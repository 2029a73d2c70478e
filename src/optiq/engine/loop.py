"""The generation loop: text, images, batches and speculative decoding.

One thread drives it, step by step. A step reads chunks of prompts and lets every sequence that has
read its prompt write: one sequence alone in a round with drafts, several side by side in one pass
of the model, a token each. Which sequences share a step changes what they write no more than
rounding does.

Reference: sample-match acceptance: the target draws its token with the key of the place, and a
draft is accepted if it equals that draw. The text is that of plain decoding, at any temperature.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from optiq.backend import is_cpu, mx
from optiq.engine import ranks
from optiq.engine.drafters.base import Drafter
from optiq.engine.events import FinishReason, TokenLogprob
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.pace import MAX_DRAFTS, Experience, Pace
from optiq.engine.prefill import groups, read, step_tokens
from optiq.engine.requests import Constraint, Reader, Request
from optiq.engine.sampling import Row, reported_rows, sampled
from optiq.engine.scheduler import Limits, Scheduler, Step
from optiq.engine.sequence import Drafting, SequenceState
from optiq.engine.sharing import Sharing
from optiq.engine.store import Storage, Store
from optiq.engine.target import Target, as_row


class Loop:
    """Sequences that are read and written together.

    Args:
        target: the model.
        suppressed: tokens that are never written.
        drafter: what proposes tokens.
        limits: of a step.
        storage: of pasts.
        run_ahead: begin a pass before the tokens of the last one are looked at; it costs a pass
            for nothing at the end of an answer. Default: where the device is not the CPU.
    """

    def __init__(
        self,
        target: Target,
        suppressed: Sequence[int] = (),
        drafter: Drafter | None = None,
        limits: Limits | None = None,
        storage: Storage | None = None,
        run_ahead: bool | None = None,
    ) -> None:
        self._run_ahead = not is_cpu() if run_ahead is None else run_ahead
        self.target, self.drafter = target, drafter
        self._suppressed = tuple(suppressed)
        tokens = step_tokens(limits or Limits())
        limits = dataclasses.replace(limits or Limits(), prefill_tokens=tokens)
        self.store = Store(target, storage or Storage(), tokens)
        self._scheduler = Scheduler(self._begin, limits, self.store.memory)
        self._sequences: dict[int, SequenceState] = {}
        self._numbers = itertools.count()
        self._experience = Experience()
        self._sharing = Sharing()
        self._batch = _Batch()

    # -- what drivers call -----------------------------------------------------------------------

    def add(self, request: Request, reader: Reader) -> SequenceState:
        """Queue a request; its events appear in `SequenceState.events` as steps are taken."""
        return self.add_choices([request], [reader])[0]

    def add_choices(
        self, requests: Sequence[Request], readers: Sequence[Reader]
    ) -> list[SequenceState]:
        """Queue several answers to one prompt, which is read once where they run together."""
        leader, out = None, []
        for request, reader in zip(requests, readers, strict=True):
            sequence = SequenceState(request, reader, self._drafting(request))
            out.append(sequence)
            if request.max_tokens < 1:
                sequence.end("length")
                continue
            number = next(self._numbers)
            self._sequences[number] = sequence
            self._scheduler.add(number, len(request.tokens), leader)
            leader = number if leader is None else leader
        return out

    def _drafting(self, request: Request) -> Drafting | None:
        if self.drafter is None or request.num_drafts == 0:
            return None
        pace = Pace(self._experience, request.num_drafts)
        return Drafting(self.drafter.name, self.drafter.start(), pace)

    @functools.cached_property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that memory has room for; None for any length."""
        return self.store.memory.longest() if self.store.memory else None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle

    def step(self) -> None:
        """Run one step. What fails for one sequence ends that sequence, with its `error`."""
        step = self._scheduler.next()
        self.store.make_room(self._scheduler.needed_bytes)
        self._prepare(step)
        writing = [self._sequences[number] for number in step.decode]
        apart = all(s.drafting for s in writing) and self._sharing.apart(len(writing))
        alone = [s for s in writing if apart or s.begins_alone]
        together = [s for s in writing if s not in alone]
        if not self._batch.consists_of(together):
            _guarded(self._batch.members, self._land)
            together = [s for s in together if not s.done]
            self._batch.arrange(together)
        for sequence in alone:
            _guarded([sequence], self._round)
        if together:
            _guarded(self._batch.members, self._pass)
        for group in groups([self._sequences[number] for number in step.prefill]):
            _guarded(group, self._read)
        for number in step.decode:
            self._scheduler.grown(number, len(self._sequences[number].tokens))
        self._forget(number for number, s in list(self._sequences.items()) if s.done)

    def _begin(self, number: int) -> Sequence[int]:
        """Sizes of the chunks that a sequence has to read."""
        sequence = self._sequences[number]
        _guarded([sequence], lambda _: self.store.begin(sequence))
        return tuple(sequence.parts)

    def _prepare(self, step: Step) -> None:
        """Take pasts from sequences that are put back, and give followers that of their leader."""
        lost = [self._sequences[number] for number in step.preempted]
        if any(s in lost for s in self._batch.members):
            _guarded(self._batch.members, self._land)
            self._batch.arrange([s for s in self._batch.members if s not in lost and not s.done])
        for number, sequence in zip(step.preempted, lost, strict=True):
            sequence.lose()
            self._scheduler.grown(number, len(sequence.tokens))
            if sequence.drafting is not None and self.drafter is not None:
                session = self.drafter.start()
                sequence.drafting = dataclasses.replace(sequence.drafting, session=session)
        for leader, follower in step.forks:
            self._sequences[follower].take_over(self._sequences[leader])

    def cancel(self, sequence: SequenceState, reason: FinishReason = "cancelled") -> None:
        """End a sequence before the next step."""
        if not sequence.done:
            sequence.end(reason)
        self._forget(n for n, other in list(self._sequences.items()) if other is sequence)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._scheduler.remove(number)
            sequence = self._sequences.pop(number)
            if sequence.error is None:
                self.store.keep(sequence, self._batch.cache_of(sequence))
        if self.idle:
            self._batch = _Batch()  # which holds caches

    # -- reading and writing ---------------------------------------------------------------------

    def _read(self, sequences: Sequence[SequenceState]) -> None:
        """The next chunk of each of a group of prompts."""
        states = read(self.target, sequences)
        for sequence, state in zip(sequences, states, strict=True):
            if self.drafter is not None and self.drafter.reads_states:
                sequence.state = state
                mx.eval(state)
            mx.eval(sequence.cache.arrays)
            if sequence.cache.length in sequence.marks:
                self.store.keep(sequence, sequence.cache)

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
        chosen = sampled(logits, rows, places, self._suppressed, allowed)
        drawn = _numbers(ranks.of_first(chosen))
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
        logprobs = self._reported(logits[: len(new)], new, rows[: len(new)])
        if sequence.drafting is not None:
            seconds = time.perf_counter() - start
            sequence.drafting.pace.record(len(drafts), right, len(new), seconds)
            if len(unread) == 1:  # and no chunk of a prompt
                self._sharing.add_round(len(new), seconds)
        sequence.take(new, logprobs)

    def _pass(self, sequences: Sequence[SequenceState]) -> None:
        """One token for each sequence of the batch.

        Where it may, the next pass is begun before the tokens of this one are looked at, so that
        the device does not wait for Python.
        """
        start = time.perf_counter()
        if self._batch.flight is None:
            self._batch.flight = self._launched(sequences)
        flight, self._batch.flight = self._batch.flight, None
        if self._run_ahead and all(s.may_run_ahead for s in sequences):
            self._batch.flight = self._launched(sequences, flight.drawn)
        self._landed(flight)
        self._sharing.add_pass(len(sequences), time.perf_counter() - start)

    def _launched(
        self, sequences: Sequence[SequenceState], drawn: mx.array | None = None
    ) -> _Flight:
        """A pass of the batch that is under way.

        Args:
            sequences: its members.
            drawn: their last tokens, (B,), where they have not been looked at.
        """
        allowed = _stacked([_allowed(sequence) for sequence in sequences])
        last = mx.array([s.tokens[-1] for s in sequences]) if drawn is None else drawn
        states = self.target.states(last.astype(mx.int32)[:, None], self._batch.cache)
        logits = self.target.logits(states)[:, 0]
        rows = [s.rows()[0] for s in sequences]
        places = [s.places(1 if drawn is None else 2)[-1] for s in sequences]
        for sequence in sequences:
            sequence.cache.length += 1
        chosen = ranks.of_first(sampled(logits, rows, places, self._suppressed, allowed))
        mx.async_eval(chosen)
        return _Flight(list(sequences), rows, states, logits, chosen)

    def _land(self, sequences: Sequence[SequenceState]) -> None:
        """Finish the pass that is under way, if there is one."""
        del sequences
        flight, self._batch.flight = self._batch.flight, None
        if flight is not None:
            self._landed(flight)

    def _landed(self, flight: _Flight) -> None:
        """Give the sequences of a pass their tokens."""
        tokens = _numbers(flight.drawn)
        logprobs = self._reported(flight.logits, tokens, flight.rows)
        for index, sequence in enumerate(flight.sequences):
            sequence.state = flight.states[index : index + 1]
            own = slice(index, index + 1)
            _guarded([sequence], _taker(tokens[own], logprobs[own]))

    def _drafts(self, sequence: SequenceState) -> list[int]:
        """What a drafter proposes, as far as the answer can go."""
        drafting, request = sequence.drafting, sequence.request
        if drafting is None:
            return []
        room = request.max_tokens - sequence.written - 1
        count = min(drafting.pace.next(), MAX_DRAFTS, room)
        if count < 1:
            return []
        session = drafting.session
        proposed = session.propose(sequence.tokens, sequence.state, sequence.cache, count)[:count]
        return proposed if drafting.pace.is_fixed else sequence.up_to_stop(proposed)

    def _reported(
        self, logits: mx.array, tokens: Sequence[int], rows: Sequence[Row]
    ) -> list[TokenLogprob]:
        """Log-probabilities of the tokens of rows of logits; none where no row asks for them."""
        if not any(row.sampling.logprobs for row in rows):
            return []
        top = [row.sampling.top_logprobs for row in rows]
        return reported_rows(logits, tokens, self._suppressed, top)


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A pass of a batch whose tokens have not been looked at.

    Attributes:
        sequences: of the batch.
        rows: how their tokens are drawn.
        states: (B, 1, any).
        logits: (B, vocabulary).
        drawn: (B,) tokens.
    """

    sequences: list[SequenceState]
    rows: list[Row]
    states: mx.array
    logits: mx.array
    drawn: mx.array


class _Batch:
    """Sequences that write side by side, their joined caches, and a pass that is under way."""

    def __init__(self) -> None:
        self.members: list[SequenceState] = []
        self.cache = SequenceCache(())
        self.flight: _Flight | None = None

    def consists_of(self, members: Sequence[SequenceState]) -> bool:
        """Whether these are the members, in any order."""
        return len(members) == len(self.members) and all(m in members for m in self.members)

    def cache_of(self, sequence: SequenceState) -> SequenceCache:
        """The past of a sequence, member or not."""
        for index, member in enumerate(self.members):
            if member is sequence:
                return self.cache.row(index, sequence.cache.length)
        return sequence.cache

    def arrange(self, members: Sequence[SequenceState]) -> None:
        """Let these sequences be the batch; those that leave get their own cache back.

        Cost: a copy of all keys and values, but for a single sequence.
        """
        staying = [i for i, member in enumerate(self.members) if member in members]
        for index, member in enumerate(self.members):
            if index not in staying and not member.done:
                member.cache = self.cache.row(index, member.cache.length)
        kept = [self.members[index] for index in staying]
        joining = [member for member in members if member not in kept]
        parts = [self.cache.rows(staying)] if staying else []
        parts += [member.cache for member in joining]
        self.members, self.flight = kept + joining, None
        self.cache = SequenceCache.join(parts)
        for member in joining:
            member.cache = SequenceCache.elsewhere(member.cache.length)
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


def _allowed(sequence: SequenceState) -> mx.array | None:
    """What the grammar of one of several sequences allows; if it fails, that one ends."""
    constraint = sequence.request.constraint
    if constraint is None:
        return None
    masks: list[mx.array | None] = [None]
    _guarded([sequence], lambda _: masks.append(constraint.allowed()))
    return masks[-1]


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
