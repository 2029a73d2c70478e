"""What is known about the request that is being served, and about what went wrong in it."""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import time
import traceback
from typing import Final, Literal

from optiq import settings
from optiq.errors import RequestRejected

Outcome = Literal["ok", "rejected", "failed", "cancelled"]

OTHER_ROUTE: Final = "other"
_log = logging.getLogger("optiq.server")


@dataclasses.dataclass
class Record:
    """What is known about a request.

    Attributes:
        id: unique, or as the client named it.
        method: of HTTP.
        path: as it was sent, without query.
        route: pattern of the route; `OTHER_ROUTE` where there is none.
        status: of HTTP; 0 before there is one.
        error: what ended a stream in mid-answer.
        disconnected: the client went away before the answer was complete.
        complete: the answer was sent in full.
        prompt_tokens: read for it.
        completion_tokens: written for it.
        ttft_s: from the request to the first token; None where there was none.
        duration_s: from the request to the end of the answer.
    """

    id: str
    method: str
    path: str
    route: str = OTHER_ROUTE
    status: int = 0
    error: Exception | None = None
    disconnected: bool = False
    complete: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    duration_s: float = 0.0
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def outcome(self) -> Outcome:
        """How it ended; every request ends in one way."""
        status = self.status
        if self.error is not None:
            status = self.error.http_status if isinstance(self.error, RequestRejected) else 500
        if status == 499 or self.disconnected:
            return "cancelled"
        if status >= 500 or status == 0 or not self.complete:
            return "failed"
        return "rejected" if status >= 400 else "ok"


current: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)
"""The record of the request that is being served."""


def log_fault(error: Exception, what: str) -> None:
    """Log an exception that nobody expected: where it came from, and, to debug, what it says.

    Messages of exceptions quote values, and those may be of a prompt.
    """
    if record := current.get():
        record.error = error
    if settings.load().debug:
        _log.error("%s", what, exc_info=error)
    else:
        frames = "".join(traceback.format_tb(error.__traceback__))
        name = type(error).__name__
        _log.error("%s: %s (OPTIQ_DEBUG=1 shows its message)\n%s", what, name, frames.rstrip())
