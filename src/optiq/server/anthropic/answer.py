"""Replies of the engine -> a message of Anthropic's, streamed or whole."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from optiq.engine.events import (
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallFailed,
    ToolCallStarted,
    Usage,
)
from optiq.errors import EngineFailure, OptiqError
from optiq.server.anthropic.errors import error_body
from optiq.server.jobs import Reply, Said, Started

SIGNATURE: Final = "optiq"
"""Of every thought. It proves nothing; clients send thoughts back only where there is one."""


class TextOut(BaseModel):
    """Text of the answer."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingOut(BaseModel):
    """What was thought before it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseOut(BaseModel):
    """A call."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class DraftOut(BaseModel):
    """What the drafter did: tokens proposed, and those of them that were right."""

    proposed: int
    accepted: int


class TokensDetails(BaseModel):
    """Tokens of the answer by kind."""

    thinking_tokens: int


class UsageOut(BaseModel):
    """Counts of tokens."""

    input_tokens: int = Field(description="of the prompt, those found in a cache not among them")
    cache_read_input_tokens: int = Field(description="of the prompt, found in a cache")
    cache_creation_input_tokens: int
    output_tokens: int
    output_tokens_details: TokensDetails | None = None
    draft: DraftOut | None = Field(default=None, description="where there is a drafter")


class MessageOut(BaseModel):
    """An answer."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextOut | ThinkingOut | ToolUseOut]
    stop_reason: (
        Literal[
            "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
        ]
        | None
    )
    stop_sequence: str | None
    usage: UsageOut


class CountOut(BaseModel):
    """Tokens of a prompt."""

    input_tokens: int


@dataclasses.dataclass
class MessageWriter:
    """Writes one message; blocks stand in the order in which the model wrote them.

    Attributes:
        model: name of the model.
        max_tokens: of the request.
        drafts: whether the model has a drafter.
        shows_thinking: whether the text of thinking is sent.
        request_id: of errors in mid-stream.
        message: what was written so far, as a body.
    """

    model: str
    max_tokens: int
    drafts: bool = False
    shows_thinking: bool = True
    request_id: str | None = None
    message: dict[str, Any] = dataclasses.field(default_factory=dict)
    _open: bool = False
    _arguments: list[str] = dataclasses.field(default_factory=list)
    _broken: str | None = None

    def events(self, reply: Reply) -> list[dict[str, Any]]:
        """Events of a reply.

        Raises:
            EngineFailure: if a call that has begun turned out to be none, or the answer was cut
                off by the server.
        """
        match reply:
            case Started():
                return self._begin(reply)
            case Said(event=Finished() as finished):
                return self._end(finished)
            case Said(event=event) if self._broken is None:
                return self._written(event)
        return []

    def _begin(self, started: Started) -> list[dict[str, Any]]:
        self.message = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._counts(Usage(prompt_tokens=started.prompt_tokens)),
        }
        first = {**self.message, "content": []}
        return [{"type": "message_start", "message": first}, {"type": "ping"}]

    def _written(self, event: object) -> list[dict[str, Any]]:
        match event:
            case TextDelta(text) if text:
                return [
                    *self._in({"type": "text", "text": ""}),
                    self._more("text", {"type": "text_delta", "text": text}),
                ]
            case ReasoningDelta(text) if text:
                out = self._in({"type": "thinking", "thinking": "", "signature": ""})
                if self.shows_thinking:
                    out.append(self._more("thinking", {"type": "thinking_delta", "thinking": text}))
                return out
            case ToolCallStarted(_, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return [*self._close(), *self._in(block)]
            case ToolCallDelta(_, text):
                self._arguments.append(text)
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case ToolCallFailed(started, reason) if started:
                self._broken = reason
        return []

    def _in(self, block: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Open a block of that kind, unless one is open."""
        content = self.message["content"]
        if self._open and content[-1]["type"] == block["type"]:
            return []
        out = self._close()
        content.append(dict(block))
        self._open = True
        start = {"type": "content_block_start", "index": len(content) - 1}
        return [*out, {**start, "content_block": dict(block)}]

    def _more(self, key: str, delta: dict[str, Any]) -> dict[str, Any]:
        self.message["content"][-1][key] += delta[key]
        return self._delta(delta)

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        index = len(self.message["content"]) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        block = self.message["content"][-1]
        out = []
        if block["type"] == "thinking":
            block["signature"] = SIGNATURE
            out.append(self._delta({"type": "signature_delta", "signature": SIGNATURE}))
        elif block["type"] == "tool_use" and self._broken is None:
            block["input"] = json.loads("".join(self._arguments) or "{}")
        self._arguments = []
        return [*out, {"type": "content_block_stop", "index": len(self.message["content"]) - 1}]

    def _end(self, finished: Finished) -> list[dict[str, Any]]:
        if finished.reason == "cancelled":
            raise EngineFailure("the server ended the answer early; try again")
        if self._broken is not None and finished.reason != "length":
            raise EngineFailure(f"the model wrote a call that cannot be read: {self._broken}")
        out = self._close()
        delta = {"stop_reason": self._reason(finished), "stop_sequence": finished.stop}
        usage = self._usage(finished.usage)
        self.message |= {**delta, "usage": usage}
        return [
            *out,
            {"type": "message_delta", "delta": delta, "usage": usage},
            {"type": "message_stop"},
        ]

    def _reason(self, finished: Finished) -> str:
        if finished.reason == "length":
            cut = finished.usage.completion_tokens >= self.max_tokens
            return "max_tokens" if cut else "model_context_window_exceeded"
        if finished.reason == "tool_calls":
            return "tool_use"
        return "end_turn" if finished.stop is None else "stop_sequence"

    def _counts(self, usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        out = self._counts(usage)
        if self.drafts:
            draft = {"proposed": usage.drafted_tokens, "accepted": usage.accepted_tokens}
            out["draft"] = draft
        return out

    # -- bytes -------------------------------------------------------------------------------------

    def encode(self, reply: Reply) -> list[bytes]:
        """Server-sent events of a reply; raises as `events` does."""
        return [sent(event) for event in self.events(reply)]

    def failed(self, error: OptiqError) -> list[bytes]:
        """The event that ends a stream in which something failed."""
        return [sent(error_body(error, self.request_id))]

    def whole(self, replies: Iterable[Reply]) -> dict[str, Any]:
        """The message that all replies make; raises as `events` does."""
        for reply in replies:
            self.events(reply)
        return self.message


def sent(event: Mapping[str, Any]) -> bytes:
    """An event on the wire."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
