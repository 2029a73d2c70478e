"""Routes with little protocol: what is around protocols is tested through them."""

import json

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from optiq.engine.events import TextDelta
from optiq.errors import OptiqError
from optiq.server.jobs import GenerateJob, Said
from optiq.server.respond import collected, streamed
from optiq.server.wire import Engine, json_object

router = APIRouter()
PATHS = ("/v1/echo", "/v1/messages/echo", "/api/echo")


async def echo(request: Request, engine: Engine):
    """An answer to `prompt`; streamed if `stream` is true. `raise` raises; `image` is fetched."""
    body = await json_object(request)
    request.state.ignored = sorted(body.keys() & {"user", "metadata"})
    if "raise" in body:
        raise {"KeyError": KeyError}[body["raise"]](body["prompt"])
    if "image" in body:
        data = await request.app.state.images.fetch(body["image"])
        return JSONResponse({"bytes": len(data)})
    stream = engine.submit(GenerateJob(engine.resolve(body.get("model")), body["prompt"]))
    if body.get("stream"):
        return await streamed(request, stream, encoded, failed)
    _, choices = await collected(request, stream)
    texts = [event.text for event in choices[0].events if isinstance(event, TextDelta)]
    return JSONResponse({"text": "".join(texts)})


for path in PATHS:
    router.add_api_route(path, echo, methods=["POST"])


def encoded(reply):
    """Server-sent events of a reply."""
    match reply:
        case Said(_, TextDelta(text)):
            return [f"data: {json.dumps(text)}\n\n".encode()]
        case Said():
            return [b"data: [DONE]\n\n"]
    return []


def failed(error: OptiqError):
    """Server-sent events that end a stream that failed."""
    return [f"data: {json.dumps({'error': str(error)})}\n\n".encode(), b"data: [DONE]\n\n"]
