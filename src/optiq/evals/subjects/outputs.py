"""Reasoning, text and native tool calls of what a chat model wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optiq.evals.task import Response, ToolCall
from optiq.upstream import TextStateMachine, TokenizerWrapper, make_text_state_machine

# what the parsers of mlx-lm raise for a text that is no call
_PARSE_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError)


def parts(
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    output: str,
    tools: Sequence[Mapping[str, Any]],
) -> tuple[Response, str]:
    """Split an output at the markers of its family.

    Args:
        tokenizer: the model's, with mlx-lm's parser of tool calls where it has one.
        prompt: ids of the prompt, which may have begun the reasoning already.
        output: what the model wrote, markers included.
        tools: the schemas that were offered.

    Returns:
        A response without reasoning, and the reasoning. Calls are parsed where functions were
        offered and the family has a parser; a call that cannot be parsed stays in the text.
    """
    state = make_text_state_machine(tokenizer).make_state(_initial(tokenizer, prompt))
    state, segments = TextStateMachine.split(state, output)
    _, rest, _ = TextStateMachine.flush(state)
    segments[-1] = (segments[-1][0], segments[-1][1] + rest)
    reasoning = "".join(piece for name, piece in segments if name == "reasoning")
    if not tools or not tokenizer.has_tool_calling:
        text = "".join(
            _as_written(tokenizer, piece) if name == "tool" else piece
            for name, piece in segments
            if name != "reasoning"
        )
        return Response(text.strip() if reasoning else text), reasoning
    text = "".join(piece for name, piece in segments if name not in {"reasoning", "tool"})
    calls: list[ToolCall] = []
    for piece in [piece for name, piece in segments if name == "tool"]:
        try:
            calls += _calls(tokenizer.tool_parser(piece, list(tools)))
        except _PARSE_ERRORS:
            text += _as_written(tokenizer, piece)
    return Response(text.strip(), tuple(calls)), reasoning


def _initial(tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> str:
    """The state the prompt ends in: templates may open the reasoning themselves."""
    if tokenizer.response_initial_state is not None:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return "normal"
    ids = list(prompt)
    opened, closed = tokenizer.rfind_think_start(ids), tokenizer.rfind_think_end(ids)
    return "reasoning" if opened > closed else "normal"


def _as_written(tokenizer: TokenizerWrapper, call: str) -> str:
    """A call between its markers."""
    return f"{tokenizer.tool_call_start}{call}{tokenizer.tool_call_end or ''}"


def _calls(parsed: Any) -> list[ToolCall]:  # noqa: ANN401  a dict or a list of them
    """Calls of what a parser returns.

    Raises:
        TypeError: if it is no call.
        KeyError: if it lacks a name.
        ValueError: if its arguments are no JSON.
    """
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict) or not isinstance(call["name"], str):
            raise TypeError("no call")
        calls.append(ToolCall(call["name"], arguments))
    return calls
