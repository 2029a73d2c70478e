"""The application: all routes, behind the doors of `guard` and `auth`, watched by `access`."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import optiq
from optiq import settings
from optiq.configs import ServeConfig, parse_size
from optiq.errors import EngineFailure, OptiqError, RequestRejected, UsageError
from optiq.server import anthropic, ollama, openai
from optiq.server.access import Access
from optiq.server.auth import Keys, keys_of
from optiq.server.dialects import answer
from optiq.server.guard import Bodies, Doors
from optiq.server.images import Images
from optiq.server.metrics import Measured, Metrics
from optiq.server.openai import responses
from optiq.server.service import Service
from optiq.server.wire import IGNORED_HEADER

ROUTERS: Final[tuple[APIRouter, ...]] = (
    openai.router,
    responses.router,
    anthropic.router,
    ollama.router,
)
"""The protocols that are served."""

_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "The request cannot be honoured; the message names what is wrong."},
    401: {"description": "The API key is missing or wrong."},
    403: {"description": "The Host or the Origin is not on the list."},
    404: {"description": "There is no such model or route."},
    500: {"description": "The engine or the server failed."},
    503: {"description": "The engine is being restarted, or the server shut down."},
}
_BODY_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    408: {"description": "The body came too slowly."},
    413: {"description": "The body is too large."},
    415: {"description": "The body is not sent as application/json."},
    429: {"description": "The queue is full; Retry-After says when to ask again."},
}
_EXPOSED: Final = (IGNORED_HEADER, "x-request-id", "request-id", "retry-after")


class Health(BaseModel):
    """The state of the server."""

    status: str = Field(description="`ok`, `ready` or `not ready`.")
    reason: str | None = Field(default=None, description="Why it is not ready.")


class App(FastAPI):
    """An application whose OpenAPI document says what it does."""

    def openapi(self) -> dict[str, Any]:
        """The document: refusals are 400, never 422; keys are named where they are asked for."""
        if self.openapi_schema:
            return self.openapi_schema
        document = super().openapi()
        for operations in document["paths"].values():
            for method, operation in operations.items():
                operation["responses"].pop("422", None)
                more = _BODY_REFUSALS if method == "post" else {}
                for status, text in (_REFUSALS | more).items():
                    operation["responses"].setdefault(str(status), text)
        parts = document.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        if self.state.has_keys:
            parts["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            document["security"] = [{"bearer": []}, {"x-api-key": []}]
        self.openapi_schema = document
        return document


def create_app(service: Service, config: ServeConfig) -> App:
    """The application of a service.

    `app.state` has `service`, `images`, and `draining`, which closes the doors when it is set.

    Raises:
        UsageError: if the options would let in whom nobody knows, or a list has a wrong entry.
    """
    keys = keys_of(config, settings.load().served_key)
    origins = [origin.lower().rstrip("/") for origin in config.cors_origin]
    _check_wildcards(config, has_keys=bool(keys))
    metrics = Metrics(service)
    app = App(title="optiq", version=optiq.__version__, docs_url=None, redoc_url=None)
    app.state.service = Measured(service, metrics)
    app.state.images = Images(config.image_host)
    app.state.metrics = metrics
    app.state.draining, app.state.has_keys = False, bool(keys)
    for router in (*ROUTERS, _state):
        app.include_router(router)
    for kind in (OptiqError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refused)
    # the last that is added is the first that a request meets
    app.add_middleware(Bodies, max_bytes=parse_size(config.max_body))
    app.add_middleware(Keys, keys=keys)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
    app.add_middleware(
        Doors,
        host=config.host,
        allowed_hosts=config.allowed_host,
        origins=origins,
        draining=lambda: app.state.draining,
    )
    app.add_middleware(Access, done=metrics.request_ended)
    return app


def _check_wildcards(config: ServeConfig, *, has_keys: bool) -> None:
    for name in ("allowed_host", "cors_origin"):
        if "*" in getattr(config, name) and not has_keys:
            raise UsageError(
                f"--{name.replace('_', '-')} '*' lets any web page use this server: give an API "
                "key too (--api-key-file or OPTIQ_API_KEY), or name what may ask"
            )


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, EngineFailure):
        ready, reason = request.app.state.service.ready()
        if not ready:
            text = f"{error}; the engine is not ready: {reason}"
            error = RequestRejected(text, http_status=503, code="engine_not_ready", retry_after_s=5)
    return answer(error, request.scope)


_state = APIRouter(tags=["state"])


@_state.get("/health", response_model_exclude_none=True)
async def health() -> Health:
    """Whether the server runs, whatever the engine does."""
    return Health(status="ok")


@_state.get("/ready", response_model=Health, responses={503: {"model": Health}})
async def ready(request: Request) -> Response:
    """Whether a request would be worked on at once."""
    is_ready, reason = request.app.state.service.ready()
    if request.app.state.draining:
        is_ready, reason = False, "the server is shutting down"
    status = Health(status="ready") if is_ready else Health(status="not ready", reason=reason)
    return JSONResponse(status.model_dump(exclude_none=True), 200 if is_ready else 503)


@_state.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics_text(request: Request) -> Response:
    """Counters and times for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
