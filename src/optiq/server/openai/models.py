"""/v1/models: what is served, in the fields of OpenAI's clients and of Anthropic's."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from optiq.server.jobs import ModelCard
from optiq.server.openai.errors import ERRORS
from optiq.server.openai.routes import card_of
from optiq.server.wire import Engine

router = APIRouter(tags=["OpenAI"])

_EFFORTS = ("low", "medium", "high", "max", "xhigh")


class Supported(BaseModel):
    """Whether something can be had."""

    supported: bool


class Effort(Supported):
    """Degrees of effort: none of them differ, so that none is named."""

    low: Supported
    medium: Supported
    high: Supported
    xhigh: Supported
    max: Supported


class ServerTools(Supported):
    """Tools that the server runs."""

    code_execution: Supported
    web_search: Supported


class ThinkingTypes(BaseModel):
    """How thinking can be asked for."""

    adaptive: Supported
    between_tools: Supported
    disabled: Supported
    enabled: Supported


class Thinking(Supported):
    """Thinking before the answer."""

    types: ThinkingTypes


class Capabilities(BaseModel):
    """What a model can be asked for; the first ten as Anthropic's clients name them."""

    batch: Supported
    citations: Supported
    code_execution: Supported
    context_management: Supported
    effort: Effort
    image_input: Supported
    pdf_input: Supported
    server_tools: ServerTools
    structured_outputs: Supported
    thinking: Thinking
    chat: Supported = Field(description="It has a chat template.")
    tools: Supported = Field(description="Its template takes functions.")
    embeddings: Supported
    drafter: Supported = Field(description="A drafter speeds it up.")


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time.")
    owned_by: Literal["optiq"]
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None = Field(description="The context.")
    max_tokens: int | None = Field(description="The context: an answer may take the rest of it.")
    context_length: int | None = Field(description="Tokens of prompt and answer at most.")
    loaded: bool = Field(description="Whether it is in memory.")
    size_bytes: int = Field(description="Of its weights' files.")
    bpw: float | None = Field(description="Stored bits per weight, where known.")
    capabilities: Capabilities


class ModelList(BaseModel):
    """All models, the default one first."""

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str | None
    last_id: str | None


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(engine: Engine) -> ModelList:
    """All models, the default one first."""
    models = [model_of(card) for card in engine.models()]
    return ModelList(
        object="list",
        data=models,
        has_more=False,
        first_id=models[0].id if models else None,
        last_id=models[-1].id if models else None,
    )


@router.get("/v1/models/{model:path}", response_model=Model, responses=ERRORS)
async def retrieve_model(model: str, engine: Engine) -> Model:
    """One model, by a name or an alias of it."""
    return model_of(card_of(engine, model))


def model_of(card: ModelCard) -> Model:
    """A model as both dialects read it."""
    created = datetime.datetime.fromtimestamp(card.created, datetime.UTC)
    return Model(
        id=card.name,
        object="model",
        created=card.created,
        owned_by="optiq",
        type="model",
        display_name=card.name,
        created_at=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        lifecycle="active",
        max_input_tokens=card.context,
        max_tokens=card.context,
        context_length=card.context,
        loaded=card.loaded,
        size_bytes=card.size_bytes,
        bpw=card.bpw,
        capabilities=_capabilities(card),
    )


def _capabilities(card: ModelCard) -> Capabilities:
    no, yes = Supported(supported=False), Supported(supported=True)
    thinks, chats = Supported(supported=card.thinking), Supported(supported=card.chat)
    efforts: dict[str, Any] = dict.fromkeys(_EFFORTS, no)
    return Capabilities(
        batch=no,
        citations=no,
        code_execution=no,
        context_management=no,
        effort=Effort(supported=False, **efforts),
        image_input=Supported(supported=card.vision),
        pdf_input=no,
        server_tools=ServerTools(supported=False, code_execution=no, web_search=no),
        structured_outputs=yes,
        thinking=Thinking(
            supported=card.thinking,
            types=ThinkingTypes(adaptive=no, between_tools=thinks, disabled=yes, enabled=thinks),
        ),
        chat=chats,
        tools=Supported(supported=card.tools),
        embeddings=yes,
        drafter=Supported(supported=card.drafter is not None),
    )
