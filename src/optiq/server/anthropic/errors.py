"""Refusals in Anthropic's words."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel

from optiq.errors import OptiqError, RequestRejected

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ErrorDetail(BaseModel):
    """What was wrong."""

    type: str
    message: str


class ErrorOut(BaseModel):
    """The body of every error."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: str | None = None


def error_body(error: OptiqError, request_id: str | None = None) -> dict[str, Any]:
    """The body of an error; in a stream, the data of its `error` event."""
    status = error.http_status if isinstance(error, RequestRejected) else 500
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": str(error)},
        "request_id": request_id,
    }
