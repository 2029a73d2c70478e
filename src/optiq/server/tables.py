"""What each route honours, ignores and refuses, read off its body: for the documents."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from optiq.server.anthropic.body import CountBody, MessagesBody
from optiq.server.ollama_body import ChatBody, GenerateBody, ShowBody
from optiq.server.openai.responses_body import ResponsesBody
from optiq.server.wire import Body, Only

BODIES: Final[Mapping[str, type[Body]]] = {
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/v1/responses": ResponsesBody,
    "/api/chat": ChatBody,
    "/api/generate": GenerateBody,
    "/api/show": ShowBody,
}

_HEAD: Final = """\
# Parameters of Messages, Responses and Ollama's routes

Made from the code; after a change run `python tests/server/test_tables.py`. Every parameter is in
one of three lists. What is accepted without effect cannot change the answer; the header
`x-optiq-ignored` names it. What is refused is answered with 400 that names it, and so is every key
that is in no list. null is the same as leaving a parameter out. /openapi.json says more about each.
"""


def markdown(bodies: Mapping[str, type[Body]] = BODIES) -> str:
    """The lists of all routes as a page."""
    return "\n".join([_HEAD, *(_route(path, kind) for path, kind in bodies.items())])


def _route(path: str, kind: type[Body]) -> str:
    honoured = kind.model_fields.keys() - kind.without_effect
    lines = [
        f"## {path}\n",
        f"Honoured: {_named(name for name in kind.model_fields if name in honoured)}.\n",
    ]
    if kind.without_effect:
        lines.append(f"Accepted without effect: {_named(sorted(kind.without_effect))}.\n")
    notes = [one for one in dict.fromkeys(_notes(kind)) if one[0] not in kind.without_effect]
    if kind.refused or notes:
        lines += ["| Refused, or with a condition | |", "|---|---|"]
        lines += [f"| `{name}` | refused: {reason} |" for name, reason in kind.refused.items()]
        lines += [f"| `{name}` | {note} |" for name, note in notes]
        lines.append("")
    return "\n".join(lines)


def _named(names: Any) -> str:  # noqa: ANN401  any names
    return ", ".join(f"`{name}`" for name in names)


def _notes(kind: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    """What is said of fields, and of those of the objects in them."""
    for name, field in kind.model_fields.items():
        path = f"{above}{field.alias or name}"
        if note := _note(field):
            yield path, note
        for inner in _models(field.annotation):
            yield from _notes(inner, f"{path}.")


def _note(field: FieldInfo) -> str:
    checks = [one.func for one in field.metadata if isinstance(one, BeforeValidator)]
    refusals = [str(check) for check in checks if isinstance(check, Only)]
    return "; ".join([*filter(None, [field.description]), *refusals])


def _models(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401  any annotation
    """Models in an annotation that is one object or none; not those of lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in {types.UnionType, typing.Union, typing.Annotated}:
        for part in typing.get_args(annotation):
            yield from _models(part)
