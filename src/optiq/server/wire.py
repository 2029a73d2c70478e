"""What every protocol reads bodies with: known keys are honoured, ignored by name, or refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar, cast

import pydantic
from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict

from optiq.errors import RequestRejected
from optiq.server.service import Service

IGNORED_HEADER = "x-optiq-ignored"


class WireModel(BaseModel):
    """A part of a body. Unknown keys are refused; numbers and texts are not turned into others."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Body(WireModel):
    """The body of a request.

    Attributes:
        without_effect: keys that are accepted and cannot change the answer.
        refused: keys of the protocol that are not served, with the reason; the values that mean
            "not used" are let through by a validator of the route.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[dict[str, str]] = {}


B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """The body of a request.

    What was ignored is noted in `request.state.ignored`, which becomes a header of the answer.

    Raises:
        RequestRejected: 400 naming the parameter, if the body is not what the route takes.
    """
    data = await json_object(request)
    for key in data.keys() & kind.refused.keys():
        if data[key] is not None:
            raise RequestRejected(f"{key}: {kind.refused[key]}", param=key)
    data = {key: value for key, value in data.items() if key not in kind.refused}
    request.state.ignored = sorted(
        key for key in data.keys() & kind.without_effect if data[key] is not None
    )
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise rejected(error) from None


async def json_object(request: Request) -> dict[str, Any]:
    """The body as it came.

    Raises:
        RequestRejected: 400, if it is no JSON object.
    """
    try:
        data = await request.json()
    except (ValueError, RecursionError):
        raise RequestRejected("the body is not JSON; send one JSON object") from None
    if not isinstance(data, dict):
        raise RequestRejected(f"the body is a JSON {type(data).__name__}; send one object")
    return cast("dict[str, Any]", data)


def rejected(error: pydantic.ValidationError) -> RequestRejected:
    """The first fault of a body, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"] if not _is_type_name(part))
    if first["type"] == "extra_forbidden":
        return RequestRejected(f"unknown parameter {path!r}; leave it out", param=path)
    seen = repr(first["input"])[:80]
    return RequestRejected(f"{path or 'body'}: {first['msg']} (not {seen})", param=path or None)


def _is_type_name(part: object) -> bool:
    """Whether a step of a path names the member of a union that was tried, not a key."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or "-" in part)


def service_of(request: Request) -> Service:
    """The engine that the application was made with."""
    found: Service = request.app.state.service
    return found


Engine = Annotated[Service, Depends(service_of)]
