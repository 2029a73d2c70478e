"""The thinking before an answer: which tokens enclose it, and its text.

Where a family has a name after its first token (`<|channel>thought` and a new line), the name is
no part of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from optiq.engine.text import ids_of
from optiq.upstream import TokenizerWrapper

_LONGEST_NAME = 32  # characters of a channel's name; more is text


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """Token ids around the thinking.

    Attributes:
        start: ids before it.
        end: ids after it; what a thinking budget writes to close it.
        named: whether a name and a new line follow `start`.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    named: bool = False

    def open_tail(self, prompt: Sequence[int]) -> list[int] | None:
        """Tokens of the prompt inside a thinking that it leaves open; None if it leaves none."""
        opened, closed = _last(prompt, self.start), _last(prompt, self.end)
        if opened < 0 or closed > opened:
            return None
        return list(prompt[opened + len(self.start) :])


def reasoning_format(tokenizer: TokenizerWrapper) -> ReasoningFormat | None:
    """The thinking tokens of a model; None if it has none."""
    channel = ids_of(tokenizer, "<|channel>", "<channel|>")
    if channel is not None:
        return ReasoningFormat(channel[:1], channel[1:], named=True)
    if not tokenizer.has_thinking:
        return None
    return ReasoningFormat(tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens))


class ReasoningText:
    """Text of one thinking without the name, the line break before it and those after it."""

    def __init__(self, *, named: bool) -> None:
        self._name: str | None = "" if named else None
        self._begun = False
        self._held = ""

    def push(self, text: str) -> str:
        """What can be shown now."""
        if self._name is not None:
            self._name += text
            name, line_break, rest = self._name.partition("\n")
            if line_break and len(name) <= _LONGEST_NAME:
                text = rest
            elif len(self._name) > _LONGEST_NAME:
                text = self._name
            else:
                return ""
            self._name = None
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        return shown


def _last(tokens: Sequence[int], part: tuple[int, ...]) -> int:
    """Where `part` stands last in the tokens; -1 for nowhere."""
    width = len(part)
    for at in range(len(tokens) - width, -1, -1):
        if tokens[at] == part[0] and tuple(tokens[at : at + width]) == part:
            return at
    return -1
