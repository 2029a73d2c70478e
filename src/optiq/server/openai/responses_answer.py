"""Replies of the engine -> a response of `/v1/responses`, streamed or whole."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from optiq.engine.events import (
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallFailed,
    ToolCallStarted,
    Usage,
)
from optiq.errors import EngineFailure, OptiqError, RequestRejected
from optiq.server.alignment import Alignment
from optiq.server.jobs import GenerateJob, Piece, Reply, Said, Started, Written
from optiq.server.openai.responses_body import ResponsesBody
from optiq.server.openai.responses_prompt import ENCRYPTED, LOGPROBS, sealed

Event = dict[str, Any]


class ResponsesErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ResponsesErrorOut(BaseModel):
    """The body of every error."""

    error: ResponsesErrorDetail


class DraftOut(BaseModel):
    """What the drafter did: tokens proposed, and those of them that were right."""

    proposed: int
    accepted: int


class InputDetails(BaseModel):
    """Tokens of the prompt by kind."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Tokens of the answer by kind."""

    reasoning_tokens: int


class ResponseUsageOut(BaseModel):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    draft: DraftOut | None = Field(default=None, description="where there is a drafter")


class ResponseOut(BaseModel):
    """An answer; beside it, what was asked."""

    model_config = ConfigDict(protected_namespaces=(), extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    output: list[dict[str, Any]] = Field(description="items reasoning, message and function_call")
    usage: ResponseUsageOut | None


def described(job: GenerateJob, body: ResponsesBody) -> dict[str, Any]:
    """What was asked, as every response repeats it."""
    given = body.model_dump(mode="json", by_alias=True)
    reasoning = given["reasoning"] or {}
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": job.model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "background": False,
        "store": False,
        "previous_response_id": None,
        "truncation": "disabled",
        "service_tier": "default",
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": job.parallel_tool_calls,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}} | _some(given["text"]),
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "user": body.user,
    }


def _some(values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if value is not None}


@dataclasses.dataclass
class ResponseWriter:
    """Writes one response; items stand in the order in which the model wrote them.

    Attributes:
        response: what was written so far, as a body.
        include: what more is to be told of it.
        drafts: whether the model has a drafter.
    """

    response: dict[str, Any]
    include: tuple[str, ...] = ()
    drafts: bool = False
    _number: int = 0
    _open: bool = False
    _tokens: Alignment = dataclasses.field(default_factory=Alignment)
    _broken: str | None = None

    @classmethod
    def of(cls, job: GenerateJob, body: ResponsesBody, *, drafts: bool) -> ResponseWriter:
        """A writer of the answer to a body."""
        include = set(body.include or ())
        if body.top_logprobs:
            include.add(LOGPROBS)
        return cls(described(job, body), tuple(include), drafts)

    def events(self, reply: Reply) -> list[Event]:
        """Events of a reply.

        Raises:
            EngineFailure: if a call that has begun turned out to be none, or the answer was cut
                off by the server.
        """
        match reply:
            case Started():
                return [self._state("response.created"), self._state("response.in_progress")]
            case Written(_, pieces):
                self._tokens.add(pieces)
            case Said(event=Finished() as finished):
                return self._end(finished)
            case Said(event=event) if self._broken is None:
                return self._written(event)
        return []

    def _state(self, kind: str) -> Event:
        """An event with the response as it is now."""
        return self._event(kind, response=json.loads(json.dumps(self.response)))

    def _event(self, kind: str, **fields: object) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _written(self, event: object) -> list[Event]:
        match event:
            case TextDelta(text) if text:
                return [*self._in("message"), self._text(text)]
            case ReasoningDelta(text) if text:
                out = self._in("reasoning")
                self._item["content"][0]["text"] += text
                self._tokens.take(text)
                return [*out, self._part_event("response.reasoning_text.delta", delta=text)]
            case ToolCallStarted(_, call_id, name):
                out = self._close("completed")
                return [*out, *self._in("function_call", call_id=call_id, name=name, arguments="")]
            case ToolCallDelta(_, text):
                self._item["arguments"] += text
                kind = "response.function_call_arguments.delta"
                return [self._item_event(kind, delta=text)]
            case ToolCallDone():
                self._tokens.clear()
                return self._close("completed")
            case ToolCallFailed(started, reason) if started:
                self._broken = reason
        return []

    # -- the item in progress ----------------------------------------------------------------------

    @property
    def _item(self) -> dict[str, Any]:
        item: dict[str, Any] = self.response["output"][-1]
        return item

    def _item_event(self, kind: str, **fields: object) -> Event:
        """An event of the item in progress."""
        where = {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}
        return self._event(kind, **where, **fields)

    def _part_event(self, kind: str, **fields: object) -> Event:
        """An event of the only part of the item in progress."""
        return self._item_event(kind, content_index=0, **fields)

    def _in(self, kind: str, **fields: object) -> list[Event]:
        """Open an item of that kind, unless one is open."""
        if self._open and self._item["type"] == kind:
            return []
        out = self._close("completed")
        self._open = True
        item = {"id": f"{_PREFIX[kind]}_{secrets.token_hex(12)}", "type": kind, **fields}
        item |= {"status": "in_progress"} | _EMPTY[kind]
        self.response["output"].append({**item})
        out.append(self._whole_item("response.output_item.added"))
        if kind != "function_call":
            self._item["content"] = [part := self._new_part(kind)]
            out.append(self._part_event("response.content_part.added", part=dict(part)))
        return out

    def _new_part(self, kind: str) -> dict[str, Any]:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": ""}
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

    def _whole_item(self, kind: str) -> Event:
        """An event with the item in progress as it is now."""
        index = len(self.response["output"]) - 1
        item = json.loads(json.dumps(self._item))
        return self._event(kind, output_index=index, item=item)

    def _text(self, text: str) -> Event:
        part = self._item["content"][0]
        part["text"] += text
        pieces = self._tokens.take(text)
        logprobs = [_logprob(piece) for piece in pieces] if LOGPROBS in self.include else []
        part["logprobs"] += logprobs
        return self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)

    def _close(self, status: str) -> list[Event]:
        """End the item in progress."""
        if not self._open:
            return []
        self._open = False
        item = self._item
        item["status"] = status
        out = self._said_whole(item)
        return [*out, self._whole_item("response.output_item.done")]

    def _said_whole(self, item: dict[str, Any]) -> list[Event]:
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            return [self._item_event("response.function_call_arguments.done", **said)]
        part = dict(item["content"][0])
        if item["type"] == "reasoning":
            if ENCRYPTED in self.include:
                item["encrypted_content"] = sealed(part["text"])
            done = self._part_event("response.reasoning_text.done", text=part["text"])
        else:
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            done = self._part_event("response.output_text.done", **said)
        return [done, self._part_event("response.content_part.done", part=part)]

    # -- the end -----------------------------------------------------------------------------------

    def _end(self, finished: Finished) -> list[Event]:
        if finished.reason == "cancelled":
            raise EngineFailure("the server ended the answer early; try again")
        cut = finished.reason == "length"
        if self._broken is not None and not cut:
            raise EngineFailure(f"the model wrote a call that cannot be read: {self._broken}")
        out = self._close("incomplete" if cut else "completed")
        status = "incomplete" if cut else "completed"
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "usage": self._usage(finished.usage),
        }
        return [*out, self._state(f"response.{status}")]

    def _usage(self, usage: Usage) -> dict[str, Any]:
        out: dict[str, Any] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
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
        told = error.code if isinstance(error, RequestRejected) else None
        code = "rate_limit_exceeded" if told == "rate_limit_exceeded" else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": str(error)}}
        return [sent(self._state("response.failed"))]

    def whole(self, replies: Iterable[Reply]) -> dict[str, Any]:
        """The response that all replies make; raises as `events` does."""
        for reply in replies:
            self.events(reply)
        return self.response


_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_EMPTY: dict[str, dict[str, Any]] = {
    "message": {"role": "assistant", "content": []},
    "reasoning": {"summary": [], "content": []},
    "function_call": {},
}


def _logprob(piece: Piece) -> dict[str, Any]:
    return {
        "token": piece.text,
        "bytes": list(piece.data),
        "logprob": piece.logprob,
        "top_logprobs": [
            {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": logprob}
            for _, data, logprob in piece.top
        ],
    }


def sent(event: Mapping[str, Any]) -> bytes:
    """An event on the wire."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
