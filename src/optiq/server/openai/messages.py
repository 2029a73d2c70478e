"""Messages of a conversation, and how the engine reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import BeforeValidator, Field

from optiq.errors import RequestRejected
from optiq.server.wire import WireModel

Detail = Literal["auto", "low", "high"]

REFUSED_PARTS: Final = {
    "input_audio": "the models read no sound; send text",
    "file": "files are not read; send their text",
    "refusal": "the models write none; send it as text",
}


def refusing(kinds: dict[str, str], what: str, key: str = "type") -> BeforeValidator:
    """A validator that refuses, by name and with the reason, some kinds of an object.

    Args:
        kinds: what is refused, with the reason.
        what: the object is.
        key: of the object that has its kind.
    """

    def check(value: Any) -> Any:  # noqa: ANN401  any JSON value
        kind = value.get(key) if isinstance(value, dict) else None
        if isinstance(kind, str) and kind in kinds:
            raise ValueError(f"a {what} of {key} {kind!r} is not served: {kinds[kind]}")
        return value

    return BeforeValidator(check)


class TextPart(WireModel):
    """A text."""

    type: Literal["text"]
    text: str


class ImageURL(WireModel):
    """Where a picture is."""

    url: str = Field(description="A data URL; http and https where the server allows the host.")
    detail: Detail | None = Field(
        default=None, description="How finely it is read; one for all of them."
    )


class ImagePart(WireModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


_served_part = refusing(REFUSED_PARTS, "part")
AnyPart = Annotated[TextPart | ImagePart, Field(discriminator="type"), _served_part]
Texts = str | Annotated[list[Annotated[TextPart, _served_part]], Field(min_length=1)]
Parts = str | Annotated[list[AnyPart], Field(min_length=1)]


class SystemMessage(WireModel):
    """What the model is told by who runs it; `developer` is the newer name."""

    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None


class UserMessage(WireModel):
    """What the user says or shows."""

    role: Literal["user"]
    content: Parts
    name: str | None = None


class CalledFunction(WireModel):
    """A function with arguments."""

    name: str
    arguments: str = Field(description="JSON object.")
    parsed_arguments: Any = Field(
        default=None, description="What a client made of them; `arguments` is read."
    )


REFUSED_TOOLS: Final = {"custom": "a tool is a function with a JSON schema"}
served_tool = refusing(REFUSED_TOOLS, "tool")


class PastCall(WireModel):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = Field(default=None, description="Left from a stream; the order counts.")


class AssistantMessage(WireModel):
    """What the model said; the fields that it answers with come back without harm."""

    role: Literal["assistant"]
    content: str | list[Annotated[TextPart, _served_part]] | None = None
    name: str | None = None
    tool_calls: list[Annotated[PastCall, served_tool]] | None = None
    reasoning_content: str | None = Field(
        default=None, description="Its thinking before the answer."
    )
    parsed: Any = Field(default=None, description="What a client made of the content.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None


class ToolMessage(WireModel):
    """What a call gave."""

    role: Literal["tool"]
    tool_call_id: str
    content: Parts
    name: str | None = None


REFUSED_ROLES: Final = {"function": "replaced by the role tool"}
Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
    refusing(REFUSED_ROLES, "message", "role"),
]


# fields of messages that clients put there, or that are put elsewhere
_CALL: Final[dict[str, Any]] = {"index": True, "function": {"parsed_arguments": True}}
_UNREAD: Final[dict[str, Any]] = {
    "content": True,
    "annotations": True,
    "parsed": True,
    "tool_calls": {"__all__": _CALL},
}


class Images(Protocol):
    """Where pictures come from."""

    async def fetch(self, source: str) -> bytes:
        """The bytes of a picture. Raises `RequestRejected` where it may not or cannot be had."""
        ...


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as the engine takes them.

    Attributes:
        messages: with `{"type": "image"}` for each picture.
        images: encoded pictures, in the order of these.
        detail: how finely they are read; None where nothing was said.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[bytes, ...]
    detail: Detail | None


async def conversation(messages: Sequence[Message], images: Images | None) -> Conversation:
    """Messages for the engine, their pictures fetched.

    Pictures in results of tools stand in a message of the user's after the results: chat templates
    have a place for them there alone.

    Args:
        messages: what the client sent.
        images: where pictures come from; None for a model that reads none.

    Raises:
        RequestRejected: 400, if a picture cannot be had, or they differ in their detail.
    """
    pictures: list[tuple[str, ImageURL]] = []
    out: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if shown and not isinstance(message, ToolMessage):
            out.append({"role": "user", "content": shown})
            shown = []
        content, parts = message.content, []
        if isinstance(content, list):
            urls = [(j, part.image_url) for j, part in enumerate(content) if part.type != "text"]
            pictures += [(f"messages[{i}].content[{j}].image_url.url", url) for j, url in urls]
            parts = [_part(part) for part in content]
        turn = message.model_dump(exclude_none=True, exclude=_UNREAD)
        if isinstance(message, ToolMessage) and parts:
            shown += [part for part in parts if part["type"] == "image"]
            parts = [part for part in parts if part["type"] == "text"]
            content = content if parts else ""
        out.append(turn | {"content": parts or content})
    if shown:
        out.append({"role": "user", "content": shown})
    fetched = tuple([await _fetched(images, where, url) for where, url in pictures])
    return Conversation(tuple(out), fetched, _one_detail(pictures))


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


async def _fetched(images: Images | None, where: str, url: ImageURL) -> bytes:
    if images is None:
        raise RequestRejected(
            f"{where}: the model reads no images; use another model, or send text alone",
            param=where,
        )
    try:
        return await images.fetch(url.url)
    except RequestRejected as error:
        error.param = error.param or where
        raise


def _one_detail(pictures: Sequence[tuple[str, ImageURL]]) -> Detail | None:
    details = {url.detail or "auto": where for where, url in pictures}
    if len(details) > 1:
        raise RequestRejected(
            f"the images differ in their detail: {sorted(details)}; give all of them one",
            param=pictures[-1][0].removesuffix("url") + "detail",
        )
    return next((url.detail for _, url in pictures if url.detail), None)
