"""What the routes have in common: documents, and the card of a model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from optiq.server import asking
from optiq.server.jobs import ModelCard
from optiq.server.openai.errors import ERRORS, ErrorBody
from optiq.server.service import Service
from optiq.server.wire import IGNORED_HEADER, Body, body_of, schema_of


def documented(kind: type[Body], chunk: type[BaseModel] | None = None) -> dict[str, Any]:
    """Arguments of a POST route: its body, errors, headers, and the events of its stream.

    Args:
        kind: the body, which `wire.read` reads.
        chunk: what an event holds; None for a route that does not stream.
    """
    answer: dict[str, Any] = {
        "headers": {
            IGNORED_HEADER: {
                "description": "Parameters that were accepted and have no effect.",
                "schema": {"type": "string"},
            }
        }
    }
    if chunk is not None:
        json = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [schema_of(chunk), schema_of(ErrorBody)]},
        }
        data = {"anyOf": [{"const": "[DONE]"}, json]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        answer["description"] = "The answer; with `stream`, events, of which the last is `[DONE]`."
        answer["content"] = {"text/event-stream": {"itemSchema": event}}
    return {"openapi_extra": body_of(kind), "responses": ERRORS | {200: answer}}


def card_of(service: Service, name: str | None) -> ModelCard:
    """The model that a request names.

    Raises:
        RequestRejected: 404, if there is none.
    """
    return asking.card_of(service, service.resolve(name))
