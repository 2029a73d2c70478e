"""Calls of other families: mlx-lm finds the parser, which reads a whole block."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optiq.engine.grammar.functions import json_block
from optiq.engine.text import backend_of
from optiq.engine.tools.base import CallError, CallFormat, CallWriter, Tool
from optiq.upstream import TokenizerWrapper

_JSON_PARSER = ".json_tools"  # of blocks that are JSON
_Parser = Callable[[str, Any], Any]
_PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError)


def call_format(tokenizer: TokenizerWrapper) -> CallFormat | None:
    """The format that mlx-lm sees in the template or the vocabulary, if any."""
    parser: _Parser | None = tokenizer.tool_parser
    if parser is None or not tokenizer.tool_call_start_tokens:
        return None
    is_json = parser.__module__.endswith(_JSON_PARSER)
    around = _line_break(tokenizer) if is_json else ""
    breaks = backend_of(tokenizer).encode(around, add_special_tokens=False).ids
    return CallFormat(
        "mlx_lm",
        tuple(tokenizer.tool_call_start_tokens),
        tuple(tokenizer.tool_call_end_tokens or ()),
        lambda writer, tools: WholeBlockReader(writer, tools, parser),
        (lambda functions: json_block(functions, around)) if is_json else None,
        breaks[0] if len(breaks) == 1 else None,
    )


def _line_break(tokenizer: TokenizerWrapper) -> str:
    """The line break behind the marker, where the template writes one."""
    template = str(tokenizer.chat_template).replace("\\n", "\n")
    return "\n" if f"{tokenizer.tool_call_start}\n" in template else ""


class WholeBlockReader:
    """Reads a block when it is complete.

    Args:
        writer: is told of the calls.
        tools: OpenAI function schemas.
        parser: (text of a block, tools) -> a call or a list of calls.
    """

    def __init__(self, writer: CallWriter, tools: Sequence[Tool], parser: _Parser) -> None:
        self._writer = writer
        self._tools = [dict(tool) for tool in tools]
        self._parser = parser
        self._text: list[str] = []

    @property
    def raw(self) -> str:
        """Text of the block."""
        return "".join(self._text)

    def text(self, piece: str) -> None:
        """Ordinary text."""
        self._text.append(piece)

    def special(self, token: int, literal: str) -> None:
        """A special token, which parsers look for as text."""
        self._text.append(literal)

    def close(self) -> None:
        """The block ends here.

        Raises:
            CallError: if the parser finds no call in it.
        """
        try:
            found = self._parser(self.raw, self._tools)
            calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        except _PARSE_ERRORS as error:
            raise CallError(f"no call in the block ({error})") from None
        if not calls:
            raise CallError("no call in the block")
        for name, arguments in calls:
            self._writer.start(name)
            self._writer.write(arguments)
            self._writer.done()
        self._text.clear()


def _call(found: Any) -> tuple[str, str]:  # noqa: ANN401  whatever a parser finds
    """Name and JSON of the arguments."""
    name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise ValueError("no name with arguments")
    return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
