"""What every protocol reads bodies with: known keys are honoured, ignored by name, or refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, ClassVar, Final, NoReturn, TypeVar, cast

import pydantic
from fastapi import Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import ErrorDetails

from optiq.errors import RequestRejected
from optiq.server.service import Service

IGNORED_HEADER = "x-optiq-ignored"
_ERROR_STATUSES: Final = (400, 401, 403, 404, 413, 415, 429, 500, 503, 504)


class WireModel(BaseModel):
    """A part of a body. Unknown keys are refused; numbers and texts are not turned into others."""

    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class Body(WireModel):
    """The body of a request.

    Attributes:
        without_effect: keys that are accepted and cannot change the answer; a dot leads into an
            object, [] into the parts of a list.
        refused: keys of the protocol that are not served, with the reason. null is let through:
            it means "not given".
        refused_values: the same for values inside a body, for the documents; who refuses them is
            a validator of the route.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[dict[str, str]] = {}
    refused_values: ClassVar[dict[str, str]] = {}


B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """The body of a request.

    What was ignored is noted in `request.state.ignored`, which becomes a header of the answer.

    Raises:
        RequestRejected: 400 naming the parameter, if the body is not what the route takes.
    """
    data = await json_object(request)
    for key, value in data.items():
        if key in kind.refused and value is not None:
            raise RequestRejected(f"{key}: {kind.refused[key]}", param=key)
    data = {key: value for key, value in data.items() if key not in kind.refused}
    request.state.ignored = sorted(key for key in kind.without_effect if _is_given(data, key))
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise rejected(error, data) from None


def body_of(kind: type[Body]) -> dict[str, Any]:
    """What `openapi_extra` of a route says about its body, which `read` reads."""
    schema = schema_of(kind)
    schema["properties"] |= {
        key: {"type": "null", "description": f"Refused: {reason}"}
        for key, reason in kind.refused.items()
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model without references: an operation has no place for definitions."""
    schema = kind.model_json_schema()
    inlined: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return inlined


def note_ignored(request: Request, *names: str) -> None:
    """Name more of a request that has no effect; after `read`."""
    request.state.ignored = sorted({*request.state.ignored, *names})


@dataclasses.dataclass(frozen=True)
class Only:
    """Refuses every value but some, for a reason; None is always let through."""

    harmless: tuple[object, ...]
    reason: str

    def __call__(self, value: object) -> object:
        """The value, if it is let through."""
        if value is not None and not any(
            type(value) is type(one) and value == one for one in self.harmless
        ):
            raise ValueError(f"{self.reason} (not {value!r:.80})")
        return value

    def __str__(self) -> str:
        """For the documents."""
        return f"{json.dumps(self.harmless[0])} alone: {self.reason}"


def only(*harmless: object, reason: str) -> BeforeValidator:
    """`Only` as a part of an annotation; the first value stands for all in the documents."""
    return BeforeValidator(Only(harmless, reason))


_LINES: Final = {"schema": {"type": "string"}}
_EVENTS: Final = {
    "itemSchema": {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "required": ["event", "data"],
    }
}


def answers(
    whole: type[BaseModel], error: type[BaseModel], stream: str | None = None
) -> dict[int | str, dict[str, Any]]:
    """What `responses` of a route says about its answers.

    Args:
        whole: the body of an answer.
        error: the body of an error.
        stream: media type of a streamed answer, where there is one.
    """
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": error} for status in _ERROR_STATUSES
    }
    header = {"description": "What was accepted and had no effect.", "schema": {"type": "string"}}
    found[200] = {"model": whole, "headers": {IGNORED_HEADER: header}}
    if stream:
        found[200]["content"] = {stream: _EVENTS if "event" in stream else _LINES}
    return found


async def json_object(request: Request) -> dict[str, Any]:
    """The body as it came.

    Raises:
        RequestRejected: 400, if it is no JSON object.
    """
    raw = await request.body()
    try:
        data = json.loads(raw, parse_constant=_no_constant)
        if b"\\u" in raw:  # an escape can name half a character, which is no text
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RequestRejected("the body is not JSON; send one JSON object") from None
    if not isinstance(data, dict):
        raise RequestRejected(f"the body is a JSON {type(data).__name__}; send one object")
    return cast("dict[str, Any]", data)


def rejected(error: pydantic.ValidationError, data: dict[str, Any]) -> RequestRejected:
    """The fault of a body in words: one that a validator of ours found, else the deepest.

    Args:
        error: what was found.
        data: the body.
    """
    found = error.errors(include_url=False)
    steps, first = max(
        ((_steps(one, data), one) for one in found),
        key=lambda pair: (pair[1]["type"] == "value_error", len(pair[0])),
    )
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    path = path.removeprefix(".")
    if first["type"] == "extra_forbidden":
        return RequestRejected(f"unknown parameter {path!r}; leave it out", param=path)
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return RequestRejected(f"{path}: {message}" if path else message, param=path or None)
    if first["type"] == "missing":
        return RequestRejected(f"{path} is missing; give it", param=path)
    seen = repr(first["input"])[:80]
    return RequestRejected(f"{path or 'body'}: {first['msg']} (not {seen})", param=path or None)


def _steps(error: ErrorDetails, data: Any) -> list[str | int]:  # noqa: ANN401  any JSON value
    """Where in the body a fault lies: steps that name members of unions are left out."""
    steps: list[str | int] = []
    loc = error["loc"]
    for i, step in enumerate(loc):
        is_last = i == len(loc) - 1
        if isinstance(data, dict) and step in data:
            inside = isinstance(data[step], dict | list) and (is_last or loc[i + 1] not in data)
            if step in (data.get("type"), data.get("role")) and not (is_last or inside):
                continue  # the union that this object is a member of, though a key is named so
            data = data[step]
        elif isinstance(data, list) and isinstance(step, int):
            data = data[step]
        elif not (is_last and error["type"] == "missing"):
            continue
        steps.append(step)
    return steps


def _is_given(data: Any, key: str) -> bool:  # noqa: ANN401  any JSON value
    if not key:
        return data is not None
    if key.startswith("[]"):
        rest = key[2:].removeprefix(".")
        return isinstance(data, list) and any(_is_given(one, rest) for one in data)
    step = key.split(".")[0].split("[")[0]
    rest = key[len(step) :].removeprefix(".")
    return isinstance(data, dict) and _is_given(data.get(step), rest)


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:  # noqa: ANN401  any part of a schema
    if isinstance(schema, list):
        return [_inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return _inlined(parts[schema["$ref"].rpartition("/")[2]] | rest, parts)
    return {key: _inlined(value, parts) for key, value in schema.items() if key != "discriminator"}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


async def service_of(request: Request) -> Service:
    """The engine that the application was made with, when it knows its models."""
    found: Service = request.app.state.service
    await found.known()
    return found


Engine = Annotated[Service, Depends(service_of)]
