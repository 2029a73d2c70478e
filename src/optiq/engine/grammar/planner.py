"""What a request asks of its answer -> the guide of the answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from optiq.engine.grammar import Grammar
from optiq.engine.grammar.compiler import Compiler
from optiq.engine.grammar.functions import Function, enforced, functions_of, is_strict
from optiq.engine.grammar.guide import Calling, Calls, Guide, Plan, Thought
from optiq.engine.grammar.masks import Masks
from optiq.engine.output import OutputFormat
from optiq.engine.text import backend_of
from optiq.errors import UsageError
from optiq.upstream import TokenizerWrapper

ToolChoice = Literal["auto", "none", "required"]


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked of an answer.

    Attributes:
        grammar: of the answer.
        tools: OpenAI function schemas.
        tool_choice: whether one of them may or must be called.
        function: name of the one that must be.
        parallel_tool_calls: whether there may be more than one call.
        thinking: whether the model may think first.
        thinking_budget: tokens of the thought at most.

    Raises:
        UsageError: if it contradicts itself.
    """

    grammar: Grammar | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    function: str | None = None
    parallel_tool_calls: bool = True
    thinking: bool = False
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        """Refuse what nothing can honour."""
        budget, names = self.thinking_budget, functions_of(self.tools)
        if self.tool_choice not in {"auto", "none", "required"}:
            raise UsageError(
                f"tool_choice is {self.tool_choice!r}; give auto, none or required, and the name "
                "of a function as `function`"
            )
        if budget is not None and (isinstance(budget, bool) or not 0 <= budget):
            raise UsageError(f"thinking_budget is {budget}; give 0 or more tokens, or None")
        if budget is not None and not self.thinking:
            raise UsageError("a thinking_budget needs thinking; give thinking=True")
        if self.must_call and not self.tools:
            raise UsageError("a call is required, but there are no tools; give tools")
        if self.function is not None and self.tool_choice == "none":
            raise UsageError(f"function is {self.function!r}, but tool_choice is none")
        if self.function is not None and self.function not in names:
            raise UsageError(
                f"function {self.function!r} is not among the tools: {', '.join(names)}"
            )
        if self.must_call and self.grammar is not None:
            raise UsageError(
                "an answer cannot be a required call and obey a grammar too; give one of them"
            )

    @property
    def must_call(self) -> bool:
        """Whether a call must come."""
        return self.tool_choice == "required" or self.function is not None


class Planner:
    """Guides of the answers of one model.

    Args:
        tokenizer: of the model.
        vocab_size: width of its logits.
        stop: tokens that end an answer.
        output: how it writes answers.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        vocab_size: int,
        stop: Collection[int],
        output: OutputFormat,
    ) -> None:
        self._tokenizer, self._output = tokenizer, output
        self._vocab_size, self._stop = vocab_size, frozenset(stop)

    @functools.cached_property
    def compiler(self) -> Compiler:
        """Made when a grammar is first needed, which takes seconds with a large vocabulary."""
        return Compiler(self._tokenizer, self._vocab_size, self._stop)

    @functools.cached_property
    def _masks(self) -> Masks:
        return Masks(self._vocab_size, self._stop)

    def guide(self, demand: Demand, prompt: Sequence[int]) -> Guide | None:
        """The guide of an answer; None where all it asks for is left to the model.

        Args:
            demand: what the answer has to be.
            prompt: what it follows; it may leave a thinking open.

        Raises:
            UsageError: if something cannot be honoured.
        """
        calls = self._calls(demand)
        grammar = demand.grammar
        if grammar is None and calls is None and demand.thinking_budget is None:
            return None
        answer = None if grammar is None else self.compiler.compile(grammar)
        return Guide(Plan(self._thought(demand, prompt), answer, calls), self._masks)

    def _thought(self, demand: Demand, prompt: Sequence[int]) -> Thought | None:
        form = self._output.reasoning
        if form is None:
            if demand.thinking_budget is not None:
                raise UsageError("thinking_budget cannot be honoured: the model marks no thinking")
            return None
        is_open = form.open_tail(prompt) is not None
        return Thought(
            form.start,
            form.end,
            demand.thinking_budget,
            demand.thinking and not is_open,
            is_open,
            self._line_breaks if form.named else None,
        )

    @functools.cached_property
    def _line_breaks(self) -> frozenset[int]:
        pieces = self._output.pieces
        size = backend_of(self._tokenizer).get_vocab_size()
        return frozenset(token for token in range(size) if b"\n" in pieces.bytes_of(token))

    # -- calls -----------------------------------------------------------------------------------

    def _calls(self, demand: Demand) -> Calls | None:
        form = self._output.calls
        if not demand.tools:
            return None
        if form is None:
            if demand.must_call:
                raise UsageError("no call can be required: the model has no format of calls")
            return None
        if demand.tool_choice == "none":
            return Calls(form.start, form.end, Calling.FORBIDDEN)
        several = demand.parallel_tool_calls and demand.function is None
        functions = self._functions(demand)
        if functions is None:
            if demand.grammar is None and demand.thinking_budget is None:
                return None
            return Calls(form.start, form.end, Calling.OFFERED)
        if form.block is None:
            raise UsageError(f"{_asked(demand)} cannot be honoured: {_NO_BLOCK}")
        return Calls(
            form.start,
            form.end,
            Calling.REQUIRED if demand.must_call else Calling.OFFERED,
            self.compiler.lark(form.block(functions), "the grammar of calls"),
            several and bool(form.end),
            form.between,
        )

    def _functions(self, demand: Demand) -> list[Function] | None:
        """Functions that calls obey; None where calls are left to the model."""
        known = functions_of(demand.tools)
        if demand.function is not None:
            return [enforced(known[demand.function])]
        if demand.must_call:
            return [enforced(function) for function in known.values()]
        if demand.parallel_tool_calls and not any(map(is_strict, known.values())):
            return None
        return [
            enforced(function) if is_strict(function) else Function(name, None)
            for name, function in known.items()
        ]


_NO_BLOCK = "the call format of this model cannot be enforced"


def _asked(demand: Demand) -> str:
    """What needs a grammar of calls."""
    if demand.function is not None:
        return f"function {demand.function!r}"
    if demand.must_call:
        return "tool_choice required"
    if not demand.parallel_tool_calls:
        return "parallel_tool_calls=False"
    return "strict functions"
