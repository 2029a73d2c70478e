"""A body of Anthropic's -> the job that the engine gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final

from fastapi import Request

from optiq.engine.grammar import Grammar
from optiq.errors import RequestRejected
from optiq.server.anthropic.body import (
    AssistantBlock,
    AssistantTurn,
    CountBody,
    ImageBlock,
    MessagesBody,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingAdaptive,
    ThinkingBlock,
    ThinkingEnabled,
    ToolChoiceTool,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    UserBlock,
)
from optiq.server.asking import (
    BUDGETS,
    call,
    card_of,
    check_can_think,
    check_named,
    data_url,
    fetched,
    function,
)
from optiq.server.jobs import GenerateJob, ToolChoice
from optiq.server.service import Service
from optiq.server.wire import note_ignored

_CHOICES: Final[dict[str, ToolChoice]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


async def job_of(request: Request, service: Service, body: CountBody) -> GenerateJob:
    """The job that a body asks for.

    Raises:
        RequestRejected: 404 for a model that is not there, 400 naming what cannot be honoured.
    """
    model = service.resolve(body.model)
    conversation = Conversation.of(body)
    prefilled = isinstance(body.messages[-1], AssistantTurn)
    thinking, budget = _thinking(service, model, body, prefilled=prefilled)
    note_ignored(request, *_without_effect(request, body, conversation, thinking=thinking))
    tools = tuple(
        function(tool.name, tool.description, tool.input_schema, tool.strict)
        for tool in body.tools or ()
    )
    choice, named = _choice(body, tools)
    single = getattr(body.tool_choice, "disable_parallel_tool_use", None) is True
    wanted = body.output_config.format if body.output_config else None
    return GenerateJob(
        model,
        tuple(conversation.messages),
        images=await fetched(request, conversation.pictures),
        tools=tools,
        tool_choice=choice,
        function=named,
        parallel_tool_calls=not single,
        thinking=thinking,
        thinking_budget=budget,
        continue_final=prefilled,
        grammar=Grammar("json_schema", wanted.schema_) if wanted else None,
        sampling=_sampling(body) if isinstance(body, MessagesBody) else {},
    )


def _sampling(body: MessagesBody) -> dict[str, Any]:
    given = {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": tuple(body.stop_sequences) if body.stop_sequences else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _thinking(
    service: Service, model: str, body: CountBody, *, prefilled: bool
) -> tuple[bool, int | None]:
    """Whether to think first, and with how many tokens at most."""
    match body.thinking:
        case ThinkingEnabled(budget_tokens=budget):
            check_can_think(service, model, "thinking")
            if prefilled:
                raise RequestRejected(
                    "thinking: the last message begins the answer, so that nothing can be thought "
                    "before it; end with a user message, or disable thinking",
                    param="thinking",
                )
            return True, budget
        case ThinkingAdaptive() if card_of(service, model).thinking and not prefilled:
            effort = body.output_config.effort if body.output_config else None
            return True, BUDGETS[effort or "max"]
    return False, None


def _choice(body: CountBody, tools: Sequence[dict[str, Any]]) -> tuple[ToolChoice, str | None]:
    """Whether to call, and which function."""
    wanted = body.tool_choice
    if wanted is None:
        return "auto", None
    if wanted.type in {"any", "tool"} and not tools:
        raise RequestRejected(
            f"tool_choice: {wanted.type!r} asks for a call, but there are no tools",
            param="tool_choice",
        )
    if isinstance(wanted, ToolChoiceTool):
        check_named(wanted.name, tools, "tool_choice.name")
        return "required", wanted.name
    return _CHOICES[wanted.type], None


def _without_effect(
    request: Request, body: CountBody, conversation: Conversation, *, thinking: bool
) -> Iterable[str]:
    """Names of what was given and changes nothing, beside the keys that never do."""
    if "anthropic-beta" in request.headers:
        yield "betas"
    if getattr(body.thinking, "display", None) == "summarized":
        yield "thinking.display"
    if body.output_config and body.output_config.effort and not thinking:
        yield "output_config.effort"
    if conversation.redacted:
        yield "redacted_thinking"


@dataclasses.dataclass
class Conversation:
    """Messages as the engine reads them.

    Attributes:
        messages: OpenAI style.
        pictures: where the pictures are, in the order of their parts.
        redacted: whether there was thinking that cannot be read.
    """

    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: list[str] = dataclasses.field(default_factory=list)
    redacted: bool = False
    _called: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def of(cls, body: CountBody) -> Conversation:
        """The conversation of a body.

        Raises:
            RequestRejected: 400, if a result has no call, or the last call no result.
        """
        made = cls()
        if body.system:
            made._add("system", made._parts(body.system))
        for i, turn in enumerate(body.messages):
            made._turn(turn, f"messages[{i}]")
        if made.messages and made.messages[-1].get("tool_calls"):
            raise RequestRejected(
                "messages: the last one calls a tool; send its tool_result in a user message",
                param="messages",
            )
        return made

    def _add(self, role: str, content: str | list[dict[str, Any]], **rest: object) -> None:
        self.messages.append({"role": role, "content": content, **rest})

    def _turn(self, turn: Turn, where: str) -> None:
        if isinstance(turn.content, str):
            self._add(turn.role, turn.content)
        elif isinstance(turn, AssistantTurn):
            self._assistant(turn.content)
        else:
            self._user(turn.role, turn.content, where)

    def _user(self, role: str, blocks: Sequence[UserBlock], where: str) -> None:
        """Results become messages of their own; their pictures stand in the user's words."""
        spoken: list[TextBlock | ImageBlock] = []
        for i, block in enumerate(blocks):
            if isinstance(block, ToolResultBlock):
                spoken += self._result(block, f"{where}.content[{i}]")
            else:
                spoken.append(block)
        if spoken or not blocks:
            self._add(role, self._parts(spoken))

    def _result(self, block: ToolResultBlock, where: str) -> list[TextBlock | ImageBlock]:
        """Add a result; what of it has no place there."""
        if block.tool_use_id not in self._called:
            raise RequestRejected(
                f"{where}.tool_use_id: no earlier tool_use has the id {block.tool_use_id!r}",
                param=f"{where}.tool_use_id",
            )
        content = block.content or ""
        texts = (
            [content]
            if isinstance(content, str)
            else [part.text for part in content if isinstance(part, TextBlock)]
        )
        text = "\n".join(["Error:", *texts] if block.is_error else texts)
        self._add("tool", text, tool_call_id=block.tool_use_id)
        pictures = [part for part in content if isinstance(part, ImageBlock)]
        label = TextBlock(type="text", text=f"Pictures of the result {block.tool_use_id}:")
        return [label, *pictures] if pictures else []

    def _assistant(self, blocks: Sequence[AssistantBlock]) -> None:
        """One message; its text is in front of its calls, whatever their order was."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for block in blocks:
            match block:
                case TextBlock():
                    texts.append(block.text)
                case ThinkingBlock():
                    thoughts.append(block.thinking)
                case ToolUseBlock():
                    self._called.add(block.id)
                    calls.append(call(block.name, block.input, block.id))
                case RedactedThinkingBlock():
                    self.redacted = True
        rest: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if thought := "".join(thoughts):
            rest["reasoning_content"] = thought
        self._add("assistant", "".join(texts), **rest)

    def _parts(self, content: str | Sequence[TextBlock | ImageBlock]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        parts: list[dict[str, Any]] = []
        for block in content:
            if isinstance(block, TextBlock):
                parts.append({"type": "text", "text": block.text})
            else:
                parts.append({"type": "image"})
                self.pictures.append(_address(block))
        return parts


def _address(block: ImageBlock) -> str:
    source = block.source
    return source.url if source.type == "url" else data_url(source.data, source.media_type)
