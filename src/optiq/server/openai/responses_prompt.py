"""A body of `/v1/responses` -> the job that the engine gets."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from fastapi import Request

from optiq.engine.grammar import Grammar
from optiq.errors import RequestRejected
from optiq.server.asking import BUDGETS, call, check_can_think, check_named, fetched, function
from optiq.server.jobs import GenerateJob, ToolChoice
from optiq.server.openai.responses_body import (
    AllowedTools,
    ChosenFunction,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputImage,
    InputText,
    Item,
    JsonObjectFormat,
    JsonSchemaFormat,
    MessageItem,
    OutputText,
    ReasoningItem,
    ResponsesBody,
)
from optiq.server.service import Service
from optiq.server.wire import note_ignored

LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED: Final = "reasoning.encrypted_content"
_MARK: Final = "optiq:"


def sealed(thought: str) -> str:
    """Thinking as `encrypted_content`, which is no secret: clients send it back as it is."""
    return _MARK + base64.b64encode(thought.encode("utf-8", "surrogatepass")).decode()


def unsealed(content: str) -> str | None:
    """What `sealed` was given; None if another server wrote it."""
    if not content.startswith(_MARK):
        return None
    try:
        return base64.b64decode(content.removeprefix(_MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


async def job_of(request: Request, service: Service, body: ResponsesBody) -> GenerateJob:
    """The job that a body asks for.

    Raises:
        RequestRejected: 404 for a model that is not there, 400 naming what cannot be honoured.
    """
    model = service.resolve(body.model)
    conversation = Conversation.of(body)
    effort = body.reasoning.effort if body.reasoning else None
    thinking = effort not in {None, "none"}
    if thinking:
        check_can_think(service, model, "reasoning.effort")
    if conversation.unread:
        note_ignored(request, "input.encrypted_content")
    tools, choice, named = _tools(body)
    return GenerateJob(
        model,
        tuple(conversation.messages),
        images=await fetched(request, [image.image_url for image in conversation.images]),
        image_detail=_detail(conversation.images),
        tools=tools,
        tool_choice=choice,
        function=named,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking=thinking,
        thinking_budget=BUDGETS[effort] if effort and thinking else None,
        grammar=_grammar(body),
        sampling=_sampling(body),
    )


def _sampling(body: ResponsesBody) -> dict[str, Any]:
    wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    given = {
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": True if wants_logprobs else None,
        "top_logprobs": body.top_logprobs or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _grammar(body: ResponsesBody) -> Grammar | None:
    match body.text.format if body.text else None:
        case JsonObjectFormat():
            return Grammar("json_object")
        case JsonSchemaFormat(schema_=schema):
            return Grammar("json_schema", schema)
    return None


def _tools(
    body: ResponsesBody,
) -> tuple[tuple[dict[str, Any], ...], ToolChoice, str | None]:
    """The tools that the model sees, whether it has to call, and which one."""
    tools = tuple(
        function(tool.name, tool.description, tool.parameters, tool.strict)
        for tool in body.tools or ()
    )
    wanted = body.tool_choice
    if wanted is None or isinstance(wanted, str):
        if wanted == "required" and not tools:
            raise RequestRejected(
                "tool_choice: 'required' asks for a call, but there are no tools",
                param="tool_choice",
            )
        return tools, wanted or "auto", None
    if isinstance(wanted, ChosenFunction):
        check_named(wanted.name, tools, "tool_choice.name")
        return tools, "required", wanted.name
    return _allowed(tools, wanted), wanted.mode, None


def _allowed(tools: Sequence[dict[str, Any]], wanted: AllowedTools) -> tuple[dict[str, Any], ...]:
    names = {one.name for one in wanted.tools}
    for name in sorted(names):
        check_named(name, tools, "tool_choice.tools")
    return tuple(tool for tool in tools if tool["function"]["name"] in names)


def _detail(images: Sequence[InputImage]) -> Any:  # noqa: ANN401  a detail of GenerateJob
    """The one detail of all pictures."""
    wanted = {image.detail for image in images if image.detail}
    if len(wanted) > 1:
        raise RequestRejected(
            f"input: pictures with details {sorted(wanted)}; give all of them the same",
            param="input",
        )
    return next(iter(wanted), None)


@dataclasses.dataclass
class Conversation:
    """Items as the engine reads them.

    Attributes:
        messages: OpenAI chat style.
        images: pictures, in the order of their parts.
        unread: whether there was thinking that another server encrypted.
    """

    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    images: list[InputImage] = dataclasses.field(default_factory=list)
    unread: bool = False
    _called: set[str] = dataclasses.field(default_factory=set)
    _waiting: list[InputText | InputImage] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, body: ResponsesBody) -> Conversation:
        """The conversation of a body; without input, a user's turn with nothing in it.

        Raises:
            RequestRejected: 400, if an output has no call.
        """
        made = cls()
        if body.instructions:
            made._add("system", body.instructions)
        if isinstance(body.input, list):
            for i, item in enumerate(body.input):
                made._item(item, f"input[{i}]")
            made._show()
        else:
            made._add("user", body.input or "")
        if not any(message["role"] != "system" for message in made.messages):
            made._add("user", "")
        return made

    def _add(self, role: str, content: Any, **rest: object) -> None:  # noqa: ANN401
        self.messages.append({"role": role, "content": content, **rest})

    def _item(self, item: Item, where: str) -> None:
        if not isinstance(item, FunctionCallOutputItem):
            self._show()
        match item:
            case MessageItem(role="assistant"):
                self._said(item)
            case MessageItem():
                self._add(item.role, self._parts(item.content))
            case FunctionCallItem():
                self._called.add(item.call_id)
                calls = self._answer("tool_calls").setdefault("tool_calls", [])
                calls.append(call(item.name, item.arguments, item.call_id))
            case FunctionCallOutputItem():
                self._result(item, where)
            case ReasoningItem():
                self._thought(item)

    def _answer(self, key: str) -> dict[str, Any]:
        """The assistant's message that a part of that kind belongs to."""
        order = ("reasoning_content", "content", "tool_calls")
        last = self.messages[-1] if self.messages else {}
        later = order[order.index(key) :] if key != "tool_calls" else ()
        if last.get("role") != "assistant" or any(last.get(name) for name in later):
            self._add("assistant", "")
        return self.messages[-1]

    def _said(self, item: MessageItem) -> None:
        parts = item.content
        if isinstance(parts, list) and any(isinstance(part, InputImage) for part in parts):
            raise RequestRejected("input: the assistant's messages have no pictures", param="input")
        texts = (
            [parts]
            if isinstance(parts, str)
            else [part.text for part in parts if isinstance(part, InputText | OutputText)]
        )
        self._answer("content")["content"] = "".join(texts)

    def _thought(self, item: ReasoningItem) -> None:
        thought = "".join(part.text for part in item.content or ())
        if not thought and item.encrypted_content:
            found = unsealed(item.encrypted_content)
            self.unread |= found is None
            thought = found or ""
        if thought:
            self._answer("reasoning_content")["reasoning_content"] = thought

    def _result(self, item: FunctionCallOutputItem, where: str) -> None:
        """A message of its own; its pictures are shown after all results, by the user."""
        if item.call_id not in self._called:
            raise RequestRejected(
                f"{where}.call_id: no earlier function_call has the id {item.call_id!r}",
                param=f"{where}.call_id",
            )
        parts: Sequence[InputText | InputImage] = (
            [InputText(type="input_text", text=item.output)]
            if isinstance(item.output, str)
            else item.output
        )
        text = "\n".join(part.text for part in parts if isinstance(part, InputText))
        self._add("tool", text, tool_call_id=item.call_id)
        pictures = [part for part in parts if isinstance(part, InputImage)]
        if pictures:
            label = f"Pictures of the result {item.call_id}:"
            self._waiting += [InputText(type="input_text", text=label), *pictures]

    def _show(self) -> None:
        if self._waiting:
            self._add("user", self._parts(self._waiting))
            self._waiting = []

    def _parts(
        self, content: str | Sequence[InputText | InputImage | OutputText]
    ) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        parts: list[dict[str, Any]] = []
        for part in content:
            if isinstance(part, InputImage):
                parts.append({"type": "image"})
                self.images.append(part)
            else:
                parts.append({"type": "text", "text": part.text})
        return parts
