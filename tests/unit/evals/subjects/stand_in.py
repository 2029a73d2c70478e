"""A small OpenAI-compatible server on this machine that does as it is told."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def ok(data: Any) -> Reply:
    return 200, {}, json.dumps(data).encode()


def status(code: int, message: str = "no", **headers: str) -> Reply:
    return code, headers, json.dumps({"error": {"message": message}}).encode()


def message(text: str | None, finish: str = "stop", **more: Any) -> Reply:
    choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}
    return ok({"choices": [choice], "usage": {"completion_tokens": 7}})


def echoed(prompt: str) -> Reply:
    """Words as tokens, each with a log-likelihood of minus its length; then one more token."""
    starts = [i for i, c in enumerate(prompt) if i == 0 or c == " "]
    ends = [*starts[1:], len(prompt)]
    values: list[float | None] = [-float(b - a) for a, b in zip(starts, ends, strict=True)]
    values[0] = None
    logprobs = {"text_offset": [*starts, len(prompt)], "token_logprobs": [*values, -99.0]}
    return ok({"choices": [{"text": prompt + "!", "logprobs": logprobs}]})


@dataclasses.dataclass
class StandIn:
    """Replies by path; a reply is a tuple, a function of the body, or a list of them in turn.

    Attributes:
        requests: path, body and headers of what came in.
        most: largest number of requests at a time.
    """

    replies: dict[str, Any]
    delay_s: float = 0.0
    requests: list[tuple[str, Any, dict[str, str]]] = dataclasses.field(default_factory=list)
    most: int = 0

    def __enter__(self) -> "StandIn":
        stand_in, lock, busy = self, threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                path = self.path.removeprefix("/v1/")
                with lock:
                    busy[0] += 1
                    stand_in.most = max(stand_in.most, busy[0])
                    stand_in.requests.append((path, body, dict(self.headers)))
                    reply = stand_in.reply(path)
                time.sleep(stand_in.delay_s)
                code, headers, data = reply(body) if callable(reply) else reply
                with lock:
                    busy[0] -= 1
                try:
                    self.send_response(code)
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # who asked no longer waits

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reply(self, path: str) -> Reply | Callable[[Any], Reply]:
        found = self.replies.get(path, status(404, "no such path"))
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found

    def bodies(self, path: str) -> list[Any]:
        return [body for where, body, _ in self.requests if where == path]
