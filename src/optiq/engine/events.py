"""What a generation says while it runs: typed events, and what they add up to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, before temperature, penalties, truncation and grammar.

    Attributes:
        token: id.
        logprob: in nats.
        top: the most likely tokens with theirs, largest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens that were drawn; the text they make follows, at once or later."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More text of the thinking before the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallStarted:
    """A call whose function is known; its arguments follow.

    Attributes:
        index: number of the call in the answer.
        id: unique name of the call.
        name: of the function.
    """

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """More text of the arguments, which are one JSON object in the end."""

    index: int
    arguments: str


@dataclasses.dataclass(frozen=True)
class ToolCallDone:
    """A call that is complete.

    Attributes:
        index: number of the call in the answer.
        id: unique name of the call.
        name: of the function.
        arguments: JSON object, the sum of the deltas.
    """

    index: int
    id: str
    name: str
    arguments: str

    def data(self) -> dict[str, Any]:
        """The arguments as values."""
        values: dict[str, Any] = json.loads(self.arguments)
        return values


@dataclasses.dataclass(frozen=True)
class ToolCallFailed:
    """A block of calls that could not be read, or that the answer ended in.

    What it started and did not finish is no call. The text of the block follows as `TextDelta`.

    Attributes:
        started: indices of calls that were started in it and are not done.
        reason: what was wrong.
    """

    started: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """Counts of tokens.

    Attributes:
        prompt_tokens: of the prompt, soft tokens of images among them.
        completion_tokens: drawn, the one that stopped the answer among them.
        reasoning_tokens: of these, in the thinking.
        cached_tokens: of the prompt, found in a cache.
        drafted_tokens: proposed by the drafter.
        accepted_tokens: of these, equal to what was drawn.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event.

    Attributes:
        reason: why the answer ended.
        usage: counts of tokens.
        stop: the stop string that ended it, if one did.
        failed_calls: blocks of calls that are text in the answer because they could not be read.
    """

    reason: FinishReason
    usage: Usage = Usage()
    stop: str | None = None
    failed_calls: int = 0


Event = (
    Tokens
    | TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallDelta
    | ToolCallDone
    | ToolCallFailed
    | Finished
)


@dataclasses.dataclass
class Answer:
    """What the events of a generation add up to.

    Attributes:
        text: of the answer.
        reasoning: text of the thinking.
        tool_calls: complete ones, in order.
        token_ids: all that were drawn.
        logprobs: one a token, where they were asked for.
        finish: the last event; None if the events ended without one.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDone] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish: Finished | None = None


def collect(events: Iterable[Event]) -> Answer:
    """The sum of all events."""
    answer = Answer()
    text: list[str] = []
    reasoning: list[str] = []
    for event in events:
        match event:
            case TextDelta(piece):
                text.append(piece)
            case ReasoningDelta(piece):
                reasoning.append(piece)
            case ToolCallDone():
                answer.tool_calls.append(event)
            case Tokens(ids, logprobs):
                answer.token_ids += ids
                answer.logprobs += logprobs
            case Finished():
                answer.finish = event
    answer.text, answer.reasoning = "".join(text), "".join(reasoning)
    return answer


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring pieces of one text put together.

    Two streams of the same tokens are equal after it, however the tokens came.
    """
    out: list[Event] = []
    for event in events:
        match out[-1] if out else None, event:
            case TextDelta(before), TextDelta(after):
                out[-1] = TextDelta(before + after)
            case ReasoningDelta(before), ReasoningDelta(after):
                out[-1] = ReasoningDelta(before + after)
            case ToolCallDelta(index, before), ToolCallDelta(same, after) if index == same:
                out[-1] = ToolCallDelta(index, before + after)
            case _:
                out.append(event)
    return out
