"""`/v1/responses`: OpenAI's second protocol, without anything that is kept."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from optiq.server.asking import card_of
from optiq.server.openai.responses_answer import ResponseOut, ResponsesErrorOut, ResponseWriter
from optiq.server.openai.responses_body import ResponsesBody
from optiq.server.openai.responses_prompt import job_of
from optiq.server.respond import replies, settled, streamed
from optiq.server.wire import Engine, answers, body_of, read

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/responses",
    response_model=None,
    responses=answers(ResponseOut, ResponsesErrorOut, "text/event-stream"),
    openapi_extra=body_of(ResponsesBody),
)
async def create_response(request: Request, service: Engine) -> Response:
    """Go on with a conversation."""
    body = await read(request, ResponsesBody)
    job = await job_of(request, service, body)
    drafts = card_of(service, job.model).drafter is not None
    writer = ResponseWriter.of(job, body, drafts=drafts)
    stream = service.submit(job)
    if body.stream:
        return await streamed(request, stream, writer.encode, writer.failed)
    return JSONResponse(writer.whole(settled(await replies(request, stream))))
