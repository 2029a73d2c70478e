"""JSON over HTTP, asked again when the server is busy or gone for a moment."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import random
import time
from collections.abc import Callable
from typing import Any

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # kept for others to use

from optiq.errors import EngineFailure, UsageError

_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MAX_WAIT_S = 120.0
_CONNECT_S = 20.0


@dataclasses.dataclass(frozen=True)
class Retries:
    """How often and how patiently a request is sent again.

    Attributes:
        attempts: requests in all.
        first_wait_s: pause after the first; it doubles, with up to a quarter added by chance.
        sleep: waits for seconds.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def wait_s(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to wait after an attempt (from 0): what the server asks for, or more."""
        own: float = self.first_wait_s * 2**attempt * (1 + random.random() / 4)
        return min(_MAX_WAIT_S, max(own, _seconds(retry_after)))


class Refused(Exception):
    """The server answered that it will not do this request.

    Attributes:
        status: of HTTP.
        reason: the server's words.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class NotFound(UsageError):
    """The server has no such path, or no such model."""


class Connection:
    """An OpenAI-compatible server; may be used by many threads.

    Args:
        url: with or without `/v1` at its end.
        key: sent as a bearer token, if given.
        timeout_s: longest wait for an answer.
        retries: how requests are sent again.
    """

    def __init__(
        self, url: str, key: str | None, timeout_s: float, retries: Retries | None = None
    ) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self._retries = retries or Retries()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
            limits=httpx.Limits(max_connections=None),
        )

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path; raises as `post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a JSON object.

        Raises:
            Refused: if the server will not do this request (400, 413, 422 and their like).
            UsageError: if the URL or the key is wrong; `NotFound` for a wrong path or model.
            EngineFailure: if there is no usable answer after all attempts.
        """
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        problem = ""
        for attempt in range(self._retries.attempts):
            retry_after = None
            try:
                reply = self._client.request(method, f"{self.url}/{path}", json=body)
                if reply.status_code not in _BUSY:
                    return self._read(reply, path)
                problem = f"answers {reply.status_code} ({_words(reply)})"
                retry_after = reply.headers.get("retry-after")
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UsageError(f"--served {self.url} is no URL: {error}") from None
            except httpx.TimeoutException:
                problem = "does not answer in time"
            except httpx.HTTPError as error:
                problem = f"cannot be reached ({' '.join(str(error).split())})"
            except ValueError as error:
                problem = f"answers with something that is no JSON object ({error})"
            if attempt + 1 < self._retries.attempts:
                self._retries.sleep(self._retries.wait_s(attempt, retry_after))
        raise EngineFailure(
            f"{self.url}/{path} {problem}, after {self._retries.attempts} attempts; see to the "
            f"server, or give a longer --timeout or less --concurrency, and run the same command "
            f"again to go on"
        )

    def _read(self, reply: Any, path: str) -> dict[str, Any]:  # noqa: ANN401  httpx has no types here
        """The object of a reply that is no busy signal.

        Raises:
            ValueError: if it is no JSON object.
        """
        status = int(reply.status_code)
        if status in {401, 403}:
            raise UsageError(
                f"{self.url} refuses the key ({status}: {_words(reply)}); set OPTIQ_API_KEY"
            )
        if status == 404:
            raise NotFound(
                f"{self.url} has no '{path}', or no such model ({_words(reply)}); check --served "
                f"and --served-model"
            )
        if 300 <= status < 400:
            raise UsageError(
                f"{self.url} leads elsewhere ({reply.headers.get('location')}); give that URL"
            )
        if status >= 400:
            raise Refused(status, _words(reply))
        data = reply.json()
        if not isinstance(data, dict):
            raise ValueError(f"{type(data).__name__}")
        return data


def _words(reply: Any) -> str:  # noqa: ANN401  httpx has no types here
    """The server's own message, or the beginning of what it sent."""
    try:
        error = reply.json()["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = reply.text
    return " ".join(str(text).split())[:200] or "no message"


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After header: a number, or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (when - now).total_seconds()) if when.tzinfo else 0.0
