"""Token ids of an answer -> events: thinking, answer and calls told apart.

What the tokens say does not depend on how many come at a time. Markers are recognized by their
token ids alone: the same characters made of other tokens are text.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from optiq.engine.events import (
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallDone,
    ToolCallFailed,
    Usage,
)
from optiq.engine.reasoning import ReasoningFormat, ReasoningText, reasoning_format
from optiq.engine.text import Pieces, StopStrings, TextStream
from optiq.engine.tools import call_format
from optiq.engine.tools.base import BlockReader, CallError, CallFormat, CallWriter, Tool
from optiq.upstream import TokenizerWrapper


class _Part(enum.Enum):
    """What a token of the answer belongs to."""

    ANSWER = "answer"
    REASONING = "reasoning"
    CALLS = "calls"


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """How a model writes answers; made once a model, shared by all its answers.

    Attributes:
        pieces: its tokens as text.
        reasoning: tokens around its thinking; None if it does not think.
        calls: format of its calls; None if it writes none.
    """

    pieces: Pieces
    reasoning: ReasoningFormat | None
    calls: CallFormat | None

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> OutputFormat:
        """The formats of a model, by its tokens and template.

        Raises:
            UnsupportedModel: if its tokenizer is not of the tokenizers library.
        """
        return cls(Pieces(tokenizer), reasoning_format(tokenizer), call_format(tokenizer))

    def parser(
        self,
        *,
        stop: Sequence[str] = (),
        tools: Sequence[Tool] = (),
        prompt: Sequence[int] = (),
        raw: bool = False,
    ) -> OutputParser:
        """A parser of one answer.

        Args:
            stop: strings that end the answer.
            tools: functions that may be called; without any, no calls are read.
            prompt: what the answer follows; it may leave a thinking open.
            raw: the prompt is text to go on with, so that a first space belongs to the answer.
        """
        form = self if tools else dataclasses.replace(self, calls=None)
        return OutputParser(form, stop=stop, tools=tools, prompt=prompt, raw=raw)


class OutputParser:
    """Reads one answer.

    Attributes:
        stopped: the stop string that ended the answer; tokens after it are not read.
        num_tokens: tokens that were read, the one that completed a stop string among them.
        num_reasoning: of these, in the thinking, its markers among them.
        failed_calls: blocks of calls that became text.
        in_reasoning: whether the next token belongs to the thinking.
    """

    def __init__(
        self,
        form: OutputFormat,
        *,
        stop: Sequence[str] = (),
        tools: Sequence[Tool] = (),
        prompt: Sequence[int] = (),
        raw: bool = False,
    ) -> None:
        self._form = form
        self._tools = tools
        self._stop = StopStrings(stop)
        self._part = _Part.ANSWER
        self._stream: TextStream = form.pieces.stream(at_start=not raw)
        self._thought = ReasoningText(named=False)
        self._writer = CallWriter()
        self._reader: BlockReader | None = None  # None in a block that cannot be read
        self._trouble = ""
        self._raw = ""  # of a block that cannot be read
        self._held: list[int] = []  # may begin a marker
        self._skip_lines = False  # after thinking or calls, line breaks are layout
        self._events: list[Event] = []
        self._num_calls = 0
        self.stopped: str | None = None
        self.num_tokens = 0
        self.num_reasoning = 0
        self.failed_calls = 0
        self._resume(prompt)

    @property
    def in_reasoning(self) -> bool:
        """Whether the next token belongs to the thinking."""
        return self._part is _Part.REASONING

    def feed(self, tokens: Sequence[int]) -> list[Event]:
        """What the tokens say, as far as it is certain.

        Stop tokens of the model are not fed: they are no part of the answer.
        """
        for token in tokens:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            self.num_reasoning += self.in_reasoning
            self._hold(token)
        return self._take()

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> list[Event]:
        """The rest, and the last event.

        Args:
            reason: why no more tokens come. "stop" becomes "tool_calls" where the answer has
                calls.
            usage: counts of tokens, those of the thinking aside, which are known here. Without
                it, what was fed is counted.
        """
        while self._held and self.stopped is None:
            self._ordinary(self._held.pop(0))
        if self.stopped is None:
            self._leave()
            self._say(self._stop.flush())
        usage = usage or Usage(completion_tokens=self.num_tokens)
        usage = dataclasses.replace(usage, reasoning_tokens=self.num_reasoning)
        if self.stopped is not None:
            reason = "stop"
        elif reason == "stop" and self._num_calls:
            reason = "tool_calls"
        self._events.append(Finished(reason, usage, self.stopped, self.failed_calls))
        return self._take()

    def _resume(self, prompt: Sequence[int]) -> None:
        """Be where the prompt leaves off."""
        form = self._form.reasoning
        tail = form.open_tail(prompt) if form else None
        if tail is None:
            return
        self._enter(_Part.REASONING)
        for token in tail:
            self._hold(token)
        self._events.clear()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _markers(self) -> list[tuple[tuple[int, ...], _Part]]:
        """Token ids that end the present part, with the part that they lead to."""
        form, calls = self._form.reasoning, self._form.calls
        out: list[tuple[tuple[int, ...], _Part]] = []
        if form:
            out.append((form.end, _Part.ANSWER))
            if self._part is not _Part.REASONING:
                out.append((form.start, _Part.REASONING))
        if calls:
            if self._part is _Part.CALLS:
                out = [(calls.end, _Part.ANSWER)] if calls.end else []
            out.append((calls.start, _Part.CALLS))
        return out

    def _hold(self, token: int) -> None:
        """Keep tokens back while they may become a marker."""
        self._held.append(token)
        while self._held and self.stopped is None:
            held = tuple(self._held)
            markers = self._markers()
            whole = next((part for ids, part in markers if ids == held), None)
            if whole is not None:
                self._held.clear()
                self._switch(whole, held)
            elif any(ids[: len(held)] == held for ids, _ in markers):
                return
            else:
                self._ordinary(self._held.pop(0))

    def _switch(self, part: _Part, marker: tuple[int, ...]) -> None:
        """A marker was read."""
        literal = "".join(map(self._form.pieces.literal, marker))
        if self._part is _Part.CALLS and part is _Part.ANSWER:
            self._leave(literal)
        else:
            self._leave()
        if self.stopped is None:
            self.num_reasoning += len(marker) if part is _Part.REASONING else 0
            self._enter(part, literal)

    def _enter(self, part: _Part, literal: str = "") -> None:
        was, self._part = self._part, part
        self._stream = self._form.pieces.stream()
        if part is _Part.REASONING:
            form = self._form.reasoning
            self._thought = ReasoningText(named=form is not None and form.named)
        elif part is _Part.CALLS and self._form.calls:
            self._reader = self._form.calls.reader(self._writer, self._tools)
            self._trouble, self._raw = "", literal
        elif was is not _Part.ANSWER:
            self._skip_lines = True

    def _leave(self, literal: str = "") -> None:
        """Finish the present part; `literal` is the marker that ends a block of calls."""
        rest = self._stream.finish()
        if self._part is _Part.ANSWER:
            self._answer(rest)
            if self.stopped is None:
                self._say(self._stop.flush())
        elif self._part is _Part.REASONING:
            self._think(rest)
        else:
            self._read(rest)
            self._end_block(literal)

    def _ordinary(self, token: int) -> None:
        """A token that is no marker."""
        pieces = self._form.pieces
        if token not in pieces.special:
            self._text(self._stream.add(token))
            return
        self._text(self._stream.finish())
        if self._part is _Part.CALLS:
            self._special(token, pieces.literal(token))

    def _text(self, text: str) -> None:
        if not text or self.stopped is not None:
            return
        if self._part is _Part.ANSWER:
            self._answer(text)
        elif self._part is _Part.REASONING:
            self._think(text)
        else:
            self._read(text)

    def _answer(self, text: str) -> None:
        if self._skip_lines:
            text = text.lstrip("\n")
            self._skip_lines = not text
        shown, self.stopped = self._stop.push(text)
        self._say(shown)

    def _think(self, text: str) -> None:
        if shown := self._thought.push(text):
            self._events.append(ReasoningDelta(shown))

    def _say(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))

    def _read(self, text: str) -> None:
        if self._reader is None:
            self._raw += text
            return
        try:
            self._reader.text(text)
        except CallError as error:
            self._spoil(error)
        self._report()

    def _special(self, token: int, literal: str) -> None:
        if self._reader is None:
            self._raw += literal
            return
        try:
            self._reader.special(token, literal)
        except CallError as error:
            self._spoil(error)
        self._report()

    def _end_block(self, literal: str) -> None:
        if self._reader is not None:
            try:
                self._reader.close()
            except CallError as error:
                self._spoil(error)
            self._report()
        if self._trouble:
            self.failed_calls += 1
            self._events.append(ToolCallFailed(self._writer.give_up(), self._trouble))
            self._say(self._raw + literal)
        self._reader = None

    def _spoil(self, error: CallError) -> None:
        """The block cannot be read: from here on it is text."""
        if self._reader is not None:
            self._raw += self._reader.raw
        self._reader, self._trouble = None, str(error)

    def _report(self) -> None:
        events = self._writer.take()
        self._num_calls += sum(isinstance(event, ToolCallDone) for event in events)
        self._events += events
