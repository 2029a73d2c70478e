"""Around every request: its id, its one outcome, one line of log, and an answer whatever happens.

Lines hold no prompts, no answers and no keys.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optiq.server.dialects import answer, rejection
from optiq.server.records import OTHER_ROUTE, Record, current
from optiq.server.wire import IGNORED_HEADER

POLLED: Final = frozenset({"/health", "/ready", "/metrics"})
"""What monitors ask every few seconds: counted, but not logged."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PATH_CHARS: Final = 200
_log = logging.getLogger("optiq.access")


class Access:
    """The outermost middleware.

    Args:
        app: the application.
        done: called with the record of every request that has ended.
    """

    def __init__(self, app: ASGIApp, done: Callable[[Record], None]) -> None:
        self._app, self._done = app, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = _record(scope)
        scope.setdefault("state", {})["request_id"] = record.id
        token = current.set(record)
        watched = _Channel(scope, record, receive, send)
        try:
            await self._app(scope, watched.receive, watched.send)
        except Exception as error:  # noqa: BLE001  the last handler of a request
            if record.status == 0:
                await answer(error, scope)(scope, watched.receive, watched.send)
            else:  # too late for words: the connection is closed in mid-answer
                record.error = rejection(error, scope)
        finally:
            current.reset(token)
            record.duration_s = time.perf_counter() - record.began
            record.route = getattr(scope.get("route"), "path", OTHER_ROUTE)
            self._done(record)
            level = logging.DEBUG if record.path in POLLED else logging.INFO
            _log.log(level, "%s", record.path, extra={"record": record})


class _Channel:
    """What passes between the application and the server, noted in a record."""

    def __init__(self, scope: Scope, record: Record, receive: Receive, send: Send) -> None:
        self._scope, self._record = scope, record
        self._receive, self._send = receive, send

    async def receive(self) -> Message:
        """ASGI."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._record.complete:
            self._record.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = headers["request-id"] = self._record.id
            headers["x-content-type-options"] = "nosniff"
            if ignored := self._scope["state"].get("ignored"):
                headers[IGNORED_HEADER] = ", ".join(ignored)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._record.complete = True
        await self._send(message)


def _record(scope: Scope) -> Record:
    given = Headers(scope=scope).get("x-request-id", "")
    path = scope.get("raw_path") or scope["path"].encode("utf-8", "backslashreplace")
    return Record(
        id=given if _ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=path.decode("ascii", "backslashreplace")[:_PATH_CHARS],
    )


class LogFormatter(logging.Formatter):
    """Lines of the log: of requests, and of anything else; text for people, or one JSON object."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line; of an exception in text form, several."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        fields: dict[str, Any] = {"time": f"{when}.{int(record.msecs):03d}"}
        about = getattr(record, "record", None)
        if isinstance(about, Record):
            fields |= _fields(about)
        else:
            fields |= {"level": record.levelname.lower(), "message": record.getMessage()}
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            return json.dumps(fields | ({"traceback": trace} if trace else {}))
        text = " ".join(
            str(value) if name in _BARE else f"{name}={value}" for name, value in fields.items()
        )
        return f"{text}\n{trace}" if trace else text


_BARE: Final = frozenset({"time", "level", "message", "method", "path", "status", "outcome"})


def _fields(record: Record) -> dict[str, Any]:
    """What a line says about a request."""
    fields: dict[str, Any] = {
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "outcome": record.outcome,
        "id": record.id,
        "duration_s": round(record.duration_s, 4),
    }
    if record.prompt_tokens or record.completion_tokens:
        fields["prompt_tokens"] = record.prompt_tokens
        fields["completion_tokens"] = record.completion_tokens
    if record.ttft_s is not None:
        fields["ttft_s"] = round(record.ttft_s, 4)
    return fields
