"""What a benchmark is: items, how they are asked, how answers are scored.

A task knows no model: it makes prompts and scores responses, wherever these come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import OptiqError


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: as in the data files; the row number (from 0) where they have none.
        fields: everything that prompt and score need, JSON types only.
    """

    id: str
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that the model is to go on with one assistant turn.

    Attributes:
        messages: OpenAI style, ending with a user or tool turn.
        tools: OpenAI function schemas offered in the model's native format.
        max_tokens: longest answer.
        thinking: whether the model may think first; None for what the options say.
        images: files of the pictures, in the order of their parts in the messages; the parts have
            digests of what they show.
    """

    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool | None = None
    images: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Raw text that the model is to continue, until one of the stop strings."""

    text: str
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """Raw text and the continuations whose log-likelihoods are compared.

    Attributes:
        shared: beginning that many items have in common: its KV cache is computed once.
        own: the rest of the text.
        options: continuations, e.g. ` A`, ` B`.
        chat: the text is a user message that the template wraps, the options begin its answer.
    """

    shared: str
    own: str
    options: tuple[str, ...]
    chat: bool = False


Prompt = Chat | Continuation | Choice


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a function, by name, with decoded arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Response:
    """What came back for a prompt.

    Attributes:
        text: the answer without reasoning and, where the harness parsed them, without tool calls.
        tool_calls: parsed native calls; None where nothing has parsed the text for calls.
        logprobs: log-likelihood of every option of a `Choice`, in nats; None for other prompts.
        num_tokens: generated tokens.
        truncated: the answer was cut by `max_tokens`.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    num_tokens: int = 0
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of one response.

    Attributes:
        value: 0 to 1; None only where the harness itself failed, with the reason in `detail`.
        parsed: what was read out of the response, JSON types.
        detail: more, JSON types, e.g. `instructions` of IFEval.
    """

    value: float | None
    parsed: Any = None
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: its name on the command line.
        title: its name on a card.
        version: changes whenever prompts, data or scoring do; scores of two versions are not
            compared.
        variant: options that change what is asked, as a suffix of the version (`5-shot`, `chat`);
            the empty text for the default.
        dataset: items in a fixed order, of the size the options ask for.
        solver: the prompt of an item.
        scorer: the score of a response to an item.
        needs_execution: scoring runs code that the model wrote.
        ready: raises what would make scoring fail, before anything is asked.
        files: keys of `optiq.data.benchmarks.FILES` that the items are made from.
        groups: kinds of parts and the part of each that an item belongs to, for figures by part.
    """

    name: str
    title: str
    version: str
    dataset: Callable[[BenchmarkData, EvalConfig], Sequence[Item]]
    solver: Callable[[Item, EvalConfig], Prompt]
    scorer: Callable[[Item, Response, EvalConfig], Score]
    variant: Callable[[EvalConfig], str] = lambda _config: ""
    needs_execution: bool = False
    ready: Callable[[EvalConfig], None] = lambda _config: None
    files: tuple[str, ...] = ()
    groups: Callable[[Item], Mapping[str, str]] = lambda _item: {}

    def score(self, item: Item, response: Response, config: EvalConfig) -> Score:
        """The score of a response; a scorer that breaks gives no value, and says why.

        Raises:
            OptiqError: what is wrong with more than this response, e.g. a package that is missing.
        """
        try:
            return self.scorer(item, response, config)
        except OptiqError:
            raise
        except Exception as error:  # noqa: BLE001  one broken item must not end a run, nor count as 0
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Score(None, detail={"failure": reason})

    def full_version(self, config: EvalConfig) -> str:
        """Version and variant: what two logs must share to be compared."""
        variant = self.variant(config)
        return f"{self.version}+{variant}" if variant else self.version
