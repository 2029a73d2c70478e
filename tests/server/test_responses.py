"""`/v1/responses` over a scripted engine."""

import base64

import pytest
from hypothesis import given, settings

from optiq.engine.events import TextDelta
from optiq.engine.grammar import Grammar
from optiq.errors import EngineFailure, RequestRejected
from optiq.server.jobs import Said, Started, Written
from optiq.server.openai.responses_body import ResponsesBody
from optiq.server.wire import IGNORED_HEADER
from tests.server.apps_anthropic import client_of, events_of
from tests.server.fake import FakeService, ended, piece, said
from tests.server.scripts import (
    BLIND,
    DRAFTED,
    EVERYTHING,
    USAGE,
    answers,
    broken,
    holding,
    thought,
)

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
OTHER = TOOL | {"name": "clock"}
PICTURE = "data:image/png;base64," + base64.b64encode(b"png").decode()
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
LOGPROBS = "message.output_text.logprobs"


def asked(data, service=None):
    """The job that a body becomes, and the answer."""
    service = service or FakeService()
    answer = client_of(service).post("/v1/responses", json=data)
    assert answer.status_code == 200, answer.text
    return service.jobs[-1], answer


def body(**rest):
    return {"model": "tiny", "input": "Hi"} | rest


def refused(data, status=400, service=None):
    answer = client_of(service).post("/v1/responses", json=data)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def nameless(value):
    """A response without the ids and times that differ from one to the next."""
    if isinstance(value, list):
        return [nameless(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: nameless(one)
        for key, one in value.items()
        if key not in {"id", "created_at", "completed_at", "item_id"}
    }


# -- the answer ------------------------------------------------------------------------------------


def test_items_stand_in_the_order_in_which_the_model_wrote_them():
    told = asked(body(), FakeService(EVERYTHING, cards=(DRAFTED,)))[1].json()
    assert nameless(told["output"]) == [
        {
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Let me see."}],
        },
        {
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [
                {
                    "type": "output_text",
                    "text": "I look it up.",
                    "annotations": [],
                    "logprobs": [],
                }
            ],
        },
        {
            "type": "function_call",
            "status": "completed",
            "call_id": "call_0",
            "name": "weather",
            "arguments": '{"city": "Oslo"}',
        },
        {
            "type": "function_call",
            "status": "completed",
            "call_id": "call_1",
            "name": "clock",
            "arguments": "{}",
        },
    ]
    assert told["status"] == "completed"
    assert told["store"] is False
    assert told["usage"] == {
        "input_tokens": USAGE.prompt_tokens,
        "input_tokens_details": {"cached_tokens": USAGE.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": USAGE.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": USAGE.reasoning_tokens},
        "total_tokens": USAGE.prompt_tokens + USAGE.completion_tokens,
        "draft": {"proposed": USAGE.drafted_tokens, "accepted": USAGE.accepted_tokens},
    }


def test_events_come_in_openais_order():
    events = events_of(asked(body(stream=True), FakeService(EVERYTHING))[1].text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


@settings(max_examples=40)
@given(answers())
def test_a_stream_ends_with_the_whole_response(script):
    whole = asked(body(include=[LOGPROBS]), FakeService(script))[1].json()
    streamed = asked(body(include=[LOGPROBS], stream=True), FakeService(script))[1]
    events = events_of(streamed.text)
    assert nameless(events[-1]["response"]) == nameless(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    texts = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(done):
        text = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert texts[index] == text


def test_an_answer_cut_by_the_limit_is_incomplete():
    script = (Started(3), *said("a"), ended("length"))
    told = asked(body(), FakeService(script))[1].json()
    assert told["status"] == told["output"][0]["status"] == "incomplete"
    assert told["incomplete_details"] == {"reason": "max_output_tokens"}
    events = events_of(asked(body(stream=True), FakeService(script))[1].text)
    assert events[-1]["type"] == "response.incomplete"


def test_a_call_that_cannot_be_read_is_text_or_a_failure_of_the_stream():
    service = FakeService((Started(3), *broken(0, "f", "call:f{"), ended(failed_calls=1)))
    told = asked(body(tools=[TOOL]), service)[1].json()
    assert [item["type"] for item in told["output"]] == ["message"]
    assert told["output"][0]["content"][0]["text"] == "call:f{"
    events = events_of(asked(body(tools=[TOOL], stream=True), service)[1].text)
    assert events[-1]["type"] == "response.failed"
    assert "no JSON" in events[-1]["response"]["error"]["message"]


def test_a_call_cut_by_the_limit_is_incomplete():
    script = (Started(3), *broken(0, "f", "call:f{"), ended("length"))
    last = events_of(asked(body(stream=True), FakeService(script))[1].text)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_failure_in_mid_stream_is_an_event():
    script = (Started(3), *said("a"), EngineFailure("the engine died"))
    last = events_of(asked(body(stream=True), FakeService(script))[1].text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the engine died"}


@pytest.mark.parametrize("streams", [False, True])
def test_a_failure_before_the_answer_is_a_status(streams):
    fault = RequestRejected("too long", code="context_length_exceeded")
    assert refused(body(stream=streams), service=FakeService((fault,)))["message"] == "too long"


def test_logprobs_are_of_the_text_alone():
    script = (
        Started(3),
        *thought("hm"),
        Written(0, (piece("</think>"), piece(" a"))),
        Said(0, TextDelta("a")),
        Written(0, (piece("b"), piece("</s>"))),
        Said(0, TextDelta("b")),
        ended(),
    )
    job, answer = asked(body(include=[LOGPROBS], top_logprobs=1), FakeService(script))
    assert job.sampling == {"logprobs": True, "top_logprobs": 1}
    logprobs = answer.json()["output"][1]["content"][0]["logprobs"]
    assert [one["token"] for one in logprobs] == [" a", "b"]
    assert logprobs[1] == {
        "token": "b",
        "bytes": [98],
        "logprob": -0.5,
        "top_logprobs": [{"token": "b", "bytes": [98], "logprob": -0.5}],
    }


def test_thinking_comes_back_through_the_client():
    told = asked(body(include=["reasoning.encrypted_content"]), FakeService(EVERYTHING))[1].json()
    reasoning, message, call, _ = told["output"]
    for kept in (reasoning, {key: reasoning[key] for key in reasoning if key != "content"}):
        output = {"type": "function_call_output", "call_id": "call_0", "output": "rain"}
        job, answer = asked(body(input=[kept, message, call, output]))
        assert job.prompt[0]["reasoning_content"] == "Let me see."
        assert job.prompt[0]["content"] == "I look it up."
        assert job.prompt[1] == {"role": "tool", "content": "rain", "tool_call_id": "call_0"}
        assert "input.encrypted_content" not in answer.headers[IGNORED_HEADER]
    foreign = {"type": "reasoning", "encrypted_content": "gAAAA"}
    job, answer = asked(body(input=[foreign, {"role": "user", "content": "a"}]))
    assert job.prompt == ({"role": "user", "content": "a"},)
    assert answer.headers[IGNORED_HEADER] == "input.encrypted_content"


def test_what_was_asked_is_repeated():
    data = body(
        instructions="Be brief",
        tools=[TOOL],
        tool_choice="none",
        metadata={"a": "b"},
        temperature=0.5,
        max_output_tokens=5,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "array"}}},
    )
    told = asked(data)[1].json()
    for key in ("instructions", "tool_choice", "metadata", "temperature", "max_output_tokens"):
        assert told[key] == data[key]
    assert TOOL.items() <= told["tools"][0].items()
    assert told["reasoning"]["effort"] == "low"
    assert told["text"]["format"]["schema"] == {"type": "array"}


# -- what is honoured ------------------------------------------------------------------------------

CHOSEN = {"type": "function", "name": "weather"}
ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [CHOSEN]}
HONOURED = [
    ({"model": "default_model"}, "model", "tiny"),
    ({"input": "Yo"}, "prompt", ({"role": "user", "content": "Yo"},)),
    ({"input": None}, "prompt", ({"role": "user", "content": ""},)),
    (
        {"instructions": "Be brief"},
        "prompt",
        ({"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}),
    ),
    (
        {"tools": [TOOL]},
        "tools",
        (
            {
                "type": "function",
                "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True},
            },
        ),
    ),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "required"),
    ({"tools": [TOOL], "tool_choice": CHOSEN}, "function", "weather"),
    ({"tools": [TOOL], "tool_choice": ALLOWED}, "tool_choice", "required"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", False),
    ({"text": {"format": {"type": "json_object"}}}, "grammar", Grammar("json_object")),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "array"}}}},
        "grammar",
        Grammar("json_schema", {"type": "array"}),
    ),
    ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, "grammar", None),
    ({"reasoning": {"effort": "medium"}}, "thinking_budget", 4096),
    ({"reasoning": {"effort": "high"}}, "thinking", True),
    ({"reasoning": {"effort": "none"}}, "thinking", False),
    ({"include": [LOGPROBS]}, "sampling", {"logprobs": True}),
    ({"top_logprobs": 2}, "sampling", {"logprobs": True, "top_logprobs": 2}),
    ({"max_output_tokens": 5}, "sampling", {"max_tokens": 5}),
    ({"temperature": 0}, "sampling", {"temperature": 0}),
    ({"top_p": 0.5}, "sampling", {"top_p": 0.5}),
    ({"stream": False}, "choices", 1),
    ({"stream_options": {}}, "choices", 1),
    ({"background": False}, "choices", 1),
    ({"truncation": "disabled"}, "choices", 1),
]


@pytest.mark.parametrize(("given_", "field", "value"), HONOURED)
def test_what_is_honoured_reaches_the_engine(given_, field, value):
    job, answer = asked(body() | given_)
    assert getattr(job, field) == value
    assert IGNORED_HEADER not in answer.headers


def test_every_honoured_parameter_has_a_row():
    rows = {key for given_, _, _ in HONOURED for key in given_}
    assert rows == set(ResponsesBody.model_fields) - ResponsesBody.without_effect


def test_allowed_tools_are_all_that_the_model_sees():
    job, _ = asked(body(tools=[TOOL, OTHER], tool_choice=ALLOWED))
    assert [tool["function"]["name"] for tool in job.tools] == ["weather"]


def test_a_conversation_reaches_the_engine_whole():
    items = [
        {"role": "developer", "content": "Be brief"},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look"},
                {"type": "input_image", "image_url": PICTURE, "detail": "low"},
            ],
        },
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        CALL,
        CALL | {"call_id": "c2"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [
                {"type": "input_text", "text": "see"},
                {"type": "input_image", "image_url": PICTURE},
            ],
        },
        {"type": "function_call_output", "call_id": "c2", "output": "rain"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Wet."}]},
        {"role": "user", "content": "And now?"},
    ]
    job, _ = asked(body(input=items))
    calls = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": "weather", "arguments": "{}"},
        }
        for call_id in ("c1", "c2")
    ]
    assert job.prompt == (
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image"}]},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "content": "see", "tool_call_id": "c1"},
        {"role": "tool", "content": "rain", "tool_call_id": "c2"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Pictures of the result c1:"},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "Wet."},
        {"role": "user", "content": "And now?"},
    )
    assert job.images == (b"png", b"png")
    assert job.image_detail == "low"


# -- what is ignored -------------------------------------------------------------------------------

IGNORED = {
    "input[].content[].annotations": [],
    "input[].content[].logprobs": [],
    "input[].id": "m",
    "input[].phase": "final_answer",
    "input[].status": "completed",
    "input[].summary": [{"type": "summary_text", "text": "a"}],
    "max_tool_calls": 3,
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning.generate_summary": "auto",
    "reasoning.summary": "auto",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": True,
    "text.format.description": "A list.",
    "stream_options.include_obfuscation": True,
    "user": "u",
}


def test_every_ignored_parameter_has_a_row():
    assert IGNORED.keys() == ResponsesBody.without_effect


SCHEMA = {"type": "json_schema", "name": "n", "schema": {}}


@pytest.mark.parametrize("key", IGNORED)
def test_what_is_ignored_is_named(key):
    said_ = {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
    thought_ = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}]}
    items = [thought_ if key.endswith("summary") else said_]
    data = body(input=items, text={"format": SCHEMA})
    plain, _ = asked(data)
    job, answer = asked(holding(key, IGNORED[key], data))
    assert job == plain
    assert answer.headers[IGNORED_HEADER] == key


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ResponsesBody.refused)
def test_what_is_refused_is_named(key):
    told = refused(body(**{key: "x"}))
    assert told["param"] == key
    assert told["type"] == "invalid_request_error"


@pytest.mark.parametrize("key", [*ResponsesBody.refused, *ResponsesBody.model_fields])
def test_null_is_not_given(key):
    data = body()
    data.pop(key, None)
    plain, _ = asked(data)
    job, answer = asked(data | {key: None})
    assert job == plain
    assert IGNORED_HEADER not in answer.headers


@pytest.mark.parametrize(
    ("given_", "param"),
    [
        ({"seed": 1}, "seed"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": CHOSEN | {"name": "x"}}, "tool_choice.name"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "a", "b": 1}]}, "input[0].b"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]},
            "input[0].call_id",
        ),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_image", "image_url": PICTURE, "detail": "low"},
                            {"type": "input_image", "image_url": PICTURE, "detail": "high"},
                        ],
                    }
                ]
            },
            "input",
        ),
        (
            {
                "input": [
                    {
                        "role": "assistant",
                        "content": [{"type": "input_image", "image_url": PICTURE}],
                    }
                ]
            },
            "input",
        ),
    ],
)
def test_what_cannot_be_honoured_is_named(given_, param):
    told = refused(body(**given_))
    assert told["param"] == param
    assert param.split("[")[0] in told["message"]


def test_thinking_that_the_model_cannot_do_is_refused():
    told = refused(body(reasoning={"effort": "low"}), service=FakeService(cards=(BLIND,)))
    assert told["param"] == "reasoning.effort"


def test_an_unknown_model_is_not_found():
    assert refused(body(model="gpt"), 404)["code"] == "model_not_found"
