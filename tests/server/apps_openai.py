"""An application of the OpenAI routes alone, with a scripted engine."""

import dataclasses

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from optiq.errors import OptiqError, RequestRejected
from optiq.server import openai
from optiq.server.openai.errors import as_rejected
from optiq.server.wire import IGNORED_HEADER
from tests.server.fake import FakeService


@dataclasses.dataclass
class FakeImages:
    """Pictures by their URL."""

    fetched: list = dataclasses.field(default_factory=list)

    async def fetch(self, source):
        if not source.startswith("data:"):
            raise RequestRejected(f"images of {source!r} are not fetched; send a data URL")
        self.fetched.append(source)
        return source.encode()


def app_of(service=None):
    """The routes with what the whole server does around them."""
    app = FastAPI(title="optiq")
    app.include_router(openai.router)
    app.state.service = service or FakeService()
    app.state.images = FakeImages()

    @app.exception_handler(OptiqError)
    async def failed(_, error):
        error = as_rejected(error)
        headers = {} if error.retry_after_s is None else {"retry-after": f"{error.retry_after_s:g}"}
        return JSONResponse(openai.error_body(error), error.http_status, headers)

    @app.exception_handler(HTTPException)
    async def unrouted(_, error):
        rejected = RequestRejected(str(error.detail), http_status=error.status_code)
        return JSONResponse(openai.error_body(rejected), error.status_code, error.headers)

    @app.middleware("http")
    async def name_ignored(request, call_next):
        response = await call_next(request)
        if ignored := getattr(request.state, "ignored", None):
            response.headers[IGNORED_HEADER] = ", ".join(ignored)
        return response

    return app


def client_of(service=None):
    """A client of it."""
    return TestClient(app_of(service), raise_server_exceptions=False)
