"""What each route honours, ignores and refuses, read off its body: for the documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

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
    """What is said of a field, which may lie in an object."""
    head, _, rest = path.partition(".")
    field = kind.model_fields[head]
    if not rest:
        return field.description or ""
    parts: tuple[Any, ...] = getattr(field.annotation, "__args__", (field.annotation,))
    inner = next(part for part in parts if hasattr(part, "model_fields"))
    return inner.model_fields[rest].description or ""


_HEAD = """\
# Parameters of the OpenAI routes

Made from the code by `python scripts/openai_parameters.py`. Every parameter of a body is in one of
three tables. What is accepted without effect cannot change the answer; the header `x-optiq-ignored`
names it. What is refused is answered with 400, whose `param` names it, and so is every key that is
in no table. null is the same as leaving a parameter out.
"""
