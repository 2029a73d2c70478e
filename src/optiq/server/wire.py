"""What every protocol reads bodies with: known keys are honoured, ignored by name, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, TypeVar, cast

import pydantic
from fastapi import Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from optiq.errors import RequestRejected
from optiq.server.service import Service

IGNORED_HEADER = "x-optiq-ignored"
ERROR_STATUSES: Final = (400, 401, 403, 404, 413, 415, 429, 500, 503, 504)
_NOT_SERVED: Final = "not_served"
_TYPE_NAMES: Final = frozenset({"str", "int", "float", "bool", "dict", "constrained-str"})


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
        raise rejected(error, data) from None


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


def note_ignored(request: Request, *names: str) -> None:
    """Name more of a request that has no effect; after `read`."""
    request.state.ignored = sorted({*request.state.ignored, *names})


def rejected(error: pydantic.ValidationError, data: object = None) -> RequestRejected:
    """The most exact fault of a body, in words.

    Args:
        error: what was found.
        data: the body, which tells its keys from names of types.
    """
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda one: (one["type"] == _NOT_SERVED, len(one["loc"])))
    path = ".".join(_keys(fault["loc"], data))
    if fault["type"] == "extra_forbidden":
        return RequestRejected(f"unknown parameter {path!r}; leave it out", param=path)
    seen = repr(fault["input"])[:80]
    return RequestRejected(f"{path or 'body'}: {fault['msg']} (not {seen})", param=path or None)


def _keys(steps: Sequence[int | str], data: object) -> list[str]:
    """The keys of a path of pydantic's, which has names of types and tags of unions in it."""
    keys: list[str] = []
    here, tagged = data, False
    for step in steps:
        if (
            not tagged
            and isinstance(here, Mapping)
            and step in {here.get("type"), here.get("role")}
        ):
            tagged = True
        elif not _is_type_name(step):
            keys.append(str(step))
            here, tagged = _below(here, step), False
    return keys


def _below(value: object, key: int | str) -> object:
    try:
        return cast("Any", value)[key]
    except (LookupError, TypeError):
        return None


def _is_type_name(part: object) -> bool:
    """Whether a step of a path names the member of a union that was tried, not a key."""
    return isinstance(part, str) and (
        part[:1].isupper() or "[" in part or "-" in part or part in _TYPE_NAMES
    )


def only(*harmless: object, reason: str) -> BeforeValidator:
    """Refuses every value but those, for a reason; None is always harmless."""

    def check(value: object) -> object:
        if value is not None and not any(value is one or value == one for one in harmless):
            raise PydanticCustomError(_NOT_SERVED, "{reason}", {"reason": reason})
        return value

    return BeforeValidator(check)


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route says about its body in openapi.json."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:  # noqa: ANN401  any JSON value
    """A schema with what it refers to written in place."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    return {
        key: _inlined(value, definitions)
        for key, value in schema.items()
        if not (key == "discriminator" and isinstance(value, dict))
    }


def answers(
    whole: type[BaseModel], error: type[BaseModel], stream: str | None = None
) -> dict[int | str, dict[str, Any]]:
    """What a route says about its answers in openapi.json.

    Args:
        whole: the body of an answer.
        error: the body of an error.
        stream: media type of a streamed answer, where there is one.
    """
    found: dict[int | str, dict[str, Any]] = {status: {"model": error} for status in ERROR_STATUSES}
    headers = {IGNORED_HEADER: {"description": _IGNORED, "schema": {"type": "string"}}}
    found[200] = {"model": whole, "headers": headers}
    if stream:
        found[200]["content"] = {stream: {"schema": {"type": "string"}}}
    return found


_IGNORED: Final = "parameters that were accepted and cannot change the answer, with commas between"


def service_of(request: Request) -> Service:
    """The engine that the application was made with."""
    found: Service = request.app.state.service
    return found


Engine = Annotated[Service, Depends(service_of)]
