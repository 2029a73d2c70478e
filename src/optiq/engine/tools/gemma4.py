"""Gemma-4's calls: `call:NAME{key:<|"|>text<|"|>,n:3,list:[1,2]}` between two special tokens.

The quote is one token, so text between two of them needs no escapes and is passed on as it comes.
Read with tolerance: space anywhere between parts, keys in quotes, a comma too many, several calls
in one block.
"""
# ruff: noqa: B901  what a coroutine returns is the value of `yield from`

from __future__ import annotations

import enum
import json
from collections.abc import Generator, Sequence

from optiq.engine.grammar.gemma4 import gemma_block
from optiq.engine.text import ids_of
from optiq.engine.tools.base import CallError, CallFormat, CallWriter, Tool
from optiq.engine.tools.schema import Schema, bare_json, quoted_json
from optiq.upstream import TokenizerWrapper

_START, _END, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_DEEPEST = 64  # objects and lists inside each other


class _Mark(enum.Enum):
    QUOTE = _QUOTE
    END = "the end"


_Symbol = str | _Mark  # one character, or a mark
_Reading = Generator[None, _Symbol, None]


def call_format(tokenizer: TokenizerWrapper) -> CallFormat | None:
    """The format, if the tokenizer has its three tokens."""
    ids = ids_of(tokenizer, _START, _END, _QUOTE)
    if ids is None:
        return None
    start, end, quote = ids
    return CallFormat(
        "gemma4",
        (start,),
        (end,),
        lambda writer, tools: GemmaReader(writer, tools, quote),
        lambda functions: gemma_block(functions, quote),
    )


class GemmaReader:
    """Reads one block, a character or a quote at a time.

    Args:
        writer: is told of the calls.
        tools: OpenAI function schemas, which say what bare values are.
        quote: id of the token around strings.
    """

    def __init__(self, writer: CallWriter, tools: Sequence[Tool], quote: int) -> None:
        self._writer = writer
        self._tools = tools
        self._quote = quote
        self._raw: list[str] = []
        self._ahead: _Symbol | None = None
        self._reading = self._block()
        next(self._reading)

    @property
    def raw(self) -> str:
        """Text of the block that is part of no complete call."""
        return "".join(self._raw)

    def text(self, piece: str) -> None:
        """Ordinary text.

        Raises:
            CallError: if no call can come of it.
        """
        for at, character in enumerate(piece):
            self._raw.append(character)
            try:
                self._send(character)
            except CallError:
                self._raw.append(piece[at + 1 :])
                raise

    def special(self, token: int, literal: str) -> None:
        """The quote, or another special token, which is text here.

        Raises:
            CallError: if no call can come of it.
        """
        if token == self._quote:
            self._raw.append(literal)
            self._send(_Mark.QUOTE)
        else:
            self.text(literal)

    def close(self) -> None:
        """The block ends here.

        Raises:
            CallError: if it is not complete.
        """
        self._send(_Mark.END)

    def _send(self, symbol: _Symbol) -> None:
        try:
            self._reading.send(symbol)
        except StopIteration:
            pass

    def _block(self) -> _Reading:
        calls = 0
        while True:
            yield from self._spaces(",;" if calls else "")
            if (yield from self._peek()) is _Mark.END:
                if not calls:
                    raise CallError("the block is empty")
                return
            for character in "call:":
                yield from self._expect(character)
            name = yield from self._until("{", "the name of a function")
            self._writer.start(name)
            yield from self._object(Schema.of_function(self._tools, name), 1)
            self._writer.done()
            self._raw.clear()
            calls += 1

    def _object(self, schema: Schema, depth: int) -> _Reading:
        yield from self._enter("{", depth)
        first = True
        while True:
            yield from self._spaces()
            if (yield from self._peek()) == "}":
                break
            key = yield from self._key()
            start = "" if first else ", "
            self._writer.write(f"{start}{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._value(schema.property(key), depth)
            first = False
            if not (yield from self._goes_on("}")):
                break
        yield from self._leave("}")

    def _list(self, schema: Schema, depth: int) -> _Reading:
        yield from self._enter("[", depth)
        first = True
        while True:
            yield from self._spaces()
            if (yield from self._peek()) == "]":
                break
            self._writer.write("" if first else ", ")
            yield from self._value(schema.items(), depth)
            first = False
            if not (yield from self._goes_on("]")):
                break
        yield from self._leave("]")

    def _key(self) -> Generator[None, _Symbol, str]:
        if (yield from self._peek()) is not _Mark.QUOTE:
            key = yield from self._until(":", "a key")
        else:
            yield from self._take()
            key = yield from self._quoted()
            yield from self._spaces()
        yield from self._expect(":")
        return key

    def _value(self, schema: Schema, depth: int) -> _Reading:
        yield from self._spaces()
        ahead = yield from self._peek()
        if ahead is _Mark.QUOTE:
            yield from self._take()
            yield from self._string(schema.types())
        elif ahead == "{":
            yield from self._object(schema, depth + 1)
        elif ahead == "[":
            yield from self._list(schema, depth + 1)
        else:
            text = yield from self._until(",}]", "a value")
            self._writer.write(bare_json(text, schema.types()))

    def _string(self, types: frozenset[str] | None) -> _Reading:
        if types is not None and "string" not in types:  # what it is shows at its end
            text = yield from self._quoted()
            self._writer.write(quoted_json(text, types))
            return
        self._writer.write('"')
        while True:
            symbol = yield from self._take()
            if symbol is _Mark.QUOTE:
                break
            self._writer.write(_escaped(symbol))
        self._writer.write('"')

    def _quoted(self) -> Generator[None, _Symbol, str]:
        """Text up to the next quote."""
        text: list[str] = []
        while (symbol := (yield from self._take())) is not _Mark.QUOTE:
            text.append(_character(symbol))
        return "".join(text)

    def _until(self, ends: str, what: str) -> Generator[None, _Symbol, str]:
        """Text without quotes up to one of the characters, which is left."""
        misplaced = "" if ends == "{" else "{}[],"
        text: list[str] = []
        while True:
            symbol = yield from self._peek()
            if isinstance(symbol, str) and symbol in ends:
                break
            text.append(_character((yield from self._take())))
            if text[-1] in misplaced:
                raise CallError(f"{text[-1]!r} in {what}")
        if not (whole := "".join(text).strip()):
            raise CallError(f"{what} is missing")
        return whole

    def _goes_on(self, end: str) -> Generator[None, _Symbol, bool]:
        """Whether a comma follows; otherwise the end does."""
        yield from self._spaces()
        symbol = yield from self._peek()
        if symbol == ",":
            yield from self._take()
            return True
        if symbol != end:
            raise CallError(f"neither ',' nor {end!r} after a value")
        return False

    def _enter(self, bracket: str, depth: int) -> _Reading:
        if depth > _DEEPEST:
            raise CallError(f"more than {_DEEPEST} values inside each other")
        yield from self._expect(bracket)
        self._writer.write(bracket)

    def _leave(self, bracket: str) -> _Reading:
        yield from self._expect(bracket)
        self._writer.write(bracket)

    def _expect(self, character: str) -> _Reading:
        symbol = yield from self._take()
        if symbol != character:
            raise CallError(f"no {character!r} where one must be")

    def _spaces(self, others: str = "") -> _Reading:
        while isinstance(ahead := (yield from self._peek()), str) and (
            ahead.isspace() or ahead in others
        ):
            yield from self._take()

    def _peek(self) -> Generator[None, _Symbol, _Symbol]:
        if self._ahead is None:
            self._ahead = yield
        return self._ahead

    def _take(self) -> Generator[None, _Symbol, _Symbol]:
        symbol = yield from self._peek()
        if symbol is _Mark.END:
            raise CallError("the call does not end")
        self._ahead = None
        return symbol


def _character(symbol: _Symbol) -> str:
    if isinstance(symbol, _Mark):
        raise CallError("a quote where none can be")
    return symbol


def _escaped(symbol: _Symbol) -> str:
    return json.dumps(_character(symbol), ensure_ascii=False)[1:-1]
