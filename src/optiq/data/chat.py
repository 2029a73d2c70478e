"""Conversations -> token ids, through the model's own chat template.

Nothing of a conversation is dropped: what a template has no place for (tools, tool calls, a system
turn) is written into the turns it does have. What a template can do is found by rendering a probe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from optiq.errors import UsageError
from optiq.upstream import TokenizerWrapper

Message = dict[str, Any]
Tool = dict[str, Any]

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
_SYSTEM_PROBE: list[Message] = [
    {"role": "system", "content": "Zebra"},
    {"role": "user", "content": "Hello"},
]
_TOOL_PROBE_MARKS = ("quagga", "okapi", "dugong")
_TOOL_PROBE: list[Message] = [
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "quagga", "arguments": {"a": "okapi"}}}
        ],
    },
    {"role": "tool", "name": "quagga", "content": "dugong"},
    {"role": "assistant", "content": "Done"},
]
_TOOL_PROBE_TOOLS: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": "quagga",
            "description": "Look a word up",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]


def render(
    tokenizer: TokenizerWrapper, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> list[int]:
    """Token ids of a finished conversation.

    Tools and tool calls go through the template where it writes them out, else into the system
    message and the turns as text; a system message goes in front of the first user turn where the
    template has no system role. A model without a template gets `User: ...` paragraphs.

    Args:
        tokenizer: the model's.
        messages: OpenAI-style turns; `arguments` of tool calls are objects.
        tools: OpenAI function schemas.

    Raises:
        UsageError: if the template refuses the conversation.
    """
    if not tokenizer.has_chat_template:
        ids: list[int] = tokenizer.encode(_paragraphs(tools_as_text(messages, tools)))
        return ids
    uses_tools = bool(tools) or any(_about_tools(message) for message in messages)
    if uses_tools and writes_tools(tokenizer):
        try:
            return _tokens(tokenizer, _with_call_ids(messages), tools)
        except _TEMPLATE_ERRORS:
            pass  # templates that know tools may still refuse, say, two calls in one turn
    turns = tools_as_text(messages, tools) if uses_tools else [dict(m) for m in messages]
    if turns[0]["role"] == "system" and not writes_system(tokenizer):
        turns = _merged(system_as_user(turns))
    try:
        return _tokens(tokenizer, turns, ())
    except _TEMPLATE_ERRORS as error:
        roles = [turn["role"] for turn in turns]
        raise UsageError(
            f"the chat template of the model refuses a conversation of {roles}: {error}; "
            "change the messages, or give the text itself as 'text'"
        ) from None


def question(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    thinking: bool = False,
) -> str:
    """Text of a conversation that waits for the model's turn, through its chat template.

    A system message goes in front of the first user turn where the template has no system role.

    Args:
        tokenizer: the model's; it has a template.
        messages: OpenAI-style turns.
        tools: OpenAI function schemas, for a template that `offers_tools`.
        thinking: ask the template to let the model think, where it knows how.

    Raises:
        UsageError: if the template refuses the conversation.
    """
    turns = _with_call_ids(messages)
    if turns[0]["role"] == "system" and not writes_system(tokenizer):
        turns = _merged(system_as_user(turns))
    try:
        text: str = tokenizer.apply_chat_template(
            turns,
            tools=list(tools) or None,
            add_generation_prompt=True,
            enable_thinking=thinking,
            tokenize=False,
        )
    except _TEMPLATE_ERRORS as error:
        roles = [turn["role"] for turn in turns]
        raise UsageError(
            f"the chat template of the model refuses a conversation of {roles}: {error}"
        ) from None
    return text


def offers_tools(tokenizer: TokenizerWrapper) -> bool:
    """Whether the template tells the model of the functions it may call."""
    text = _probe(tokenizer, _TOOL_PROBE[:1], _TOOL_PROBE_TOOLS)
    return text is not None and "quagga" in text and "Look a word up" in text


def _tokens(
    tokenizer: TokenizerWrapper, messages: Sequence[Message], tools: Sequence[Tool]
) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        add_generation_prompt=False,
        enable_thinking=False,
        tokenize=True,
    )
    return ids


def _probe(
    tokenizer: TokenizerWrapper, messages: list[Message], tools: list[Tool] | None
) -> str | None:
    """The rendered text, or None where the template refuses."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, enable_thinking=False, tokenize=False
        )
    except _TEMPLATE_ERRORS:
        return None
    return text


def writes_system(tokenizer: TokenizerWrapper) -> bool:
    """Whether the template writes a system turn."""
    text = _probe(tokenizer, _SYSTEM_PROBE, None)
    return text is not None and "Zebra" in text


def writes_tools(tokenizer: TokenizerWrapper) -> bool:
    """Whether the template writes schemas, calls and results; a part is no use."""
    with_schemas = _probe(tokenizer, _with_call_ids(_TOOL_PROBE), _TOOL_PROBE_TOOLS)
    if with_schemas is None or "Look a word up" not in with_schemas:
        return False
    return all(mark in with_schemas for mark in _TOOL_PROBE_MARKS)


def _about_tools(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with an id on every call and its result, which some templates ask for."""
    out: list[Message] = []
    waiting: list[str] = []
    count = 0
    for message in messages:
        turn = dict(message)
        if turn.get("tool_calls"):
            calls = []
            for call in turn["tool_calls"]:
                count += 1
                calls.append({"id": f"call{count:05d}"} | call)
            waiting = [call["id"] for call in calls]
            turn["tool_calls"] = calls
        elif turn["role"] == "tool" and waiting:
            turn.setdefault("tool_call_id", waiting.pop(0))
        out.append(turn)
    return out


def tools_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Turns of system, user and assistant alone, that say the same in text.

    Schemas go into the system message, calls into the assistant's turns and results into user
    turns; neighbours of one role are joined.
    """
    turns: list[Message] = []
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = f"You can call these functions, described as JSON schemas:\n{lines}"
        turns.append({"role": "system", "content": text})
    for message in messages:
        parts = [message.get("content") or ""]
        if message["role"] == "tool":
            parts = [f"<tool_response>\n{parts[0]}\n</tool_response>"]
        for call in message.get("tool_calls") or ():
            function = call["function"]
            shown = {"name": function["name"], "arguments": function["arguments"]}
            text = json.dumps(shown, ensure_ascii=False)
            parts.append(f"<tool_call>\n{text}\n</tool_call>")
        role = "user" if message["role"] == "tool" else message["role"]
        turns.append({"role": role, "content": "\n".join(part for part in parts if part)})
    if tools and len(turns) > 1 and turns[1]["role"] == "system":
        turns[0], turns[1] = turns[1], turns[0]
    return _merged(turns)


def system_as_user(messages: Sequence[Message]) -> list[Message]:
    """The messages with a leading system turn turned into a user turn."""
    return [{"role": "user", "content": messages[0]["content"]}, *messages[1:]]


def _merged(turns: Sequence[Message]) -> list[Message]:
    """Neighbouring turns of one role joined: many templates want roles to alternate."""
    out: list[Message] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1] = {**turn, "content": f"{out[-1]['content']}\n\n{turn['content']}"}
        else:
            out.append(dict(turn))
    return out


def _paragraphs(turns: Sequence[Message]) -> str:
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
