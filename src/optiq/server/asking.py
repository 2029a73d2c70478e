"""What several protocols need on the way from a body to a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from fastapi import Request

from optiq.errors import RequestRejected
from optiq.server.jobs import ModelCard
from optiq.server.service import Service

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

BUDGETS: Final[Mapping[str, int | None]] = {
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""Tokens of thinking at most for each effort; None is no limit. `none` is no thinking."""


def card_of(service: Service, model: str) -> ModelCard:
    """What is known of a model that `Service.resolve` gave.

    Raises:
        RequestRejected: 503, if the engine has never come up.
    """
    for card in service.models():
        if card.name == model:
            return card
    raise RequestRejected("the engine is down; /ready says why", http_status=503)


def check_can_think(service: Service, model: str, param: str) -> None:
    """Refuse a wish for thinking that the model cannot fulfil.

    Raises:
        RequestRejected: 400 naming the parameter.
    """
    if not card_of(service, model).thinking:
        raise RequestRejected(f"{param}: model {model!r} cannot think first", param=param)


def function(
    name: str, description: str | None, schema: Mapping[str, Any] | None, strict: bool | None = None
) -> dict[str, Any]:
    """A function schema, as templates and the engine read it."""
    known: dict[str, Any] = {"name": name}
    if description is not None:
        known["description"] = description
    known["parameters"] = schema if schema is not None else {"type": "object", "properties": {}}
    if strict is not None:
        known["strict"] = strict
    return {"type": "function", "function": known}


def call(name: str, arguments: str | Mapping[str, Any], call_id: str | None) -> dict[str, Any]:
    """A call of the history, as templates and the engine read it."""
    named = {} if call_id is None else {"id": call_id}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def check_named(name: str, tools: Iterable[Mapping[str, Any]], param: str) -> None:
    """Refuse a choice of a tool that is not among the tools.

    Raises:
        RequestRejected: 400 naming the parameter.
    """
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise RequestRejected(f"{param}: no tool is named {name!r}; there are {names}", param=param)


async def fetched(request: Request, sources: Iterable[str]) -> tuple[bytes, ...]:
    """The pictures of a request, each a data URL or an address that the server may read.

    Raises:
        RequestRejected: 400, if one of them cannot be had.
    """
    return tuple([await request.app.state.images.fetch(source) for source in sources])


def data_url(base64: str, media_type: str = "image/png") -> str:
    """Base64 as `fetched` reads it."""
    return f"data:{media_type};base64,{base64}"
