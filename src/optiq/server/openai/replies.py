"""What the routes that write text answer with: models of bodies and chunks, and their usage."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, Field

import optiq
from optiq.engine.events import FinishReason, Usage
from optiq.errors import OptiqError, RequestRejected
from optiq.server.jobs import ModelCard, Piece
from optiq.server.openai.errors import as_rejected, error_body

DONE: Final = b"data: [DONE]\n\n"
FINGERPRINT: Final = f"optiq-{optiq.__version__}"


class PromptDetails(BaseModel):
    """More about the prompt's tokens."""

    cached_tokens: int = Field(description="Found in the prefix cache.")


class CompletionDetails(BaseModel):
    """More about the tokens of the answers."""

    reasoning_tokens: int = Field(description="Of the thinking.")
    accepted_prediction_tokens: int = Field(description="Foreseen by the drafter.")


class Draft(BaseModel):
    """Extension: work of the drafter; only where there is one."""

    proposed: int = Field(description="Tokens that it proposed.")
    accepted: int = Field(description="Of these, what the model drew itself.")


class CompletionUsage(BaseModel):
    """Counts of tokens, over all answers; a prompt counts once however many it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    draft: Draft | None = None


def usage_of(
    card: ModelCard, prompt_tokens: int, firsts: Sequence[Usage], rest: Sequence[Usage]
) -> CompletionUsage:
    """The usage of a request.

    Args:
        card: the model.
        prompt_tokens: of all prompts.
        firsts: of the first answer to each prompt: the others find the prompt in the cache.
        rest: of the other answers.
    """
    every = [*firsts, *rest]
    completion = sum(one.completion_tokens for one in every)
    proposed = sum(one.drafted_tokens for one in every)
    accepted = sum(one.accepted_tokens for one in every)
    values: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": PromptDetails(
            cached_tokens=sum(one.cached_tokens for one in firsts)
        ),
        "completion_tokens_details": CompletionDetails(
            reasoning_tokens=sum(one.reasoning_tokens for one in every),
            accepted_prediction_tokens=accepted,
        ),
    }
    if card.drafter is not None:
        values["draft"] = Draft(proposed=proposed, accepted=accepted)
    return CompletionUsage(**values)


class TopToken(BaseModel):
    """A token that was likely at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(TopToken):
    """A token of the answer."""

    top_logprobs: list[TopToken]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer: all its tokens, those of thinking and calls among them."""

    content: list[TokenEntry]
    refusal: None = None


class Function(BaseModel):
    """A function that is called."""

    name: str
    arguments: str = Field(description="JSON object.")


class ToolCall(BaseModel):
    """A call."""

    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(
        default=None, description="Extension: the thinking before it."
    )
    tool_calls: list[ToolCall] | None = None


ChatFinish = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatFinish


class ChatCompletion(BaseModel):
    """All answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class FunctionDelta(BaseModel):
    """More of a function that is called."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """More of a call; its first has id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """More of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = Field(
        default=None, description="Extension: more of the thinking."
    )
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """More of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinish | None


class ChatChunk(BaseModel):
    """An event of a stream: the role, more of an answer, its end, or the usage of all."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None


class LegacyLogprobs(BaseModel):
    """Log-probabilities of a text; the first token of a prompt has none."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


TextFinish = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: TextFinish | None = Field(
        description="Null in the chunks of a stream but the last of a text."
    )


class Completion(BaseModel):
    """All texts, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


def new_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every body, or every chunk of a stream, of one request begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def dumped(body: BaseModel) -> dict[str, Any]:
    """A body as JSON values: what was given, null where null was given."""
    return body.model_dump(mode="json", exclude_unset=True)


def event(body: BaseModel) -> bytes:
    """A chunk as an event of a stream."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def failed(error: OptiqError) -> list[bytes]:
    """The end of a stream that failed: an event with the error, which clients raise, and [DONE]."""
    data = json.dumps(error_body(as_rejected(error)))
    return [f"data: {data}\n\n".encode(), DONE]


def finish_reason(reason: FinishReason) -> ChatFinish:
    """Why an answer ended.

    Raises:
        RequestRejected: 503, if it was ended before its time: the protocol has no word for it.
    """
    if reason == "cancelled":
        raise RequestRejected(
            "the answer was ended before it was complete; try again", http_status=503
        )
    return reason


def entries(pieces: Sequence[Piece], num_top: int) -> ChoiceLogprobs:
    """Log-probabilities of tokens, with so many of the most likely ones each."""
    return ChoiceLogprobs(
        content=[
            TokenEntry(
                token=piece.text,
                logprob=piece.logprob or 0.0,
                bytes=list(piece.data),
                top_logprobs=[
                    TopToken(
                        token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data)
                    )
                    for _, data, logprob in piece.top[:num_top]
                ],
            )
            for piece in pieces
        ],
        refusal=None,
    )


def completion_finish(reason: FinishReason) -> TextFinish:
    """Why a text ended. Raises as `finish_reason` does."""
    return "length" if finish_reason(reason) == "length" else "stop"
