"""What an answer may say at each place.

    thought, if there is one -> answer under a grammar
                             -> call marker, block under a grammar, end marker; again, or the end
                             -> free text, and calls within it

A thought is free; after it comes what was asked for. Markers are written token by token, so that
they are read as markers. A stop token ends a thought only where nothing was asked for; it ends a
grammar where that may end; and between two calls.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import deque

from optiq.backend import mx
from optiq.engine.grammar.compiler import Compiled, Run
from optiq.engine.grammar.masks import Masks
from optiq.errors import EngineFailure

_KEPT = 256  # places that can be gone back to; a round has fewer drafts
_LONGEST_NAME = 8  # tokens of the name of a thought

Marker = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Thought:
    """The thinking of an answer.

    Attributes:
        start: marker before it.
        end: marker after it.
        budget: tokens of it at most, without markers and name; None for any number.
        may_start: whether the answer may begin with one.
        is_open: whether the prompt leaves one open.
        line_breaks: tokens with a line break, which ends the name; None if it has no name.
    """

    start: Marker
    end: Marker
    budget: int | None = None
    may_start: bool = False
    is_open: bool = False
    line_breaks: frozenset[int] | None = None


class Calling(enum.Enum):
    """Whether an answer has calls."""

    FORBIDDEN = "forbidden"
    OFFERED = "offered"
    REQUIRED = "required"


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls of an answer.

    Attributes:
        start: marker before a block.
        end: marker after it; empty if it ends with the answer.
        calling: whether there are any.
        block: what stands between the markers; None if that is free.
        several: whether there may be more than one block.
        between: a token that may stand between two blocks.
    """

    start: Marker
    end: Marker
    calling: Calling
    block: Compiled | None = None
    several: bool = True
    between: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an answer consists of.

    Attributes:
        thought: before it.
        answer: its grammar; None if it is free.
        calls: in its place, or within it where it is free.
    """

    thought: Thought | None = None
    answer: Compiled | None = None
    calls: Calls | None = None

    @property
    def is_pending(self) -> bool:
        """Whether something has to come after the thought."""
        required = self.calls is not None and self.calls.calling is Calling.REQUIRED
        return self.answer is not None or required


class _Part(enum.Enum):
    BEGIN = "begin"  # the first token of what the plan asks for
    FREE = "free"
    THOUGHT = "thought"
    ANSWER = "answer"
    BLOCK = "block"
    FREE_BLOCK = "free block"
    AFTER = "after"  # a call, where only another, or the end, may follow
    MARKER = "marker"  # a rest of a marker
    DONE = "done"


@dataclasses.dataclass(frozen=True)
class _Place:
    """A place in an answer.

    Attributes:
        part: of the plan.
        marker: tokens that are to come.
        then: the part after them.
        recent: last tokens of a free part, which may begin a marker.
        thought: tokens of the thought that count.
        name: tokens of its name; -1 once it is complete.
        is_later: whether there was a thought.
        run: in a grammar.
        depth: of `run`.
    """

    part: _Part
    marker: Marker = ()
    then: _Part = _Part.FREE
    recent: Marker = ()
    thought: int = 0
    name: int = -1
    is_later: bool = False
    run: Run | None = None
    depth: int = 0


class Guide:
    """A plan at the place that an answer has reached: a `requests.Constraint`.

    Args:
        plan: of the answer.
        masks: of the model.
    """

    def __init__(self, plan: Plan, masks: Masks) -> None:
        self._plan, self._masks = plan, masks
        begin = _Part.BEGIN if plan.is_pending else _Part.FREE
        self._place = _Place(begin)
        if plan.thought is not None and plan.thought.is_open:
            self._place = _Place(_Part.THOUGHT, is_later=True)
        self._past: deque[_Place] = deque(maxlen=_KEPT)
        if begin is _Part.BEGIN and plan.answer is not None:
            self._place = dataclasses.replace(self._place, run=plan.answer.start())

    def fork(self) -> Guide:
        """The same place, for another answer."""
        other = Guide(self._plan, self._masks)
        run = self._place.run
        other._place = dataclasses.replace(self._place, run=run.fork() if run else None)
        return other

    # -- Constraint ------------------------------------------------------------------------------

    def allowed(self) -> mx.array | None:
        """Tokens that may come next: (vocabulary,) bool; None for all.

        Raises:
            UsageError: if the grammar takes more steps here than the limits allow.
        """
        place, masks = self._place, self._masks
        match place.part:
            case _Part.MARKER:
                return masks.only(frozenset(place.marker[:1]))
            case _Part.DONE:
                return masks.only(masks.stop)
            case _Part.AFTER:
                return masks.only(masks.stop | self._starts(again=True))
            case _Part.BEGIN:
                return self._at_begin()
            case _Part.ANSWER | _Part.BLOCK:
                assert place.run is not None
                return place.run.allowed()
            case _:
                never = self._never()
                return masks.all_but(never) if never else None

    def accept(self, token: int) -> bool:
        """Go on by a token; False, and nowhere, where it may not come."""
        following = self._after(token)
        if following is None:
            return False
        self._past.append(self._place)
        self._place = following
        return True

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens that were accepted.

        Raises:
            EngineFailure: if there are not so many, or they are too far back.
        """
        if num_tokens > len(self._past):
            raise EngineFailure(f"{num_tokens} tokens of a grammar cannot be taken back")
        for _ in range(num_tokens):
            self._place = self._past.pop()
        if num_tokens and self._place.run is not None:
            self._place.run.back_to(self._place.depth)

    # -- what may come ---------------------------------------------------------------------------

    def _at_begin(self) -> mx.array:
        starts = self._starts()
        if self._place.run is None:
            return self._masks.only(starts)
        found = self._place.run.allowed()
        return mx.logical_or(found, self._masks.only(starts)) if starts else found

    def _starts(self, *, again: bool = False) -> frozenset[int]:
        """First tokens of markers that may come here; `again`, after a call."""
        thought, calls = self._plan.thought, self._plan.calls
        found: set[int] = set()
        if thought is not None and thought.may_start and not again and not self._place.is_later:
            found.add(thought.start[0])
        if calls is not None and calls.calling is not Calling.FORBIDDEN:
            if not again or calls.several:
                found.add(calls.start[0])
            if again and calls.several and calls.between is not None:
                found.add(calls.between)
        return frozenset(found)

    def _never(self) -> frozenset[int]:
        """Tokens that may not come in a free part."""
        plan, place = self._plan, self._place
        thought, calls = plan.thought, plan.calls
        found: set[int] = set()
        if calls is not None and calls.calling is Calling.FORBIDDEN:
            found |= _completes(calls.start, place.recent)
        if place.part is _Part.THOUGHT:
            return frozenset(found | self._masks.stop if plan.is_pending else found)
        if thought is not None and place.is_later and self._is_spent(place):
            found |= _completes(thought.start, place.recent)
        return frozenset(found)

    # -- what follows ----------------------------------------------------------------------------

    def _after(self, token: int) -> _Place | None:
        """The place after a token; None if it may not come."""
        place, masks = self._place, self._masks
        match place.part:
            case _Part.MARKER:
                return self._in_marker(token)
            case _Part.DONE:
                return place if token in masks.stop else None
            case _Part.AFTER if token in masks.stop:
                return _Place(_Part.DONE)
            case _Part.AFTER:
                return self._after_call(token)
            case _Part.BEGIN:
                return self._from_begin(token)
            case _Part.ANSWER | _Part.BLOCK:
                return self._in_grammar(token)
            case _:
                return None if token in self._never() else self._in_free(token)

    def _in_marker(self, token: int) -> _Place | None:
        place = self._place
        if token != place.marker[0]:
            return None
        if len(place.marker) > 1:
            return dataclasses.replace(place, marker=place.marker[1:])
        return self._enter(place.then)

    def _enter(self, part: _Part) -> _Place:
        """The beginning of a part."""
        plan = self._plan
        plain = dataclasses.replace(
            _Place(part), thought=self._place.thought, is_later=self._place.is_later
        )
        if part is _Part.BLOCK:
            assert plan.calls is not None
            if plan.calls.block is None:
                return dataclasses.replace(plain, part=_Part.FREE_BLOCK)
            return dataclasses.replace(plain, run=plan.calls.block.start())
        if part is _Part.THOUGHT:
            assert plan.thought is not None
            name = -1 if plan.thought.line_breaks is None else 0
            return self._bounded(
                dataclasses.replace(self._place, part=part, recent=(), name=name, is_later=True)
            )
        if part is _Part.FREE and plan.is_pending:  # after the thought
            return dataclasses.replace(self._place, part=_Part.BEGIN, recent=())
        if part is _Part.AFTER and not plan.is_pending and plan.calls and plan.calls.several:
            return dataclasses.replace(plain, part=_Part.FREE)
        return plain

    def _marker(self, marker: Marker, then: _Part) -> _Place:
        """Before the rest of a marker, or after it."""
        if not marker:
            return self._enter(then)
        return dataclasses.replace(
            self._place, part=_Part.MARKER, marker=marker, then=then, recent=()
        )

    def _from_begin(self, token: int) -> _Place | None:
        place, plan = self._place, self._plan
        if place.run is not None:
            if token in self._masks.stop:
                return _Place(_Part.DONE) if place.run.may_end else None
            if place.run.accept(token):
                return _Place(_Part.ANSWER, run=place.run, depth=place.run.depth)
        if token not in self._starts():
            return None
        if plan.calls is not None and token == plan.calls.start[0]:
            return self._marker(plan.calls.start[1:], _Part.BLOCK)
        assert plan.thought is not None
        return self._marker(plan.thought.start[1:], _Part.THOUGHT)

    def _after_call(self, token: int) -> _Place | None:
        calls = self._plan.calls
        if calls is None or token not in self._starts(again=True):
            return None
        if token == calls.start[0]:
            return self._marker(calls.start[1:], _Part.BLOCK)
        return self._marker(calls.start, _Part.BLOCK)

    def _in_grammar(self, token: int) -> _Place | None:
        place = self._place
        run = place.run
        assert run is not None
        if place.part is _Part.ANSWER and token in self._masks.stop:
            return _Place(_Part.DONE) if run.may_end else None
        if not run.accept(token):
            return None
        if place.part is _Part.BLOCK and run.may_end:  # no call is the beginning of another
            calls = self._plan.calls
            assert calls is not None
            if not calls.end:
                return _Place(_Part.DONE)
            return dataclasses.replace(
                place, part=_Part.MARKER, marker=calls.end, then=_Part.AFTER, run=None, depth=0
            )
        return dataclasses.replace(place, depth=run.depth)

    def _in_free(self, token: int) -> _Place:
        """After a token of a free part."""
        place, plan = self._place, self._plan
        if token in self._masks.stop:
            return _Place(_Part.DONE)
        recent = (*place.recent, token)
        thought, calls = plan.thought, plan.calls
        if place.part is _Part.FREE_BLOCK:
            assert calls is not None
            if calls.end and _ends(recent, calls.end):
                return self._enter(_Part.AFTER)
        elif calls is not None and _ends(recent, calls.start):
            return self._enter(_Part.BLOCK)
        elif place.part is _Part.THOUGHT:
            assert thought is not None
            if _ends(recent, thought.end):
                return self._enter(_Part.FREE)
            return self._bounded(self._thinking(token, recent))
        elif thought is not None and _ends(recent, thought.start):
            return self._enter(_Part.THOUGHT)
        return dataclasses.replace(place, recent=recent[-self._longest :])

    def _thinking(self, token: int, recent: Marker) -> _Place:
        """One token further in a thought."""
        place, thought = self._place, self._plan.thought
        assert thought is not None
        recent = recent[-self._longest :]
        if place.name < 0 or thought.line_breaks is None:
            return dataclasses.replace(place, recent=recent, thought=place.thought + 1)
        ended = token in thought.line_breaks or place.name + 1 >= _LONGEST_NAME
        return dataclasses.replace(place, recent=recent, name=-1 if ended else place.name + 1)

    def _bounded(self, place: _Place) -> _Place:
        """A place in a thought, or before its end marker where the budget is spent."""
        thought = self._plan.thought
        assert thought is not None
        if place.name >= 0 or not self._is_spent(place):
            return place
        return dataclasses.replace(
            place, part=_Part.MARKER, marker=thought.end, then=_Part.FREE, recent=()
        )

    def _is_spent(self, place: _Place) -> bool:
        """Whether the thinking has had all its tokens."""
        budget = None if self._plan.thought is None else self._plan.thought.budget
        return budget is not None and budget <= place.thought

    @property
    def _longest(self) -> int:
        """Tokens of the longest marker."""
        thought, calls = self._plan.thought, self._plan.calls
        markers = [thought.start, thought.end] if thought else []
        markers += [calls.start, calls.end] if calls else []
        return max(map(len, markers), default=1)


def _ends(tokens: Marker, marker: Marker) -> bool:
    return tokens[-len(marker) :] == marker


def _completes(marker: Marker, recent: Marker) -> set[int]:
    """The last token of a marker, if all before it were written."""
    before = marker[:-1]
    return {marker[-1]} if not before or _ends(recent, before) else set()
