"""/tokenize and /detokenize, in the shapes of vLLM."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from optiq.errors import RequestRejected
from optiq.server.jobs import CountJob, DetokenizeJob, GenerateJob, ModelCard
from optiq.server.openai.chat_body import ChatBody, TemplateOptions, Tool, job_of
from optiq.server.openai.messages import Message, conversation, served_tool
from optiq.server.openai.parameters import TokenId
from optiq.server.openai.routes import card_of, documented
from optiq.server.wire import Body, Engine, read

router = APIRouter(tags=["tokens"])


_FOR_MESSAGES = (
    "tools",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
)
_NONE: JsonValue = {"type": "null"}
_EITHER: list[JsonValue] = [
    {
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": "string"},
            "messages": _NONE,
            **dict.fromkeys(_FOR_MESSAGES, _NONE),
        },
    },
    {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": _NONE}},
]


class TokenizeBody(Body):
    """A text or a conversation to put into tokens."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _EITHER})

    refused_values: ClassVar[dict[str, str]] = {
        "add_special_tokens=false": "the model never reads a text without them",
    }

    model: str | None = Field(
        default=None, description="Name of a model; the first one without it."
    )
    prompt: str | None = Field(default=None, min_length=1, description="A text; or give messages.")
    messages: list[Message] | None = Field(
        default=None, min_length=1, description="A conversation, as /v1/chat/completions takes it."
    )
    tools: list[Annotated[Tool, served_tool]] | None = Field(
        default=None, description="Functions that the model may call."
    )
    chat_template_kwargs: TemplateOptions | None = Field(
        default=None, description="`enable_thinking`."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Go on with the last message, which is the assistant's."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="The opposite of continue_final_message, where both are given."
    )
    add_special_tokens: Literal[True] | None = Field(default=None, description="true.")
    return_token_strs: bool | None = Field(
        default=None, description="Give the texts of the tokens too."
    )


class Tokenized(BaseModel):
    """A prompt as tokens."""

    count: int
    max_model_len: int | None = Field(description="The context.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    """Tokens to put into text."""

    model: str | None = Field(
        default=None, description="Name of a model; the first one without it."
    )
    tokens: list[TokenId] = Field(description="Token ids.")


class Detokenized(BaseModel):
    """Tokens as text."""

    prompt: str


@router.post("/tokenize", response_model=Tokenized, **documented(TokenizeBody))
async def tokenize(request: Request, engine: Engine) -> Response:
    """Put a text or a conversation into tokens, as the model would read it."""
    body = await read(request, TokenizeBody)
    card = card_of(engine, body.model)
    counted = await engine.count(CountJob(await _prompt(request, body, card)))
    tokenized = Tokenized(
        count=counted.num_tokens,
        max_model_len=card.context,
        tokens=[piece.token for piece in counted.tokens],
        token_strs=[piece.text for piece in counted.tokens] if body.return_token_strs else None,
    )
    return JSONResponse(tokenized.model_dump(mode="json"))


@router.post("/detokenize", response_model=Detokenized, **documented(DetokenizeBody))
async def detokenize(request: Request, engine: Engine) -> Response:
    """Put tokens into text."""
    body = await read(request, DetokenizeBody)
    card = card_of(engine, body.model)
    done = await engine.detokenize(DetokenizeJob(card.name, tuple(body.tokens)))
    return JSONResponse(Detokenized(prompt=done.text).model_dump(mode="json"))


async def _prompt(request: Request, body: TokenizeBody, card: ModelCard) -> GenerateJob:
    if (body.prompt is None) == (body.messages is None):
        raise RequestRejected("prompt: give it or messages, and not both", param="prompt")
    if body.messages is None:
        for name in _FOR_MESSAGES:
            if getattr(body, name) is not None:
                raise RequestRejected(f"{name}: only for messages; leave it out", param=name)
        return GenerateJob(card.name, body.prompt or "")
    chat = ChatBody(
        messages=body.messages,
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        continue_final_message=body.continue_final_message,
        add_generation_prompt=body.add_generation_prompt,
    )
    images = request.app.state.images if card.vision else None
    return job_of(chat, card, await conversation(body.messages, images))
