"""Anthropic's routes over a scripted engine."""

import base64
import json

import pytest
from hypothesis import given, settings

from optiq.engine.grammar import Grammar
from optiq.errors import EngineFailure, RequestRejected
from optiq.server.anthropic import error_body
from optiq.server.anthropic.body import CountBody, MessagesBody
from optiq.server.jobs import CountJob, Started
from optiq.server.wire import IGNORED_HEADER
from tests.server.apps_anthropic import client_of, events_of
from tests.server.fake import CARD, FakeService, ended, said
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

TOOL = {"name": "weather", "description": "Weather", "input_schema": {"type": "object"}}
PICTURE = base64.b64encode(b"png").decode()
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PICTURE},
}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}


def body(*messages, **rest):
    turns = list(messages) or [{"role": "user", "content": "Hi"}]
    return {"model": "tiny", "max_tokens": 9, "messages": turns, **rest}


def asked(data, service=None, path="/v1/messages"):
    """The job that a body becomes, and the answer."""
    service = service or FakeService()
    answer = client_of(service).post(path, json=data)
    assert answer.status_code == 200, answer.text
    return service.jobs[-1], answer


def refused(data, status=400, service=None):
    """The message of a refusal."""
    answer = client_of(service).post("/v1/messages", json=data)
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert told["type"] == "error"
    return told["error"]


def added_up(events):
    """The message that events make, as a client adds them up."""
    message, arguments = {}, {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                kind = delta["type"]
                if kind == "input_json_delta":
                    arguments.setdefault(event["index"], []).append(delta["partial_json"])
                else:
                    key = kind.removesuffix("_delta")
                    block[key] += delta[key]
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    for index, texts in arguments.items():
        message["content"][index]["input"] = json.loads("".join(texts))
    return message


# -- the answer ------------------------------------------------------------------------------------


def test_blocks_stand_in_the_order_in_which_the_model_wrote_them():
    service = FakeService(EVERYTHING, cards=(DRAFTED,))
    _, answer = asked(body(tools=[TOOL]), service)
    told = answer.json()
    assert told["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "optiq"},
        {"type": "text", "text": "I look it up."},
        {"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_1", "name": "clock", "input": {}},
    ]
    assert told["stop_reason"] == "tool_use"
    assert told["usage"] == {
        "input_tokens": USAGE.prompt_tokens - USAGE.cached_tokens,
        "cache_read_input_tokens": USAGE.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": USAGE.completion_tokens,
        "output_tokens_details": {"thinking_tokens": USAGE.reasoning_tokens},
        "draft": {"proposed": USAGE.drafted_tokens, "accepted": USAGE.accepted_tokens},
    }


def test_events_come_in_anthropics_order():
    _, answer = asked(body(stream=True), FakeService(EVERYTHING, cards=(DRAFTED,)))
    kinds = [event["type"] for event in events_of(answer.text)]
    block = ["content_block_start", "content_block_delta", "content_block_delta"]
    assert (
        kinds
        == [
            "message_start",
            "ping",
            *block,  # the thinking, and its signature
            "content_block_delta",
            "content_block_stop",
            *block,
            "content_block_stop",
            *block,
            "content_block_stop",
            *block[:2],
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    )
    deltas = [
        event["delta"]["type"]
        for event in events_of(answer.text)
        if "index" in event and "delta" in event
    ]
    start = events_of(answer.text)[0]["message"]
    assert start["usage"]["input_tokens"] == USAGE.prompt_tokens
    assert "draft" not in start["usage"]  # clients would keep it
    assert deltas[:4] == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta"]
    assert answer.headers["content-type"].startswith("text/event-stream")


@settings(max_examples=40)
@given(answers())
def test_a_stream_adds_up_to_the_whole_message(script):
    whole = asked(body(), FakeService(script))[1].json()
    parts = added_up(events_of(asked(body(stream=True), FakeService(script))[1].text))
    assert parts | {"id": ""} == whole | {"id": ""}


@pytest.mark.parametrize(
    ("finish", "reason", "stop"),
    [
        (ended("stop"), "end_turn", None),
        (ended("stop", stop="END"), "stop_sequence", "END"),
        (ended("length", usage=USAGE), "model_context_window_exceeded", None),
        (ended("tool_calls"), "tool_use", None),
    ],
)
def test_why_it_ended(finish, reason, stop):
    told = asked(body(), FakeService((Started(3), *said("a"), finish)))[1].json()
    assert (told["stop_reason"], told["stop_sequence"]) == (reason, stop)


def test_an_answer_cut_at_max_tokens_says_so():
    script = (Started(3), *said("a"), ended("length", usage=USAGE))
    told = asked(body(max_tokens=7), FakeService(script))[1].json()
    assert told["stop_reason"] == "max_tokens"


def test_a_call_that_cannot_be_read_is_text_or_an_error_of_the_stream():
    service = FakeService((Started(3), *broken(0, "f", "call:f{"), ended(failed_calls=1)))
    told = asked(body(tools=[TOOL]), service)[1].json()
    assert told["content"] == [{"type": "text", "text": "call:f{"}]
    events = events_of(asked(body(tools=[TOOL], stream=True), service)[1].text)
    assert events[-1]["type"] == "error"
    assert "no JSON" in events[-1]["error"]["message"]


def test_a_call_cut_by_the_limit_ends_the_stream_as_the_limit_does():
    script = (Started(3), *broken(0, "f", "call:f{"), ended("length", usage=USAGE))
    events = events_of(asked(body(max_tokens=7, stream=True), FakeService(script))[1].text)
    assert [event["type"] for event in events[-3:]] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_thinking_can_be_left_out():
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    whole = asked(body(thinking=thinking), FakeService(EVERYTHING))[1].json()
    assert whole["content"][0] == {"type": "thinking", "thinking": "", "signature": "optiq"}
    script = (Started(3), *thought("hm"), *said("a"), ended())
    text = asked(body(thinking=thinking, stream=True), FakeService(script))[1].text
    assert "hm" not in text


def test_a_failure_in_mid_stream_is_an_event():
    script = (Started(3), *said("a"), EngineFailure("the engine died"))
    events = events_of(asked(body(stream=True), FakeService(script))[1].text)
    assert events[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "the engine died"},
        "request_id": "req_1",
    }


@pytest.mark.parametrize("streams", [False, True])
def test_a_failure_before_the_answer_is_a_status(streams):
    service = FakeService((RequestRejected("too long", code="context_length_exceeded"),))
    assert refused(body(stream=streams), service=service) == {
        "type": "invalid_request_error",
        "message": "too long",
    }
    assert service.streams[0].cancelled


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropics_names(status, kind):
    told = error_body(RequestRejected("x", http_status=status), "req_7")
    assert told == {
        "type": "error",
        "error": {"type": kind, "message": "x"},
        "request_id": "req_7",
    }


def test_an_unknown_model_is_not_found():
    assert refused(body() | {"model": "gpt"}, 404)["type"] == "not_found_error"


# -- what is honoured ------------------------------------------------------------------------------

HONOURED = [
    ({"max_tokens": 3}, "sampling", {"max_tokens": 3}),
    ({"temperature": 0}, "sampling", {"max_tokens": 9, "temperature": 0}),
    ({"top_p": 0.5}, "sampling", {"max_tokens": 9, "top_p": 0.5}),
    ({"top_k": 4}, "sampling", {"max_tokens": 9, "top_k": 4}),
    ({"stop_sequences": ["a", "b"]}, "sampling", {"max_tokens": 9, "stop": ("a", "b")}),
    ({"system": "Be brief"}, "prompt", ({"role": "system", "content": "Be brief"}, None)),
    ({"tools": [TOOL]}, "tools", "weather"),
    ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice", "required"),
    ({"tools": [TOOL], "tool_choice": {"type": "none"}}, "tool_choice", "none"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}, "function", "weather"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
        "parallel_tool_calls",
        False,
    ),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking_budget", 5),
    ({"thinking": {"type": "adaptive"}}, "thinking", True),
    ({"thinking": {"type": "disabled"}}, "thinking", False),
    (
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        "thinking_budget",
        1024,
    ),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}}},
        "grammar",
        Grammar("json_schema", {"type": "array"}),
    ),
    ({"messages": [{"role": "user", "content": "Yo"}]}, "prompt", ({"content": "Yo"},)),
    ({"model": "default_model"}, "model", "tiny"),
    ({"stream": False}, "choices", 1),
]


@pytest.mark.parametrize(("given_", "field", "value"), HONOURED)
def test_what_is_honoured_reaches_the_engine(given_, field, value):
    job, answer = asked(body() | given_)
    seen = getattr(job, field)
    if field == "tools":
        assert seen == (
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Weather",
                    "parameters": {"type": "object"},
                },
            },
        )
    elif field == "prompt":
        assert all(
            want is None or want.items() <= turn.items()
            for want, turn in zip(value, seen, strict=True)
        )
    else:
        assert seen == value
    assert IGNORED_HEADER not in answer.headers


def test_every_honoured_parameter_has_a_row():
    rows = {key for given_, _, _ in HONOURED for key in given_}
    assert rows == set(MessagesBody.model_fields) - MessagesBody.without_effect


def test_a_conversation_reaches_the_engine_whole():
    data = body(
        {"role": "user", "content": [{"type": "text", "text": "Look"}, IMAGE]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "I ask."},
                USE,
                USE | {"id": "t2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain", "is_error": True},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [
                        {"type": "text", "text": "see"},
                        {
                            "type": "image",
                            "source": {"type": "url", "url": "https://example.org/a.png"},
                        },
                    ],
                },
                {"type": "text", "text": "And now?"},
            ],
        },
        system=[{"type": "text", "text": "Be brief"}],
        tools=[TOOL],
    )
    job, _ = asked(data)
    calls = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Oslo"}},
        }
        for call_id in ("t1", "t2")
    ]
    assert job.prompt == (
        {"role": "system", "content": [{"type": "text", "text": "Be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image"}]},
        {
            "role": "assistant",
            "content": "I ask.",
            "tool_calls": calls,
            "reasoning_content": "Hm.",
        },
        {"role": "tool", "content": "Error:\nrain", "tool_call_id": "t1"},
        {"role": "tool", "content": "see", "tool_call_id": "t2"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Pictures of the result t2:"},
                {"type": "image"},
                {"type": "text", "text": "And now?"},
            ],
        },
    )
    assert job.images == (b"png", b"elsewhere")
    assert not job.continue_final


def test_a_last_assistant_message_is_gone_on_with():
    job, _ = asked(
        body({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"})
    )
    assert job.continue_final
    assert job.prompt[-1] == {"role": "assistant", "content": "Well,"}


def test_tokens_are_counted_of_the_same_prompt():
    data = body(system="Be brief", tools=[TOOL])
    job, _ = asked(data)
    del data["max_tokens"]
    counting, answer = asked(data, path="/v1/messages/count_tokens")
    assert answer.json() == {"input_tokens": 2}
    assert isinstance(counting, CountJob)
    assert counting.prompt.prompt == job.prompt
    assert counting.prompt.tools == job.tools


# -- what is ignored -------------------------------------------------------------------------------

MARK = {"type": "ephemeral"}
IGNORED = {
    "billing_policy": {"type": "billing_policy"},
    "cache_control": MARK,
    "diagnostics": {"previous_message_id": "m"},
    "inference_geo": "eu",
    "messages[].content[].cache_control": MARK,
    "messages[].content[].caller": {"type": "direct"},
    "messages[].content[].citations": [],
    "messages[].content[].content[].cache_control": MARK,
    "messages[].content[].content[].citations": [],
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
    "speed": "fast",
    "system[].cache_control": MARK,
    "system[].citations": [],
    "tools[].cache_control": MARK,
    "tools[].eager_input_streaming": True,
    "user_profile_id": "u",
    "workspace_id": "w",
}
WORDS = {"type": "text", "text": "a"}


def around(key):
    """A body with a place for a parameter."""
    user = {"role": "user", "content": [WORDS]}
    if key.endswith("caller"):
        return body(
            user | {"role": "assistant", "content": [USE]}, {"role": "user", "content": "b"}
        )
    if "content[].content[]" in key:
        result = {"type": "tool_result", "tool_use_id": "t1", "content": [WORDS]}
        called = {"role": "assistant", "content": [USE]}
        return body(called, {"role": "user", "content": [result]})
    return body(user, system=[WORDS], tools=[TOOL])


def test_every_ignored_parameter_has_a_row():
    assert IGNORED.keys() == MessagesBody.without_effect


@pytest.mark.parametrize("key", IGNORED)
def test_what_is_ignored_is_named(key):
    data = around(key)
    plain, _ = asked(data)
    if key.endswith("caller"):
        first, last = data["messages"]
        more = data | {"messages": [holding(key[11:], IGNORED[key], first), last]}
    elif "content[].content[]" in key:
        first, last = data["messages"]
        more = data | {"messages": [first, holding(key[11:], IGNORED[key], last)]}
    else:
        more = holding(key, IGNORED[key], data)
    job, answer = asked(more)
    assert job == plain
    assert answer.headers[IGNORED_HEADER] == key


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, "thinking.display"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "redacted_thinking", "data": "x"},
                            {"type": "text", "text": "b"},
                        ],
                    },
                    {"role": "user", "content": "c"},
                ]
            },
            "redacted_thinking",
        ),
    ],
)
def test_what_is_ignored_within_is_named(given_, name):
    _, answer = asked(body() | given_)
    assert answer.headers[IGNORED_HEADER] == name


def test_betas_are_named_too():
    headers = {"anthropic-beta": "some-2025-01-01", "anthropic-version": "2023-06-01"}
    answer = client_of().post("/v1/messages?beta=true", json=body(), headers=headers)
    assert answer.headers[IGNORED_HEADER] == "betas"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MessagesBody.refused)
def test_what_is_refused_is_named(key):
    told = refused(body() | {key: {"a": 1}})
    assert told["type"] == "invalid_request_error"
    assert told["message"].startswith(f"{key}: ")


@pytest.mark.parametrize(
    "key",
    [
        *MessagesBody.refused,
        *sorted(MessagesBody.model_fields.keys() - {"model", "max_tokens", "messages"}),
    ],
)
def test_null_is_not_given(key):
    plain, _ = asked(body())
    job, answer = asked(body() | {key: None})
    assert job == plain
    assert IGNORED_HEADER not in answer.headers


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"seed": 1}, "unknown parameter 'seed'"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"system": 5}, "system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
            "unknown parameter 'messages[0].content[0].b'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text: ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            "'document'",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "'tool'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]},
            "tools[0].type: it runs on Anthropic's machines",
        ),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "clock"}},
            "tool_choice.name: no tool is named 'clock'",
        ),
        ({"thinking": {"type": "between_tools"}}, "'between_tools'"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [USE]},
                ]
            },
            "tool_result",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t9"}],
                    }
                ]
            },
            "messages[0].content[0].tool_use_id",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "thinking": "b"}],
                    },
                ]
            },
            "messages[1].content[0].signature",
        ),
        (
            {
                "thinking": {"type": "enabled", "budget_tokens": 5},
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
            },
            "thinking",
        ),
    ],
)
def test_what_cannot_be_honoured_is_named(given_, words):
    assert words in refused(body() | given_)["message"]


def test_thinking_that_the_model_cannot_do_is_refused_unless_it_may_choose():
    service = FakeService(cards=(BLIND,))
    told = refused(body(thinking={"type": "enabled", "budget_tokens": 5}), service=service)
    assert "cannot think" in told["message"]
    assert not asked(body(thinking={"type": "adaptive"}), service)[0].thinking


def test_counting_takes_no_sampling():
    answer = client_of().post("/v1/messages/count_tokens", json=body())
    assert answer.status_code == 400
    assert "max_tokens" in answer.json()["error"]["message"]
    assert CountBody.refused.keys() <= MessagesBody.refused.keys()


def test_a_body_that_is_no_object_is_refused():
    for data in ("", "[]", "{", "NaN"):
        answer = client_of().post("/v1/messages", content=data)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_usage_of_a_model_without_a_drafter_says_nothing_of_drafts():
    assert CARD.drafter is None
    assert "draft" not in asked(body())[1].json()["usage"]
