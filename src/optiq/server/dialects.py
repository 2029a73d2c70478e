"""Every exception -> a refusal; a refusal -> an answer in the words of the caller's protocol."""

from __future__ import annotations

import math
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Scope

from optiq.errors import EngineFailure, OptiqError, RequestRejected
from optiq.server import anthropic, ollama, openai
from optiq.server.records import log_fault

SHUTTING_DOWN: Final = "shutting_down"
"""Code of a refusal because the server is about to end; the connection is closed with it."""

_CLIENT_CLOSED: Final = 499


def error_body(scope: Scope, error: RequestRejected) -> dict[str, Any]:
    """The body of a refusal, as the caller's protocol has it."""
    path: str = scope["path"]
    of_models = path == "/v1/models" or path.startswith("/v1/models/")  # one route, two protocols
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic.error_body(error, request_id_of(scope))
    if of_models and "anthropic-version" in Headers(scope=scope):
        return anthropic.error_body(error, request_id_of(scope))
    return ollama.error_body(error) if path.startswith("/api/") else openai.error_body(error)


def rejection(error: Exception, scope: Scope) -> RequestRejected:
    """What the client is told about an exception; what nobody expected is logged, not told."""
    match error:
        case RequestRejected():
            return error
        case EngineFailure():
            return RequestRejected(str(error), http_status=500, code="engine_failure")
        case OptiqError():
            return RequestRejected(str(error))
        case HTTPException():
            return _of_router(error, scope)
        case RequestValidationError():
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"][1:])
            return RequestRejected(f"{param}: {first['msg']}", param=param or None)
    request_id = request_id_of(scope)
    log_fault(error, f"request {request_id} failed")
    return RequestRejected(
        f"internal error; the server's log says more under request id {request_id}",
        http_status=500,
        code="internal_error",
    )


def _of_router(error: HTTPException, scope: Scope) -> RequestRejected:
    where = f"{scope['method']} {scope['path'][:100]}"
    words = {
        404: f"there is no route {where}; /openapi.json lists what there is",
        405: f"{where} is not allowed; /openapi.json lists the methods of the route",
    }
    text = words.get(error.status_code, str(error.detail))
    return RequestRejected(text, http_status=error.status_code)


def answer(error: Exception, scope: Scope) -> JSONResponse:
    """The response that tells a client what was wrong."""
    told = rejection(error, scope)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if told.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(told.retry_after_s)))
    if told.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    if told.code == SHUTTING_DOWN:
        headers["connection"] = "close"
    status = told.http_status if told.http_status != _CLIENT_CLOSED else 400  # nobody reads it
    return JSONResponse(error_body(scope, told), status, headers=headers)


def request_id_of(scope: Scope) -> str:
    """The id that the access log gave a request."""
    found: str = scope["state"]["request_id"]
    return found
