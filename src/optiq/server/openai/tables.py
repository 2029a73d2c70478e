"""What each route honours, ignores and refuses, read off its body: for the documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from optiq.server.openai.chat_body import ChatBody
from optiq.server.openai.completions import CompletionBody
from optiq.server.openai.embeddings import EmbeddingBody
from optiq.server.openai.tokens import DetokenizeBody, TokenizeBody
from optiq.server.wire import Body

BODIES: Final[Mapping[str, type[Body]]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


@dataclasses.dataclass(frozen=True)
class Table:
    """The parameters of a route, each with a few words.

    Attributes:
        honoured: they do what they say.
        ignored: accepted; they cannot change the answer.
        refused: 400 that names them.
    """

    honoured: Mapping[str, str]
    ignored: Mapping[str, str]
    refused: Mapping[str, str]


def tables() -> dict[str, Table]:
    """The parameters of every route that reads a body, by its path."""
    return {path: table_of(kind) for path, kind in BODIES.items()}


def table_of(kind: type[Body]) -> Table:
    """The parameters of a body."""
    known = {name: field.description or "" for name, field in kind.model_fields.items()}
    ignored = {name: _described(kind, name) for name in sorted(kind.without_effect)}
    return Table(
        honoured={name: text for name, text in known.items() if name not in ignored},
        ignored=ignored,
        refused=kind.refused | kind.refused_values,
    )


def markdown() -> str:
    """The tables as a page."""
    parts = [_HEAD]
    for path, table in tables().items():
        parts.append(f"## {path}\n")
        for title, rows in (
            ("Honoured", table.honoured),
            ("Accepted without effect", table.ignored),
            ("Refused", table.refused),
        ):
            if rows:
                lines = [f"| `{name}` | {text} |" for name, text in rows.items()]
                parts.append("\n".join([f"| {title} | |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _described(kind: type[Body], path: str) -> str:
    """What is said of a field, which may lie in a part of the body."""
    head, *rest = path.replace("[]", "").split(".")
    field = kind.model_fields[head]
    for name in rest:
        field = next(part for part in _models(field.annotation) if name in part).pop(name)
    return field.description or ""


def _models(annotation: Any) -> Iterator[dict[str, FieldInfo]]:  # noqa: ANN401  any type
    """The fields of all models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield dict(annotation.model_fields)
    for part in get_args(annotation):
        yield from _models(part)


_HEAD = """\
# Parameters of the OpenAI routes

Made from the code by `python scripts/openai_parameters.py`. Every parameter of a body is in one of
three tables. What is accepted without effect cannot change the answer; the header `x-optiq-ignored`
names it. What is refused is answered with 400, whose `param` names it, and so is every key that is
in no table. null is the same as leaving a parameter out.
"""
