"""The body of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from optiq.server.asking import Effort
from optiq.server.wire import Body, WireModel, only

_STATELESS = "nothing is kept between requests; send the whole conversation as input"
_OTHER_TOOLS = "only tools of type function are served; give functions and run them yourself"
_IGNORED = "without effect"

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(WireModel):
    """Text."""

    type: Literal["input_text"]
    text: str


class InputImage(WireModel):
    """A picture: a data URL, or an address that the server may read."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "high", "auto"] | None = None


class OutputText(WireModel):
    """Text that the model wrote."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(default=None, description=_IGNORED)
    logprobs: list[Any] | None = Field(default=None, description=_IGNORED)


Part = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]
ResultPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class MessageItem(WireModel):
    """What somebody said."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: str | None = Field(default=None, description=_IGNORED)
    status: Status | None = Field(default=None, description=_IGNORED)
    phase: Literal["commentary", "final_answer"] | None = Field(default=None, description=_IGNORED)


class FunctionCallItem(WireModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str = Field(description="one JSON object")
    id: str | None = Field(default=None, description=_IGNORED)
    status: Status | None = Field(default=None, description=_IGNORED)


class FunctionCallOutputItem(WireModel):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ResultPart]
    id: str | None = Field(default=None, description=_IGNORED)
    status: Status | None = Field(default=None, description=_IGNORED)


class ReasoningText(WireModel):
    """Text of thinking."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(WireModel):
    """Text about thinking."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(WireModel):
    """What the model thought: `content`, else what `encrypted_content` of this server holds."""

    type: Literal["reasoning"]
    id: str | None = Field(default=None, description=_IGNORED)
    summary: list[SummaryText] | None = Field(default=None, description=_IGNORED)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = Field(default=None, description=_IGNORED)


def _kind_of_item(value: object) -> str | None:
    """Names the model of an item; messages need not say what they are."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "message" if kind is None else kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind_of_item,
        custom_error_type="unknown_item",
        custom_error_message="only message, function_call, function_call_output and reasoning are "
        "served; give the item itself where it is kept elsewhere",
    ),
]


class FunctionTool(WireModel):
    """A function that the client runs."""

    type: Annotated[Literal["function"], only("function", reason=_OTHER_TOOLS)]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(WireModel):
    """A function by name."""

    type: Literal["function"]
    name: str


class AllowedTools(WireModel):
    """Some of the tools: the model sees no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction] = Field(min_length=1)


class TextFormat(WireModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(WireModel):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(WireModel):
    """JSON of a schema; `strict` or not, it is kept to."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = Field(default=None, description=_IGNORED)
    strict: bool | None = Field(default=None, description="either way the schema is kept to")


Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class TextConfig(WireModel):
    """What the answer is to be."""

    format: Format | None = None
    verbosity: Annotated[
        Literal["medium"] | None, only("medium", reason="length cannot be steered; say it in words")
    ] = None


class ReasoningConfig(WireModel):
    """How much to think first."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="without effect: what was thought is given in full"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="as summary"
    )


class StreamOptions(WireModel):
    """How the answer is streamed."""

    include_obfuscation: bool | None = Field(default=None, description=_IGNORED)


class CacheOptions(WireModel):
    """What is to be kept of a prompt, which the server decides."""

    model_config = ConfigDict(extra="allow")

    prewarm: Annotated[
        Literal[False] | None, only(False, reason="a prompt is read to be answered; leave it out")
    ] = None


class ResponsesBody(Body):
    """What `/v1/responses` reads."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "input[].content[].annotations",
            "input[].content[].logprobs",
            "input[].id",
            "input[].phase",
            "input[].status",
            "input[].summary",
            "max_tool_calls",  # of tools that OpenAI runs
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning.generate_summary",
            "reasoning.summary",
            "safety_identifier",
            "service_tier",
            "store",
            "text.format.description",
            "stream_options.include_obfuscation",
            "user",
        }
    )
    refused: ClassVar[dict[str, str]] = {
        "access_programs": "there are no such programs",
        "background_options": _STATELESS,
        "context_management": "conversations are not shortened; send what the model is to read",
        "conversation": _STATELESS,
        "image": "pictures are read as they are",
        "moderation": "no answer is moderated",
        "previous_response_id": _STATELESS,
        "prompt": "no prompts are kept here; send instructions and input",
    }

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ChosenFunction | AllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: Annotated[Literal[False] | None, only(False, reason=_STATELESS)] = None
    truncation: Annotated[
        Literal["disabled"] | None, only("disabled", reason="nothing is cut off; give `disabled`")
    ] = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
