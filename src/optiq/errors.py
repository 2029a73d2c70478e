"""The whole exception tree.

OptiqError
├── UsageError           wrong flag, file or value given by the user                  exit 2
│   ├── UnsupportedModel     a source optiq cannot read, named                        exit 2
│   ├── BudgetInfeasible     no plan fits; carries the smallest feasible size         exit 2
│   └── ArtifactMismatch     an artifact of another source, rounding or newer schema  exit 2
├── RequestRejected      a request refused by the server; carries the HTTP status
└── EngineFailure        the machine or optiq itself failed (disk full, memory)       exit 1
    └── TargetMissed         everything ran, but a measured target was not met        exit 1

A message says what is wrong, the value seen, and what to do.
"""

from __future__ import annotations


class OptiqError(Exception):
    """Base of every error optiq raises on purpose; shown without a traceback."""

    exit_status = 1


class UsageError(OptiqError):
    """Something the user gave cannot be used."""

    exit_status = 2


class UnsupportedModel(UsageError):
    """The source is of a kind that optiq cannot read or measure."""


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
    """

    def __init__(self, message: str, *, http_status: int = 400) -> None:
        super().__init__(message)
        self.http_status = http_status


class EngineFailure(OptiqError):
    """The machine or optiq failed while doing what was asked."""


class TargetMissed(EngineFailure):
    """A result was written, but a target that was asked for is not met."""
