"""Replies of the engine -> events of a chat stream."""

from __future__ import annotations

from typing import Any

from optiq.engine.events import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
    Usage,
)
from optiq.server.jobs import ModelCard, Piece, Reply, Said, Started, Written
from optiq.server.openai import replies


class ChatStream:
    """Writes the events of one request.

    Log-probabilities of tokens go with the next event of their answer.

    Args:
        card: the model.
        choices: number of answers.
        num_top: how many of the most likely tokens are reported with each; None for no
            log-probabilities at all.
        with_usage: whether an event with the usage comes last.
    """

    def __init__(
        self, card: ModelCard, choices: int, num_top: int | None, *, with_usage: bool
    ) -> None:
        self._card, self._num_top, self._with_usage = card, num_top, with_usage
        self._head = replies.new_head("chatcmpl", "chat.completion.chunk", card.name)
        self._pieces: list[list[Piece]] = [[] for _ in range(choices)]
        self._usages: list[Usage | None] = [None] * choices
        self._prompt_tokens = 0

    def encode(self, reply: Reply) -> list[bytes]:
        """The events for a reply."""
        match reply:
            case Started():
                self._prompt_tokens = reply.prompt_tokens
                first = replies.Delta(role="assistant", content="")
                return [self._chunk(i, first, None) for i in range(len(self._usages))]
            case Written(choice, pieces):
                if self._num_top is not None:
                    self._pieces[choice] += pieces
                return []
            case Said(choice, Finished() as finished):
                return self._end(choice, finished)
            case Said(choice, event):
                delta = _delta(event)
                return [] if delta is None else [self._chunk(choice, delta, None)]

    def _end(self, choice: int, finished: Finished) -> list[bytes]:
        reason = replies.finish_reason(finished.reason)
        self._usages[choice] = finished.usage
        events = [self._chunk(choice, replies.Delta(), reason)]
        usages = [usage for usage in self._usages if usage is not None]
        if len(usages) < len(self._usages):
            return events
        if self._with_usage:
            usage = replies.usage_of(self._card, self._prompt_tokens, usages[:1], usages[1:])
            events.append(replies.event(replies.ChatChunk(**self._head, choices=[], usage=usage)))
        return [*events, replies.DONE]

    def _chunk(self, index: int, delta: replies.Delta, reason: replies.ChatFinish | None) -> bytes:
        values: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
        if self._pieces[index] and self._num_top is not None:
            values["logprobs"] = replies.entries(self._pieces[index], self._num_top)
            self._pieces[index] = []
        rest: dict[str, Any] = {"usage": None} if self._with_usage else {}
        choices = [replies.ChunkChoice(**values)]
        return replies.event(replies.ChatChunk(**self._head, choices=choices, **rest))


def _delta(event: Event) -> replies.Delta | None:
    """More of an answer; None for an event that adds nothing to it."""
    match event:
        case TextDelta(text):
            return replies.Delta(content=text)
        case ReasoningDelta(text):
            return replies.Delta(reasoning_content=text)
        case ToolCallStarted(index, name_of_call, name):
            function = replies.FunctionDelta(name=name, arguments="")
            call = replies.ToolCallDelta(
                index=index, id=name_of_call, type="function", function=function
            )
            return replies.Delta(tool_calls=[call])
        case ToolCallDelta(index, arguments):
            function = replies.FunctionDelta(arguments=arguments)
            return replies.Delta(tool_calls=[replies.ToolCallDelta(index=index, function=function)])
        case _:
            return None
