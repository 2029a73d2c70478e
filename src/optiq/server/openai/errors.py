"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field

from optiq.errors import OptiqError, RequestRejected

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_exceeded",
}


class ErrorDetail(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str = Field(description="What is wrong, and what to do.")
    type: str = Field(description="Kind of the fault.")
    param: str | None = Field(description="The parameter at fault.")
    code: str | None = Field(description="Short name of the fault.")


class ErrorBody(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorDetail


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in {
        400: "The request cannot be honoured; `param` names what is at fault.",
        401: "The API key is missing or wrong.",
        403: "The host or origin is not allowed.",
        404: "There is no such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        415: "The body is not declared as JSON.",
        429: "The queue is full; see Retry-After.",
        500: "The server failed.",
        503: "The engine is not there, or the server is shutting down.",
        504: "The request took longer than it may.",
    }.items()
}


def error_body(error: RequestRejected) -> dict[str, Any]:
    """The body of the answer to a request that failed."""
    status = error.http_status
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    code = error.code or ("rate_limit_exceeded" if status == 429 else None)
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": code}}


def as_rejected(error: OptiqError) -> RequestRejected:
    """Any error as one that has a status; what is not the client's fault is 500."""
    if isinstance(error, RequestRejected):
        return error
    return RequestRejected(str(error), http_status=500)
