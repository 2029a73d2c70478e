"""Parameters that several routes take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from optiq.engine.grammar import Grammar
from optiq.server.wire import Body, WireModel

MAX_CHOICES = 128
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopText = Annotated[str, Field(min_length=1)]
TokenKey = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(WireModel):
    """What a stream has besides the answer."""

    include_usage: bool | None = Field(
        default=None, description="End with a chunk that has the usage."
    )
    include_obfuscation: bool | None = Field(default=None, description="Padding; there is none.")


class TextFormat(WireModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(WireModel):
    """One JSON object."""

    type: Literal["json_object"]


class JsonSchema(WireModel):
    """A schema with a name."""

    name: str = Field(description="Has no effect on the answer.")
    description: str | None = Field(default=None, description="Has no effect on the answer.")
    schema_: dict[str, Any] | bool | None = Field(
        default=None,
        alias="schema",
        description="JSON Schema of the answer; without one, any object.",
    )
    strict: bool | None = Field(default=None, description="Any value: the schema always binds.")


class JsonSchemaFormat(WireModel):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(WireModel):
    """Extension: a text that a pattern matches from end to end."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1, description="Regular expression.")


class ChoiceFormat(WireModel):
    """Extension: one of some texts."""

    type: Literal["choice"]
    choices: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="The texts."
    )


class LarkFormat(WireModel):
    """Extension: a text of a grammar."""

    type: Literal["lark"]
    grammar: str = Field(min_length=1, description="Grammar in the Lark form of llguidance.")


Format = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | LarkFormat,
    Field(discriminator="type"),
]


def grammar_of(wanted: Format | None) -> Grammar | None:
    """What the answer has to be; None for any text."""
    match wanted:
        case JsonObjectFormat():
            return Grammar("json_object")
        case JsonSchemaFormat():
            schema = wanted.json_schema.schema_
            return Grammar("json_object") if schema is None else Grammar("json_schema", schema)
        case RegexFormat():
            return Grammar("regex", wanted.pattern)
        case ChoiceFormat():
            return Grammar("choice", tuple(wanted.choices))
        case LarkFormat():
            return Grammar("lark", wanted.grammar)
        case _:
            return None


class GenerationBody(Body):
    """What every generation takes."""

    without_effect = frozenset({"user", "stream_options.include_obfuscation"})

    model: str | None = Field(
        default=None, description="Name of a model; the first one without it."
    )
    stream: bool | None = Field(default=None, description="Send the answer as it is written.")
    stream_options: StreamOptions | None = Field(
        default=None, description="`include_usage`: end a stream with a chunk that has the usage."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Number of answers; 1.")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="0 takes the most likely token; default: the checkpoint's.",
    )
    top_p: float | None = Field(
        default=None, ge=0, le=1, description="Probability that is kept; default: the checkpoint's."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        default=None, description="A text, or up to 16, that end the answer; not part of it."
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Off the logits of tokens that the answer has."
    )
    frequency_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Off the logits, for every time the answer has the token.",
    )
    logit_bias: dict[TokenKey, Bias] | None = Field(
        default=None,
        description="Token ids, in digits, with what is added to their logits (-100 to 100).",
    )
    response_format: Format | None = Field(
        default=None,
        description="What the answer must be, enforced by a grammar: `text`, `json_object`, "
        "`json_schema`; extensions: `regex` (`pattern`), `choice` (`choices`), `lark` (`grammar`).",
    )
    top_k: Count | None = Field(
        default=None,
        description="Extension: number of most likely tokens that are kept; 0 keeps all.",
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Extension: keep tokens at least as likely as this share of the likeliest.",
    )
    repetition_penalty: float | None = Field(
        default=None,
        ge=0.001,
        le=1000,
        description="Extension: above 1, repeated tokens are less likely.",
    )
    user: str | None = Field(default=None, description="Name of the user.")

    def sampling(self, **rest: Any) -> dict[str, Any]:  # noqa: ANN401  values of any settings
        """Settings of the sampler that were given, with `rest` of the route."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        bias = self.logit_bias
        values = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if bias is None else {int(key): bias[key] for key in bias},
            "seed": self.seed,
            "stop": tuple(stop) if stop else None,
        }
        return {name: value for name, value in (values | rest).items() if value is not None}

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
