"""What the HTTP side asks of the engine process, and what comes back: plain data, no arrays.

Everything here is picklable. The engine process alone knows tokens, templates and models; the HTTP
side alone knows protocols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from optiq.engine.events import Event
from optiq.engine.grammar import Grammar

ToolChoice = Literal["none", "auto", "required"]


@dataclasses.dataclass(frozen=True)
class GenerateJob:
    """Answers to write to one prompt.

    Attributes:
        model: name of a loaded or loadable model, as `Service.resolve` gives it.
        prompt: raw text, token ids, or messages (OpenAI style; image parts are
            `{"type": "image"}`).
        images: encoded pictures as they came, in the order of their parts.
        image_detail: `low`, `auto`, `high`, or soft tokens at most.
        tools: OpenAI function schemas.
        tool_choice: whether they may or must be called; `function` names the one that must.
        function: see `tool_choice`.
        parallel_tool_calls: whether more than one call may be written.
        thinking: let the model think first.
        thinking_budget: tokens of it at most; then its end is written.
        continue_final: go on with the last message, which is the assistant's.
        grammar: what the answer, after the thinking, has to be.
        sampling: fields of `engine.sampling.Sampling`; what is missing is the checkpoint's.
        choices: number of answers.
        echo: report the prompt itself, with log-probabilities if `sampling` asks for them.
    """

    model: str
    prompt: str | tuple[int, ...] | tuple[Mapping[str, Any], ...]
    images: tuple[bytes, ...] = ()
    image_detail: Literal["low", "auto", "high"] | int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = "auto"
    function: str | None = None
    parallel_tool_calls: bool = True
    thinking: bool = False
    thinking_budget: int | None = None
    continue_final: bool = False
    grammar: Grammar | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: int = 1
    echo: bool = False


@dataclasses.dataclass(frozen=True)
class EmbedJob:
    """Texts to embed.

    Attributes:
        model: as in `GenerateJob`.
        inputs: texts, or token ids, each.
        dimensions: first so many of the numbers, normalized again; None for all.
    """

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None


@dataclasses.dataclass(frozen=True)
class CountJob:
    """A prompt to put into tokens: of `prompt`, what `GenerateJob` would read."""

    prompt: GenerateJob


@dataclasses.dataclass(frozen=True)
class DetokenizeJob:
    """Tokens to put into text."""

    model: str
    tokens: tuple[int, ...]


Job = GenerateJob | EmbedJob | CountJob | DetokenizeJob


# -- answers ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of a text.

    Attributes:
        token: id.
        data: bytes that it stands for; a character may lie over several tokens.
        logprob: in nats; None where nobody asked, and for the first of a prompt.
        top: the most likely tokens at its place: id, bytes, log-probability; largest first.
    """

    token: int
    data: bytes
    logprob: float | None = None
    top: tuple[tuple[int, bytes, float], ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text; what is no whole character is U+FFFD."""
        return self.data.decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Started:
    """The prompt was understood and waits or is read; the first thing of every answer.

    Attributes:
        prompt_tokens: number of them, soft tokens of images among them.
        prompt: its tokens, where the job asked for `echo`.
    """

    prompt_tokens: int
    prompt: tuple[Piece, ...] = ()


@dataclasses.dataclass(frozen=True)
class Written:
    """Tokens of one answer that were drawn; the text they make follows as events.

    They replace `events.Tokens`, which has no text.
    """

    choice: int
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Said:
    """An event of one answer; never `events.Tokens`. Its `Finished` is the last of the choice."""

    choice: int
    event: Event


Reply = Started | Written | Said


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embeddings: one list of numbers an input, L2 norm 1, and tokens read in all."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """A prompt as tokens."""

    tokens: tuple[Piece, ...]
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Detokenized:
    """Tokens as text."""

    text: str


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """A model that is served.

    Attributes:
        name: in requests.
        created: Unix time of its directory.
        loaded: whether it is in memory.
        context: tokens of prompt and answer at most; None where unknown or not loaded yet.
        vision: whether it reads images.
        tools: whether its template takes tools.
        thinking: whether it can think first.
        chat: whether it has a chat template.
        drafter: kind of its drafter, if it has one.
        size_bytes: of its weights' files.
        bpw: stored bits per weight, where its artifact says so.
    """

    name: str
    created: int
    loaded: bool
    context: int | None
    vision: bool
    tools: bool
    thinking: bool
    chat: bool
    drafter: str | None
    size_bytes: int
    bpw: float | None
