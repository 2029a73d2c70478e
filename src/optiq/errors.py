"""The whole exception tree.

OptiqError
├── UsageError           wrong flag, file or value given by the user                  exit 2
│   ├── UnsupportedModel     a source optiq cannot read, named                        exit 2
│   ├── ContextExceeded      a prompt longer than the context of the model            exit 2
│   ├── BudgetInfeasible     no plan fits; carries the smallest feasible size         exit 2
│   └── ArtifactMismatch     an artifact of another source, rounding or newer schema  exit 2
├── RequestRejected      a request refused by the server; carries the HTTP status
└── EngineFailure        the machine or optiq itself failed (disk full, memory)       exit 1
    └── TargetMissed         everything ran, but a measured target was not met        exit 1

A message says what is wrong, the value seen, and what to do.
"""

from __future__ import annotations

from typing import Any


class OptiqError(Exception):
    """Base of every error optiq raises on purpose; shown without a traceback."""

    exit_status = 1


class UsageError(OptiqError):
    """Something the user gave cannot be used."""

    exit_status = 2


class UnsupportedModel(UsageError):
    """The source is of a kind that optiq cannot read or measure."""


class ContextExceeded(UsageError):
    """The prompt is longer than what the model can read."""


class BudgetInfeasible(UsageError):
    """No plan fits the budget.

    Attributes:
        min_bpw: smallest reachable bits per weight.
        min_size_bytes: bytes of `model*.safetensors` at that plan.
    """

    def __init__(self, message: str, *, min_bpw: float, min_size_bytes: int) -> None:
        super().__init__(message)
        self.min_bpw = min_bpw
        self.min_size_bytes = min_size_bytes


class ArtifactMismatch(UsageError):
    """An artifact belongs to another source, another rounding, or a newer schema."""


class RequestRejected(OptiqError):
    """A request the server refuses.

    Attributes:
        http_status: status code of the answer.
        param: the parameter at fault, as the protocol spells it; None if it is none.
        code: short name of the fault, such as `context_length_exceeded`; None if it has none.
        retry_after_s: when to try again; None where that is not known or does not help.
    """

    def __init__(
        self,
        message: str,
        *,
        http_status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.param, self.code = param, code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Picklable, with everything it carries: it crosses from the engine process."""
        return (_rejected, (str(self), vars(self)))


def _rejected(message: str, values: dict[str, Any]) -> RequestRejected:
    return RequestRejected(message, **values)


class EngineFailure(OptiqError):
    """The machine or optiq failed while doing what was asked."""


class TargetMissed(EngineFailure):
    """A result was written, but a target that was asked for is not met."""
