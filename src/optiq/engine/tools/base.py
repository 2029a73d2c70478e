"""What a format of calls is, and how a reader reports what it reads."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from optiq.engine.events import Event, ToolCallDelta, ToolCallDone, ToolCallStarted
from optiq.engine.grammar.functions import Block
from optiq.errors import OptiqError
from optiq.upstream import TokenizerWrapper

Tool = Mapping[str, Any]


class CallError(OptiqError):
    """A block of calls does not follow its format."""


def new_call_id() -> str:
    """A name for a call, unlike all others."""
    return f"call_{secrets.token_hex(12)}"


class CallWriter:
    """Collects events of the calls of one answer.

    Args:
        make_id: names the calls.
    """

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self._make_id = make_id
        self._next = 0
        self._events: list[Event] = []
        self._open: ToolCallStarted | None = None
        self._arguments: list[str] = []

    def start(self, name: str) -> None:
        """A call of that function begins."""
        self._open = ToolCallStarted(self._next, self._make_id(), name)
        self._next += 1
        self._arguments = []
        self._events.append(self._open)

    def write(self, arguments: str) -> None:
        """More JSON text of its arguments."""
        if self._open is not None and arguments:
            self._arguments.append(arguments)
            self._events.append(ToolCallDelta(self._open.index, arguments))

    def done(self) -> None:
        """The call is complete."""
        if self._open is not None:
            call, text = self._open, "".join(self._arguments)
            self._events.append(ToolCallDone(call.index, call.id, call.name, text))
            self._open = None

    def give_up(self) -> tuple[int, ...]:
        """Forget the call that is not complete; its number, if there is one."""
        started = () if self._open is None else (self._open.index,)
        self._open = None
        return started

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events


class BlockReader(Protocol):
    """Reads one block, between the start and the end marker."""

    @property
    def raw(self) -> str:
        """Text of the block that is part of no complete call."""
        ...

    def text(self, piece: str) -> None:
        """Ordinary text.

        Raises:
            CallError: if no call can come of it.
        """
        ...

    def special(self, token: int, literal: str) -> None:
        """A special token.

        Raises:
            CallError: if no call can come of it.
        """
        ...

    def close(self) -> None:
        """The block ends here.

        Raises:
            CallError: if it is not complete.
        """
        ...


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How a model marks its calls.

    Attributes:
        name: of the format.
        start: token ids before a block.
        end: token ids after it; empty if it goes on to the end of the answer.
        reader: makes a reader of one block, which reports to the writer.
        block: makes a grammar of one call; None if calls of this format cannot be made to obey one.
        between: a token that templates write between two blocks; None for nothing.
    """

    name: str
    start: tuple[int, ...]
    end: tuple[int, ...]
    reader: Callable[[CallWriter, Sequence[Tool]], BlockReader]
    block: Block | None = None
    between: int | None = None


CallFormatMaker = Callable[[TokenizerWrapper], CallFormat | None]
