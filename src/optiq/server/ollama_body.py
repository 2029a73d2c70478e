"""Bodies of Ollama's requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from optiq.server.wire import Body, WireModel, only

_IGNORED = "without effect"
_ONE = only(1.0, 1, reason="use min_p")
_PENALTY = "the penalties look at the whole text"

Think = bool | Literal["low", "medium", "high", "max"] | None
Stop = str | list[Annotated[str, Field(min_length=1)]] | None
Pictures = list[str] | None


class CalledFunction(WireModel):
    """What is called, and with what."""

    name: str = Field(min_length=1)
    arguments: dict[str, Any]
    index: int | None = Field(default=None, description=_IGNORED)
    description: str | None = Field(default=None, description=_IGNORED)


class OllamaCall(WireModel):
    """A call that the model made."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(WireModel):
    """What somebody said, or what a call gave."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Pictures = Field(default=None, description="base64; of the user alone")
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class OllamaFunction(WireModel):
    """What can be called."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OllamaTool(WireModel):
    """A function that the client runs."""

    type: Literal["function"] | None = None
    function: OllamaFunction


class Options(WireModel):
    """How tokens are chosen; what is about memory and threads has no effect."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    num_predict: int | None = Field(
        default=None, ge=-2, lt=2**31, description="-1 and -2: as many as the context holds"
    )
    stop: Stop = None
    repeat_penalty: float | None = Field(default=None, ge=1e-3, le=1e3)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_last_n: Annotated[Literal[-1] | None, only(-1, reason=_PENALTY)] = None
    penalize_newline: Annotated[
        Literal[True] | None, only(True, reason="line breaks are tokens as all others")
    ] = None
    tfs_z: Annotated[float | None, _ONE] = Field(default=None, ge=1, le=1)
    typical_p: Annotated[float | None, _ONE] = Field(default=None, ge=1, le=1)
    mirostat: Annotated[Literal[0] | None, only(0, reason="use min_p")] = None
    mirostat_eta: float | None = Field(default=None, description=_IGNORED)
    mirostat_tau: float | None = Field(default=None, description=_IGNORED)
    f16_kv: bool | None = None
    logits_all: bool | None = None
    low_vram: bool | None = None
    main_gpu: int | None = None
    num_batch: int | None = None
    num_ctx: int | None = None
    num_gpu: int | None = None
    num_keep: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    use_mlock: bool | None = None
    use_mmap: bool | None = None
    vocab_only: bool | None = None


class OllamaBody(Body):
    """What both ways to generate read."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "keep_alive",
            "options.f16_kv",
            "options.logits_all",
            "options.low_vram",
            "options.main_gpu",
            "options.mirostat_eta",
            "options.mirostat_tau",
            "options.num_batch",
            "options.num_ctx",
            "options.num_gpu",
            "options.num_keep",
            "options.num_thread",
            "options.numa",
            "options.use_mlock",
            "options.use_mmap",
            "options.vocab_only",
        }
    )

    model: str
    stream: bool | None = Field(default=None, description="true unless it is false")
    format: Literal["", "json"] | dict[str, Any] | None = Field(
        default=None, description="`json`, or a schema"
    )
    options: Options | None = None
    think: Think = Field(default=None, description="no thinking unless it is asked for")
    keep_alive: str | int | float | None = None


class ChatBody(OllamaBody):
    """What `/api/chat` reads."""

    without_effect: ClassVar[frozenset[str]] = OllamaBody.without_effect | {
        "messages[].tool_calls[].function.description",
        "messages[].tool_calls[].function.index",
    }
    refused: ClassVar[dict[str, str]] = {
        "logprobs": "use /v1/chat/completions",
        "top_logprobs": "use /v1/chat/completions",
    }

    messages: list[OllamaMessage] = Field(min_length=1)
    tools: list[OllamaTool] | None = None


class GenerateBody(OllamaBody):
    """What `/api/generate` reads."""

    refused: ClassVar[dict[str, str]] = ChatBody.refused | {
        "context": "nothing is kept between requests; use /api/chat",
        "suffix": "text cannot be filled in",
        "template": "the template is the model's; use raw",
    }

    prompt: str = Field(min_length=1)
    system: str | None = None
    images: Pictures = Field(default=None, description="base64")
    raw: bool | None = Field(default=None, description="go on with the prompt itself")


class ShowBody(Body):
    """What `/api/show` reads."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"verbose"})

    model: str
    verbose: bool | None = None
