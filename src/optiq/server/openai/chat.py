"""/v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from optiq.engine.events import ReasoningDelta, TextDelta, ToolCallDone
from optiq.server.openai import replies
from optiq.server.openai.chat_body import ChatBody, job_of
from optiq.server.openai.chat_stream import ChatStream
from optiq.server.openai.messages import conversation
from optiq.server.openai.routes import card_of, documented
from optiq.server.respond import Choice, collected, streamed
from optiq.server.wire import Engine, note_ignored, read

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=replies.ChatCompletion,
    **documented(ChatBody, replies.ChatChunk),
)
async def create_chat_completion(request: Request, engine: Engine) -> Response:
    """Go on with a conversation."""
    body = await read(request, ChatBody)
    if body.reports_usage and not body.stream:
        note_ignored(request, "stream_options.include_usage")  # a whole answer always has it
    card = card_of(engine, body.model)
    images = request.app.state.images if card.vision else None
    job = job_of(body, card, await conversation(body.messages, images))
    stream = engine.submit(job)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    if body.stream:
        writer = ChatStream(card, job.choices, num_top, with_usage=body.reports_usage)
        return await streamed(request, stream, writer.encode, replies.failed)
    started, choices = await collected(request, stream, job.choices)
    usages = [choice.finish.usage for choice in choices]
    completion = replies.ChatCompletion(
        **replies.new_head("chatcmpl", "chat.completion", card.name),
        choices=[_choice(i, choice, num_top) for i, choice in enumerate(choices)],
        usage=replies.usage_of(card, started.prompt_tokens, usages[:1], usages[1:]),
    )
    return JSONResponse(replies.dumped(completion))


def _choice(index: int, choice: Choice, num_top: int | None) -> replies.ChatChoice:
    text = "".join(event.text for event in choice.events if isinstance(event, TextDelta))
    thought = "".join(event.text for event in choice.events if isinstance(event, ReasoningDelta))
    calls = [
        replies.ToolCall(
            id=event.id,
            type="function",
            function=replies.Function(name=event.name, arguments=event.arguments),
        )
        for event in choice.events
        if isinstance(event, ToolCallDone)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    return replies.ChatChoice(
        index=index,
        message=replies.ChatMessage(**message),
        logprobs=None if num_top is None else replies.entries(choice.pieces, num_top),
        finish_reason=replies.finish_reason(choice.finish.reason),
    )
