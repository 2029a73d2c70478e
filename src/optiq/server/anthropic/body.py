"""Bodies of Anthropic's requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from optiq.server.wire import Body, WireModel, only

_ELSEWHERE = "it runs on Anthropic's machines; only tools with an input_schema are served"


class CacheControl(WireModel):
    """Where a cache may cut; every prefix is cached here anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cacheable(WireModel):
    """What may carry a mark of the cache."""

    cache_control: CacheControl | None = Field(default=None, description="without effect")


class TextBlock(Cacheable):
    """Text."""

    type: Literal["text"]
    text: str
    citations: list[dict[str, Any]] | None = Field(default=None, description="without effect")


class Base64Source(WireModel):
    """A picture in the request."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlSource(WireModel):
    """A picture elsewhere; the server reads it where an allow-list permits."""

    type: Literal["url"]
    url: str


class ImageBlock(Cacheable):
    """A picture."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class ToolUseBlock(Cacheable):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]
    caller: dict[str, Any] | None = Field(default=None, description="without effect")


class ToolResultBlock(Cacheable):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = (
        None
    )
    is_error: bool | None = None


class ThinkingBlock(WireModel):
    """What the model thought; its signature must be there and says nothing."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class RedactedThinkingBlock(WireModel):
    """Thinking of another server's, which cannot be read; without effect."""

    type: Literal["redacted_thinking"]
    data: str


UserBlock = Annotated[TextBlock | ImageBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class UserTurn(WireModel):
    """What the user says, and what calls gave."""

    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantTurn(WireModel):
    """What the model said; as the last message, the beginning of what it will say."""

    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemTurn(WireModel):
    """What the application says in the middle of a conversation."""

    role: Literal["system"]
    content: str | list[TextBlock]


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class Tool(Cacheable):
    """A function that the client runs."""

    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Annotated[Literal["custom"] | None, only("custom", reason=_ELSEWHERE)] = None
    strict: bool | None = None
    eager_input_streaming: bool | None = Field(
        default=None, description="without effect: arguments are streamed as they are written"
    )
    allowed_callers: Annotated[
        list[Literal["direct"]] | None, only(["direct"], reason="only the model itself calls")
    ] = None
    defer_loading: Annotated[
        Literal[False] | None, only(False, reason="there is no search among tools")
    ] = None


class ToolChoiceAuto(WireModel):
    """Call or answer, as the model likes."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(WireModel):
    """Call one of the tools at least."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(WireModel):
    """Call that tool."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(WireModel):
    """Call nothing."""

    type: Literal["none"]


ToolChoice = Annotated[
    ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone, Field(discriminator="type")
]

Display = Annotated[
    Literal["summarized", "omitted"] | None,
    Field(
        description="`omitted` leaves the text out; `summarized` is without effect: all is shown"
    ),
]


class ThinkingEnabled(WireModel):
    """Think first, with so many tokens at most."""

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1)
    display: Display = None


class ThinkingAdaptive(WireModel):
    """Think first where the model can; `output_config.effort` limits it."""

    type: Literal["adaptive"]
    display: Display = None


class ThinkingDisabled(WireModel):
    """Answer at once."""

    type: Literal["disabled"]


Thinking = Annotated[
    ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")
]


class JsonFormat(WireModel):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    """What the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None,
        description="limits adaptive thinking; without effect where the model does not think",
    )
    format: JsonFormat | None = None


class CountBody(Body):
    """What `/v1/messages/count_tokens` reads."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "billing_policy",
            "cache_control",
            "messages[].content[].cache_control",
            "messages[].content[].caller",
            "messages[].content[].citations",
            "messages[].content[].content[].cache_control",
            "messages[].content[].content[].citations",
            "speed",
            "system[].cache_control",
            "system[].citations",
            "tools[].cache_control",
            "tools[].eager_input_streaming",
            "user_profile_id",
            "workspace_id",
        }
    )
    refused: ClassVar[dict[str, str]] = {
        "compaction": "conversations are not shortened; send what the model is to read",
        "context_management": "conversations are not edited; send what the model is to read",
        "mcp_servers": "the server calls no other servers; give tools and run them yourself",
        "output_format": "it has become output_config.format; send that",
    }

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    billing_policy: dict[str, Any] | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesBody(CountBody):
    """What `/v1/messages` reads."""

    without_effect: ClassVar[frozenset[str]] = CountBody.without_effect | {
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
    }
    refused: ClassVar[dict[str, str]] = CountBody.refused | {
        "container": "there are no containers and no skills",
        "fallbacks": "the model that is named answers, or none does",
        "fallback_credit_token": "there are no fallbacks to pay for",
        "thread": "nothing is kept between requests; send the conversation",
    }

    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
