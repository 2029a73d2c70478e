"""/v1/embeddings: mean-pooled hidden states of a model, L2 norm 1."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from optiq.server.jobs import EmbedJob
from optiq.server.openai.parameters import TokenId
from optiq.server.openai.routes import card_of, documented
from optiq.server.wire import Body, Engine, read

router = APIRouter(tags=["OpenAI"])

MAX_INPUTS = 2048
_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[list[TokenId], Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_INPUTS)]
_TokenLists = Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_INPUTS)]


class EmbeddingBody(Body):
    """Texts to embed."""

    without_effect = frozenset({"user"})

    input: _Text | _Texts | _Tokens | _TokenLists = Field(
        description=f"A text, token ids, or a list of up to {MAX_INPUTS} of either."
    )
    model: str | None = Field(
        default=None, description="Name of a model; the first one without it."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="`float`, or `base64` of float32 in little-endian order."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="So many of the numbers, normalized again."
    )
    user: str | None = Field(default=None, description="Name of the user.")

    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """One or more of them."""
        if isinstance(self.input, str):
            return (self.input,)
        texts = [one for one in self.input if isinstance(one, str)]
        lists = [tuple(one) for one in self.input if isinstance(one, list)]
        return tuple(texts or lists or [tuple(one for one in self.input if isinstance(one, int))])


class Embedding(BaseModel):
    """An embedding."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Embeddings, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=Embeddings, **documented(EmbeddingBody))
async def create_embeddings(request: Request, engine: Engine) -> Response:
    """Embed texts: the mean of the final hidden states of their tokens, of norm 1."""
    body = await read(request, EmbeddingBody)
    card = card_of(engine, body.model)
    done = await engine.embed(EmbedJob(card.name, body.inputs(), body.dimensions))
    coded = body.encoding_format == "base64"
    embeddings = Embeddings(
        object="list",
        data=[
            Embedding(object="embedding", index=i, embedding=_base64(one) if coded else list(one))
            for i, one in enumerate(done.vectors)
        ],
        model=card.name,
        usage=EmbeddingUsage(prompt_tokens=done.prompt_tokens, total_tokens=done.prompt_tokens),
    )
    return JSONResponse(embeddings.model_dump(mode="json"))


def _base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
