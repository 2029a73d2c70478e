"""Ollama's protocol: `/api/chat`, `/api/generate` and what clients ask for before them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from optiq import __version__
from optiq.engine.events import Finished, ReasoningDelta, TextDelta, ToolCallDone
from optiq.engine.grammar import Grammar
from optiq.errors import EngineFailure, OptiqError, RequestRejected
from optiq.server.asking import (
    BUDGETS,
    call,
    card_of,
    check_can_think,
    data_url,
    fetched,
    function,
)
from optiq.server.jobs import GenerateJob, ModelCard, Reply, Said, Written
from optiq.server.ollama_body import (
    ChatBody,
    GenerateBody,
    OllamaBody,
    OllamaMessage,
    Options,
    ShowBody,
)
from optiq.server.respond import replies, settled, streamed
from optiq.server.service import Service
from optiq.server.wire import Engine, answers, body_of, read

router = APIRouter(tags=["ollama"])
_NDJSON: Final = "application/x-ndjson"


class OllamaErrorOut(BaseModel):
    """The body of every error."""

    error: str


def error_body(error: OptiqError) -> dict[str, Any]:
    """The body of an error; in a stream, its last line."""
    return {"error": str(error)}


class OllamaAnswer(BaseModel):
    """A part of an answer, or all of it; the last part has the counts. Durations are ns."""

    model: str
    created_at: str
    done: bool
    message: dict[str, Any] | None = Field(default=None, description="of /api/chat")
    response: str | None = Field(default=None, description="of /api/generate")
    thinking: str | None = Field(default=None, description="of /api/generate")
    done_reason: Literal["stop", "length"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class TagOut(BaseModel):
    """A model."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    model: str
    modified_at: str
    size: int = Field(description="bytes of the weights' files")
    digest: str = Field(description="empty: no digest is kept")
    details: dict[str, Any]


class TagsOut(BaseModel):
    """All models."""

    models: list[TagOut]


class ShowOut(BaseModel):
    """What is known of a model."""

    model_config = ConfigDict(protected_namespaces=())

    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[Literal["completion", "vision", "tools", "thinking"]]
    modified_at: str


class VersionOut(BaseModel):
    """Version of this server, which is not Ollama's."""

    version: str


# -- a body -> a job -------------------------------------------------------------------------------


def _job(
    service: Service,
    body: OllamaBody,
    **prompt: Any,  # noqa: ANN401
) -> GenerateJob:
    """The job of a body; what it is to go on with is given apart."""
    model = service.resolve(body.model)
    thinking = body.think not in {None, False}
    if thinking:
        check_can_think(service, model, "think")
    options = body.options or Options()
    return GenerateJob(
        model,
        thinking=thinking,
        thinking_budget=BUDGETS[body.think] if isinstance(body.think, str) else None,
        grammar=_grammar(body.format),
        sampling=_sampling(options),
        **prompt,
    )


def _grammar(wanted: str | Mapping[str, Any] | None) -> Grammar | None:
    if not isinstance(wanted, str | None):
        return Grammar("json_schema", wanted)
    return Grammar("json_object") if wanted else None


def _sampling(options: Options) -> dict[str, Any]:
    count, stop = options.num_predict, options.stop
    given = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "seed": options.seed,
        "max_tokens": count if count is not None and count >= 0 else None,
        "stop": ((stop,) if isinstance(stop, str) else tuple(stop)) if stop else None,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
    }
    return {name: value for name, value in given.items() if value is not None}


def _content(text: str, images: Sequence[str] | None) -> str | list[dict[str, Any]]:
    """Text with its pictures in front."""
    if not images:
        return text
    return [*({"type": "image"} for _ in images), {"type": "text", "text": text}]


def _messages(given: Iterable[OllamaMessage]) -> list[dict[str, Any]]:
    """Messages, OpenAI style. Results without an id are of the earliest calls that wait."""
    out: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    count = 0
    for message in given:
        turn: dict[str, Any] = {
            "role": message.role,
            "content": _content(message.content or "", message.images),
        }
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        for one in message.tool_calls or ():
            call_id = one.id or f"call_{count}"
            count += 1
            waiting.append((call_id, one.function.name))
            made = call(one.function.name, one.function.arguments, call_id)
            turn.setdefault("tool_calls", []).append(made)
        if message.role == "tool":
            turn |= _answered(message, waiting)
        out.append(turn)
    return out


def _answered(message: OllamaMessage, waiting: list[tuple[str, str]]) -> dict[str, str]:
    """The call that a result is of; it waits no longer."""
    name = message.tool_name or message.name
    for place, (call_id, called) in enumerate(waiting):
        if message.tool_call_id in {None, call_id} and name in {None, called}:
            del waiting[place]
            return {"tool_call_id": call_id, "name": called}
    raise RequestRejected(
        f"messages: a result of {name or message.tool_call_id or 'a tool'} follows no such call",
        param="messages",
    )


# -- replies -> answers ----------------------------------------------------------------------------


@dataclasses.dataclass
class AnswerWriter:
    """Writes one answer.

    Attributes:
        model: name as the client gave it.
        chat: whether it is of `/api/chat`.
    """

    model: str
    chat: bool
    _begun: float = dataclasses.field(default_factory=time.monotonic)
    _first: float | None = None

    def parts(self, reply: Reply) -> list[dict[str, Any]]:
        """Parts of the answer.

        Raises:
            EngineFailure: if the server cut the answer off.
        """
        match reply:
            case Written():
                self._first = self._first or time.monotonic()
            case Said(event=TextDelta(text)) if text:
                return [self._part(text)]
            case Said(event=ReasoningDelta(text)) if text:
                return [self._part("", thinking=text)]
            case Said(event=ToolCallDone() as done):
                named = {"name": done.name, "arguments": done.data(), "index": done.index}
                made = {"id": done.id, "function": named}
                return [self._part("", tool_calls=[made])]
            case Said(event=Finished() as finished):
                return [self._last(finished)]
        return []

    def _part(self, text: str, **more: object) -> dict[str, Any]:
        head = {"model": self.model, "created_at": _written_time(time.time())}
        if self.chat:
            body: dict[str, Any] = {"message": {"role": "assistant", "content": text, **more}}
        else:
            body = {"response": text, **more}
        return {**head, **body, "done": False}

    def _last(self, finished: Finished) -> dict[str, Any]:
        if finished.reason == "cancelled":
            raise EngineFailure("the server ended the answer early; try again")
        now = time.monotonic()
        first = self._first or now
        usage = finished.usage
        return self._part("") | {
            "done": True,
            "done_reason": "length" if finished.reason == "length" else "stop",
            "total_duration": _ns(now - self._begun),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _ns(first - self._begun),
            "eval_count": usage.completion_tokens,
            "eval_duration": _ns(now - first),
        }

    def whole(self, found: Iterable[Reply]) -> dict[str, Any]:
        """All parts as one; raises as `parts` does."""
        parts = [part for reply in found for part in self.parts(reply)]
        last = parts[-1]
        held = [part["message"] if self.chat else part for part in parts]
        into = last["message"] if self.chat else last
        into["content" if self.chat else "response"] = "".join(
            part["content" if self.chat else "response"] for part in held
        )
        if thought := "".join(part.get("thinking", "") for part in held):
            into["thinking"] = thought
        if calls := [one for part in held for one in part.get("tool_calls", ())]:
            into["tool_calls"] = calls
        return last

    def encode(self, reply: Reply) -> list[bytes]:
        """Lines of the stream; raises as `parts` does."""
        return [_line(part) for part in self.parts(reply)]

    def failed(self, error: OptiqError) -> list[bytes]:
        """The line that ends a stream in which something failed."""
        return [_line(error_body(error))]


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _written_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _line(part: Mapping[str, Any]) -> bytes:
    return json.dumps(part).encode() + b"\n"


async def _answer(
    request: Request, service: Service, body: OllamaBody, job: GenerateJob, *, chat: bool
) -> Response:
    writer = AnswerWriter(body.model, chat)
    stream = service.submit(job)
    if body.stream is not False:
        return await streamed(request, stream, writer.encode, writer.failed, _NDJSON)
    return JSONResponse(writer.whole(settled(await replies(request, stream))))


# -- routes ----------------------------------------------------------------------------------------


@router.post(
    "/api/chat",
    response_model=None,
    responses=answers(OllamaAnswer, OllamaErrorOut, _NDJSON),
    openapi_extra=body_of(ChatBody),
)
async def chat(request: Request, service: Engine) -> Response:
    """Go on with a conversation."""
    body = await read(request, ChatBody)
    tools = tuple(
        function(
            tool.function.name,
            tool.function.description,
            tool.function.parameters,
            tool.function.strict,
        )
        for tool in body.tools or ()
    )
    job = _job(
        service,
        body,
        prompt=tuple(_messages(body.messages)),
        tools=tools,
    )
    pictures = [image for message in body.messages for image in message.images or ()]
    job = dataclasses.replace(job, images=await fetched(request, map(data_url, pictures)))
    return await _answer(request, service, body, job, chat=True)


@router.post(
    "/api/generate",
    response_model=None,
    responses=answers(OllamaAnswer, OllamaErrorOut, _NDJSON),
    openapi_extra=body_of(GenerateBody),
)
async def generate(request: Request, service: Engine) -> Response:
    """Answer one prompt, or go on with raw text."""
    body = await read(request, GenerateBody)
    prompt: str | tuple[dict[str, Any], ...] = body.prompt
    if not body.raw:
        turns: list[dict[str, Any]] = []
        if body.system:
            turns.append({"role": "system", "content": body.system})
        turns.append({"role": "user", "content": _content(body.prompt, body.images)})
        prompt = tuple(turns)
    elif body.system or body.think not in {None, False}:
        raise RequestRejected("raw: raw text has no system and no thinking", param="raw")
    job = _job(service, body, prompt=prompt)
    images = await fetched(request, map(data_url, body.images or ()))
    job = dataclasses.replace(job, images=images)
    return await _answer(request, service, body, job, chat=False)


@router.get("/api/tags", responses={200: {"model": TagsOut}}, response_model=None)
async def tags(service: Engine) -> Response:
    """All models."""
    models = [
        {
            "name": card.name,
            "model": card.name,
            "modified_at": _written_time(card.created),
            "size": card.size_bytes,
            "digest": "",
            "details": _details(card),
        }
        for card in service.models()
    ]
    return JSONResponse({"models": models})


@router.get("/api/version", responses={200: {"model": VersionOut}}, response_model=None)
async def version() -> Response:
    """Version of this server."""
    return JSONResponse({"version": __version__})


@router.post(
    "/api/show",
    response_model=None,
    responses=answers(ShowOut, OllamaErrorOut),
    openapi_extra=body_of(ShowBody),
)
async def show(request: Request, service: Engine) -> Response:
    """What is known of a model."""
    body = await read(request, ShowBody)
    card = card_of(service, service.resolve(body.model))
    can = {
        "completion": True,
        "vision": card.vision,
        "tools": card.tools,
        "thinking": card.thinking,
    }
    return JSONResponse(
        {
            "details": _details(card),
            "model_info": {"general.context_length": card.context} if card.context else {},
            "capabilities": [name for name, does in can.items() if does],
            "modified_at": _written_time(card.created),
        }
    )


def _details(card: ModelCard) -> dict[str, Any]:
    level = "" if card.bpw is None else f"{card.bpw:.2f} bpw"
    return {"format": "mlx", "quantization_level": level}
