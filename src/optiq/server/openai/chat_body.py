"""The body of /v1/chat/completions, and the job that it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from optiq.errors import RequestRejected
from optiq.server.asking import BUDGETS, Effort, function
from optiq.server.jobs import GenerateJob, ModelCard, ToolChoice
from optiq.server.openai.messages import (
    REFUSED_PARTS,
    REFUSED_ROLES,
    REFUSED_TOOLS,
    Conversation,
    Message,
    refusing,
    served_tool,
)
from optiq.server.openai.parameters import Count, GenerationBody, grammar_of
from optiq.server.wire import WireModel

_Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class FunctionSchema(WireModel):
    """A function that may be called."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON Schema of its arguments."
    )
    strict: bool | None = None


class Tool(WireModel):
    """A tool."""

    type: Literal["function"]
    function: FunctionSchema


class NamedFunction(WireModel):
    """The name of a function."""

    name: str


class NamedTool(WireModel):
    """The function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


REFUSED_CHOICES: Final = {
    "allowed_tools": "give the tools that are allowed, and no others",
    "custom": "a tool is a function with a JSON schema",
}
Choice = Annotated[
    Literal["none", "auto", "required"] | NamedTool, refusing(REFUSED_CHOICES, "choice")
]


class TemplateOptions(WireModel):
    """Variables of the chat template."""

    enable_thinking: bool | None = Field(default=None, description="Let the model think first.")


class ChatBody(GenerationBody):
    """A conversation to go on with."""

    without_effect = GenerationBody.without_effect | {
        "messages[].parsed",
        "messages[].tool_calls[].function.parsed_arguments",
        "messages[].tool_calls[].index",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
    refused: ClassVar[dict[str, str]] = {
        "audio": "the models speak text alone; leave it out",
        "functions": "replaced by tools; give them there",
        "function_call": "replaced by tool_choice; give it there",
        "moderation": "nothing here moderates; leave it out",
        "web_search_options": "nothing is searched; leave it out",
    }
    refused_values: ClassVar[dict[str, str]] = {
        **{f"messages[].content[].type={kind}": why for kind, why in REFUSED_PARTS.items()},
        **{f"tools[].type={kind}": why for kind, why in REFUSED_TOOLS.items()},
        "modalities=audio": "the models speak text alone",
        "verbosity other than medium": "a model does not know it; ask for it in a message",
        **{f"tool_choice.type={kind}": why for kind, why in REFUSED_CHOICES.items()},
        **{f"messages[].role={kind}": why for kind, why in REFUSED_ROLES.items()},
    }

    messages: list[Message] = Field(
        min_length=1,
        description="Roles system, developer, user, assistant and tool; text, and images of "
        "users and tools. `reasoning_content` of the assistant is read.",
    )
    max_completion_tokens: Count | None = Field(
        default=None,
        description="Tokens of an answer at most; without it, the rest of the context.",
    )
    max_tokens: Count | None = Field(
        default=None, description="Older name of max_completion_tokens."
    )
    logprobs: bool | None = Field(
        default=None, description="Report log-probabilities of all tokens."
    )
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Of so many of the most likely tokens too; needs logprobs.",
    )
    tools: list[Annotated[Tool, served_tool]] | None = Field(
        default=None, description="Functions that the model may call."
    )
    tool_choice: Choice | None = Field(
        default=None,
        description="Whether it may or must call one, or which; enforced by a grammar.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: one call an answer at most; enforced."
    )
    reasoning_effort: Effort | None = Field(
        default=None,
        description="`none` answers at once; more lets the model think first, for so long: "
        + ", ".join(f"{name} {limit or 'without limit'}" for name, limit in BUDGETS.items())
        + " (tokens).",
    )
    chat_template_kwargs: TemplateOptions | None = Field(
        default=None, description="Extension: `enable_thinking`, the same as a yes or no."
    )
    thinking_budget: Count | None = Field(
        default=None, description="Extension: tokens of the thinking at most; then it is ended."
    )
    continue_final_message: bool | None = Field(
        default=None,
        description="Extension: go on with the last message, which is the assistant's.",
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Extension: the opposite of continue_final_message, where both are given.",
    )
    modalities: list[Literal["text"]] | None = Field(default=None, description='`["text"]`.')
    verbosity: Literal["medium"] | None = Field(default=None, description="`medium`.")
    metadata: dict[str, str] | None = Field(default=None, description="Notes of the client.")
    prediction: dict[str, Any] | None = Field(
        default=None, description="A guess at the answer; it would save time, not change anything."
    )
    prompt_cache_key: str | None = Field(
        default=None, description="Equal prefixes are found by content."
    )
    prompt_cache_options: dict[str, Any] | None = Field(
        default=None, description="The server decides what is kept."
    )
    prompt_cache_retention: str | None = Field(
        default=None, description="The server decides how long."
    )
    safety_identifier: str | None = Field(default=None, description="Name of the user.")
    service_tier: str | None = Field(default=None, description="There is one.")
    store: bool | None = Field(default=None, description="Nothing is stored.")

    @property
    def thinks(self) -> bool:
        """Whether the model may think first."""
        template = self.chat_template_kwargs
        if template is not None and template.enable_thinking is not None:
            return template.enable_thinking
        return self.reasoning_effort not in {None, "none"}

    @property
    def budget(self) -> int | None:
        """Tokens of thinking at most."""
        if self.thinking_budget is None and self.thinks and self.reasoning_effort is not None:
            return BUDGETS[self.reasoning_effort]
        return self.thinking_budget

    def functions(self) -> tuple[dict[str, Any], ...]:
        """The tools, as templates and the engine read them."""
        schemas = [tool.function for tool in self.tools or ()]
        return tuple(function(s.name, s.description, s.parameters, s.strict) for s in schemas)


def job_of(body: ChatBody, card: ModelCard, talk: Conversation) -> GenerateJob:
    """What the engine is asked.

    Raises:
        RequestRejected: 400, if parameters do not fit together or the model cannot honour one.
    """
    for param, message in _faults(body, card):
        raise RequestRejected(f"{param}: {message}", param=param)
    choice, named = _tool_choice(body)
    limit = body.max_completion_tokens
    return GenerateJob(
        model=card.name,
        prompt=talk.messages,
        images=talk.images,
        image_detail=talk.detail,
        tools=body.functions(),
        tool_choice=choice,
        function=named,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking=body.thinks,
        thinking_budget=body.budget,
        continue_final=bool(body.continue_final_message),
        grammar=grammar_of(body.response_format),
        sampling=body.sampling(
            max_tokens=body.max_tokens if limit is None else limit,
            logprobs=body.logprobs,
            top_logprobs=body.top_logprobs,
        ),
        choices=body.n or 1,
    )


def _tool_choice(body: ChatBody) -> tuple[ToolChoice, str | None]:
    if isinstance(body.tool_choice, NamedTool):
        return "required", body.tool_choice.function.name
    return body.tool_choice or "auto", None


def _faults(body: ChatBody, card: ModelCard) -> Iterator[tuple[str, str]]:
    """Parameters that cannot be honoured beside the others, with the reason."""
    if len({body.max_tokens, body.max_completion_tokens} - {None}) > 1:
        yield "max_tokens", "differs from max_completion_tokens; give one of them"
    if body.top_logprobs and not body.logprobs:
        yield "top_logprobs", "needs logprobs: true"
    yield from _tool_faults(body)
    yield from _thinking_faults(body, card)
    prompted, continued = body.add_generation_prompt, bool(body.continue_final_message)
    if prompted is not None and prompted == continued:
        yield "add_generation_prompt", "has to be the opposite of continue_final_message"
    if continued and body.messages[-1].role != "assistant":
        yield "continue_final_message", "the last message is not the assistant's"


def _tool_faults(body: ChatBody) -> Iterator[tuple[str, str]]:
    names = [tool.function.name for tool in body.tools or ()]
    if len(set(names)) < len(names):
        yield "tools", f"two functions have one name; there are {sorted(names)}"
    choice, named = _tool_choice(body)
    if named is not None and named not in names:
        yield "tool_choice", f"there is no function {named!r} among the tools {sorted(names)}"
    if choice == "required" and not names:
        yield "tool_choice", "a call is required, and there are no tools; give some"


def _thinking_faults(body: ChatBody, card: ModelCard) -> Iterator[tuple[str, str]]:
    template = body.chat_template_kwargs
    wanted = template.enable_thinking if template else None
    name = "reasoning_effort" if wanted is None else "chat_template_kwargs.enable_thinking"
    if wanted is not None and body.reasoning_effort is not None:
        if wanted != (body.reasoning_effort != "none"):
            yield "reasoning_effort", "says the opposite of chat_template_kwargs.enable_thinking"
    if body.thinks and not card.thinking:
        yield name, f"the model {card.name!r} cannot think first; leave it out"
    if body.thinking_budget is not None and not body.thinks:
        yield "thinking_budget", "the model does not think in this request; set reasoning_effort"
