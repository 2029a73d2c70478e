"""A small application around routers: dialects by path, ignored parameters in a header."""

import base64
import json

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

from optiq.errors import OptiqError, RequestRejected
from optiq.server import anthropic, ollama
from optiq.server.openai import responses
from optiq.server.wire import IGNORED_HEADER
from tests.server.fake import FakeService


class Pictures:
    """Reads data URLs, and one address."""

    async def fetch(self, source):
        if source == "https://example.org/a.png":
            return b"elsewhere"
        if not source.startswith("data:"):
            raise RequestRejected(f"picture {source!r} is not allowed")
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except ValueError:
            raise RequestRejected("the picture is no base64") from None


def openai_body(error):
    status = error.http_status if isinstance(error, RequestRejected) else 500
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def app_of(service):
    app = FastAPI()
    app.state.service, app.state.images = service, Pictures()
    for router in (anthropic.router, responses.router, ollama.router):
        app.include_router(router)

    @app.middleware("http")
    async def name_ignored(request, go_on):
        request.state.request_id = "req_1"
        answer = await go_on(request)
        if ignored := getattr(request.state, "ignored", None):
            answer.headers[IGNORED_HEADER] = ",".join(ignored)
        return answer

    @app.exception_handler(OptiqError)
    async def refused(request, error):
        path = request.url.path
        told = anthropic.error_body if path.startswith("/v1/messages") else openai_body
        told = ollama.error_body if path.startswith("/api/") else told
        status = error.http_status if isinstance(error, RequestRejected) else 500
        return JSONResponse(told(error), status)

    return app


def client_of(service=None):
    """A client of an application around a service."""
    return TestClient(app_of(service or FakeService()), raise_server_exceptions=False)


def events_of(text):
    """The events of a stream, keep-alive comments left out."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            name, data = lines
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found
