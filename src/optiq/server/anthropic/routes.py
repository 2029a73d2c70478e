"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from optiq.server.anthropic.answer import CountOut, MessageOut, MessageWriter
from optiq.server.anthropic.body import CountBody, MessagesBody
from optiq.server.anthropic.errors import ErrorOut
from optiq.server.anthropic.prompt import job_of
from optiq.server.asking import card_of
from optiq.server.jobs import CountJob
from optiq.server.respond import replies, settled, streamed
from optiq.server.wire import Engine, answers, body_of, read

router = APIRouter(tags=["anthropic"])


@router.post(
    "/v1/messages",
    response_model=None,
    responses=answers(MessageOut, ErrorOut, "text/event-stream"),
    openapi_extra=body_of(MessagesBody),
)
async def create_message(request: Request, service: Engine) -> Response:
    """Go on with a conversation."""
    body = await read(request, MessagesBody)
    job = await job_of(request, service, body)
    writer = MessageWriter(
        job.model,
        body.max_tokens,
        drafts=card_of(service, job.model).drafter is not None,
        shows_thinking=getattr(body.thinking, "display", None) != "omitted",
        request_id=getattr(request.state, "request_id", None),
    )
    stream = service.submit(job)
    if body.stream:
        return await streamed(request, stream, writer.encode, writer.failed)
    return JSONResponse(writer.whole(settled(await replies(request, stream))))


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses=answers(CountOut, ErrorOut),
    openapi_extra=body_of(CountBody),
)
async def count_tokens(request: Request, service: Engine) -> Response:
    """Count the tokens that the prompt of a message would have."""
    body = await read(request, CountBody)
    counted = await service.count(CountJob(await job_of(request, service, body)))
    return JSONResponse({"input_tokens": counted.num_tokens})
