"""What an answer is asked for, before it is put into tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from optiq.engine.grammar import Grammar
from optiq.engine.grammar.planner import Demand, ToolChoice
from optiq.engine.messages import ChatOptions, Message, Tool
from optiq.models.vision.gemma4 import Picture
from optiq.models.vision.patches import Detail


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt as it was given, and how it is to be answered; see `Engine.generate`."""

    prompt: str | Sequence[int] | Sequence[Message]
    images: Sequence[Picture] = ()
    tools: Sequence[Tool] = ()
    thinking: bool = False
    thinking_budget: int | None = None
    continue_final: bool = False
    image_detail: int | Detail | None = None
    tool_choice: ToolChoice = "auto"
    function: str | None = None
    parallel_tool_calls: bool = True
    grammar: Grammar | None = None

    @property
    def chat(self) -> ChatOptions:
        """How messages are put to the model."""
        return ChatOptions(self.tools, self.thinking, self.continue_final)

    @functools.cached_property
    def demand(self) -> Demand:
        """What the answer has to be.

        Raises:
            UsageError: if that contradicts itself.
        """
        return Demand(
            self.grammar,
            self.tools,
            self.tool_choice,
            self.function,
            self.parallel_tool_calls,
            self.thinking,
            self.thinking_budget,
        )

    @property
    def heard_tools(self) -> Sequence[Tool]:
        """Functions whose calls are read in the answer."""
        return () if self.tool_choice == "none" else self.tools
