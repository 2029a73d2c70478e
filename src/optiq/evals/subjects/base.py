"""What a run asks of a model under test, and what it gets back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from optiq.artifacts import SubjectInfo
from optiq.evals.task import Prompt, Response


@dataclasses.dataclass(frozen=True)
class Ask:
    """One question to a model.

    Attributes:
        prompt: what to answer.
        key: seed of a sampled answer, 0..2^63 - 1; the answer depends on nothing else.
    """

    prompt: Prompt
    key: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model, or the way to it, gave back.

    Attributes:
        response: what is scored; None where the harness failed.
        reasoning: what the model thought before its answer.
        looped: the output, reasoning included, ends in a cycle.
        failure: why there is no response.
    """

    response: Response | None
    reasoning: str = ""
    looped: bool = False
    failure: str = ""


class Subject(Protocol):
    """A model under test."""

    @property
    def info(self) -> SubjectInfo:
        """What logs tell of it."""

    @property
    def has_template(self) -> bool:
        """Whether it can be asked in chat form."""

    @property
    def context(self) -> int | None:
        """Longest prompt with its answer, in tokens; None where it is not known."""

    @property
    def wave(self) -> int | None:
        """How many questions are asked together; None for any number.

        Where it is a number, answers depend at rounding level on the company they are asked in, and
        a run that goes on asks whole waves again.
        """

    def num_tokens(self, prompt: Prompt) -> int | None:
        """Tokens of a prompt; None where they are not known."""

    def check(self, prompt: Prompt) -> None:
        """Refuse a kind of prompt that the model cannot be asked.

        Raises:
            UsageError: says what is missing.
        """

    def seconds(self, asks: Sequence[Ask]) -> float | None:
        """Measured estimate of the time the questions take at most; None where it is not known."""

    def answer(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        """Answers with the position of their question, as they are ready.

        Raises:
            UsageError: if the model cannot be asked so.
            EngineFailure: if the machine, or the server behind the URL, fails.
        """
