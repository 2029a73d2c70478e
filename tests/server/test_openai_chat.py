"""/v1/chat/completions against a scripted engine."""

import json

import pytest

from optiq.engine.events import (
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallFailed,
    ToolCallStarted,
    Usage,
)
from optiq.engine.grammar import Grammar
from optiq.errors import EngineFailure, RequestRejected
from optiq.server.jobs import Piece, Said, Started, Written
from optiq.server.openai.replies import ChatChunk, ChatCompletion
from tests.server.apps_openai import client_of
from tests.server.fake import CARD, FakeService, ended, piece, said

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = [
    Said(0, ToolCallStarted(0, "call_1", "weather")),
    Said(0, ToolCallDelta(0, '{"city":')),
    Said(0, ToolCallDelta(0, '"Rome"}')),
    Said(0, ToolCallDone(0, "call_1", "weather", '{"city":"Rome"}')),
]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


def ask(service=None, messages=USER, **rest):
    service = service or FakeService()
    return client_of(service).post(PATH, json={"messages": messages, **rest})


def job_of(messages=USER, **rest):
    """What the engine is asked."""
    service = FakeService()
    response = ask(service, messages, **rest)
    assert response.status_code == 200, response.text
    return service.jobs[0]


def fault_of(messages=USER, service=None, **rest):
    """The error of a request that never reaches the engine."""
    service = service or FakeService()
    response = ask(service, messages, **rest)
    assert response.status_code == 400
    assert service.jobs == []
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def chunks_of(response):
    """The events of a stream, and whether it ends with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


def test_an_answer():
    body = ask().json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0},
    }


def test_usage_counts_the_prompt_once_and_names_the_drafter_where_there_is_one():
    usage = Usage(3, 5, reasoning_tokens=2, cached_tokens=1, drafted_tokens=4, accepted_tokens=3)
    other = Usage(3, 7, reasoning_tokens=1, cached_tokens=3, drafted_tokens=2, accepted_tokens=1)
    script = (
        Started(3),
        *said("a"),
        *said("b", 1),
        ended(usage=usage),
        ended("stop", 1, usage=other),
    )
    with_drafter = CARD.__class__(**{**vars(CARD), "drafter": "gemma4"})
    body = ask(FakeService(script, cards=(with_drafter,)), n=2).json()
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 3, "accepted_prediction_tokens": 4},
        "draft": {"proposed": 6, "accepted": 4},
    }
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "b"]


def test_a_stream_is_the_role_the_text_the_end_and_the_usage():
    chunks = chunks_of(ask(stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0] for chunk in chunks[:-1]] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"index": 0, "delta": {"content": "Hello"}, "finish_reason": None},
        {"index": 0, "delta": {"content": " world"}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4


def test_chunks_are_what_the_document_says():
    script = (Started(3), Said(0, ReasoningDelta("hm")), *CALL, *said("Yes"), ended())
    options = {"stream_options": {"include_usage": True}, "logprobs": True, "tools": [WEATHER]}
    for chunk in chunks_of(ask(FakeService(script), stream=True, **options)):
        ChatChunk.model_validate(chunk, strict=True, extra="forbid")
    body = ask(FakeService(script), **options)
    ChatCompletion.model_validate(body.json(), strict=True, extra="forbid")
    assert body.headers["x-optiq-ignored"] == "stream_options.include_usage"


@pytest.mark.parametrize("options", [{}, {"stream_options": {}}, {"stream_options": None}])
def test_a_stream_has_no_usage_unasked(options):
    chunks = chunks_of(ask(stream=True, **options))
    assert not any("usage" in chunk for chunk in chunks)


def test_several_answers_are_streamed_side_by_side():
    script = (Started(3), *said("a"), *said("b", 1), ended("length", 1), *said("c"), ended())
    chunks = chunks_of(ask(FakeService(script), n=2, stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "ac", 1: "b"}
    ends = [(c["choices"][0]["index"], c["choices"][0]["finish_reason"]) for c in chunks]
    assert [end for end in ends if end[1]] == [(1, "length"), (0, "stop")]


def test_thinking_is_told_apart_and_read_back():
    script = (Started(3), Said(0, ReasoningDelta("hm")), *said("Yes"), ended())
    message = ask(FakeService(script)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Yes")
    deltas = [c["choices"][0]["delta"] for c in chunks_of(ask(FakeService(script), stream=True))]
    assert deltas[1:3] == [{"reasoning_content": "hm"}, {"content": "Yes"}]
    assert job_of([*USER, message, *USER]).prompt[1] == {
        "role": "assistant",
        "content": "Yes",
        "reasoning_content": "hm",
    }


def test_calls_are_whole_in_a_body():
    script = (Started(3), *CALL, ended("tool_calls"))
    choice = ask(FakeService(script), tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
        }
    ]


def test_calls_are_streamed_as_they_are_written():
    script = (Started(3), *CALL, ended("tool_calls"))
    chunks = chunks_of(ask(FakeService(script), tools=[WEATHER], stream=True))
    deltas = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in chunks]
    assert deltas == [
        None,
        [
            {
                "index": 0,
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": ""},
            }
        ],
        [{"index": 0, "function": {"arguments": '{"city":'}}],
        [{"index": 0, "function": {"arguments": '"Rome"}'}}],
        None,
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_cannot_be_read_is_text():
    script = (
        Started(3),
        *CALL[:2],
        Said(0, ToolCallFailed((0,), "cut off")),
        Said(0, TextDelta("call:weather{")),
        ended("length", failed_calls=1),
    )
    choice = ask(FakeService(script), tools=[WEATHER]).json()["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == "call:weather{"
    assert choice["finish_reason"] == "length"


def test_log_probabilities_have_bytes_and_as_many_alternatives_as_asked():
    half = Piece(7, b"\xe2\x82", -0.25, ((7, b"\xe2\x82", -0.25), (8, b"x", -2.0), (9, b"y", -3.0)))
    script = (Started(3), Written(0, (half, piece("A"))), Said(0, TextDelta("\u20acA")), ended())
    body = ask(FakeService(script), logprobs=True, top_logprobs=2).json()
    first, second = body["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "\ufffd",
        "logprob": -0.25,
        "bytes": [0xE2, 0x82],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.25, "bytes": [0xE2, 0x82]},
            {"token": "x", "logprob": -2.0, "bytes": [120]},
        ],
    }
    assert second["token"] == "A"
    chunks = chunks_of(ask(FakeService(script), logprobs=True, top_logprobs=2, stream=True))
    streamed = [chunk["choices"][0].get("logprobs") for chunk in chunks]
    assert [one["content"] for one in streamed if one] == [[first, second]]


def test_log_probabilities_of_tokens_without_text_come_with_the_end():
    script = (Started(3), *said("A"), Written(0, (piece("<end>"),)), ended())
    chunks = chunks_of(ask(FakeService(script), logprobs=True, stream=True))
    last = chunks[-1]["choices"][0]
    assert last["finish_reason"] == "stop"
    assert [entry["token"] for entry in last["logprobs"]["content"]] == ["<end>"]
    assert last["logprobs"]["content"][0]["top_logprobs"] == []


# -- what the engine is asked ----------------------------------------------------------------------


def test_settings_reach_the_engine():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 3,
    }
    job = job_of(**given, logit_bias={"12": -100}, stop="END", max_completion_tokens=9, n=1)
    assert job.sampling == given | {"logit_bias": {12: -100.0}, "stop": ("END",), "max_tokens": 9}
    assert job.choices == 1


def test_all_that_the_openai_package_can_send_and_we_serve():
    given = {
        "frequency_penalty": -2,
        "logit_bias": {"5": 0},
        "logprobs": True,
        "max_completion_tokens": 0,
        "max_tokens": 0,
        "metadata": {"foo": "string"},
        "modalities": ["text"],
        "n": 1,
        "parallel_tool_calls": True,
        "prediction": {"content": "string", "type": "content"},
        "presence_penalty": -2,
        "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
        "prompt_cache_retention": "in_memory",
        "reasoning_effort": "none",
        "response_format": {"type": "text"},
        "safety_identifier": "id",
        "seed": -9007199254740991,
        "service_tier": "auto",
        "stop": "\n",
        "store": True,
        "stream": False,
        "stream_options": {"include_obfuscation": True, "include_usage": True},
        "temperature": 1,
        "tool_choice": "none",
        "tools": [WEATHER],
        "top_logprobs": 0,
        "top_p": 1,
        "user": "user",
        "verbosity": "medium",
    }
    message = {"content": "string", "role": "developer", "name": "name"}
    assert job_of([message], **given).sampling["max_tokens"] == 0


def test_what_was_not_given_is_left_to_the_checkpoint():
    names = ["temperature", "top_p", "seed", "stop", "n", "logit_bias", "max_tokens", "tools"]
    names += ["response_format", "logprobs", "top_logprobs", "tool_choice", "stream_options"]
    names += ["model", "stream", "reasoning_effort", "store", "audio", "functions", "user"]
    assert job_of(**dict.fromkeys(names)) == job_of()
    assert job_of().sampling == {}


@pytest.mark.parametrize(
    ("given", "stop"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], None), (None, None)]
)
def test_stop(given, stop):
    assert job_of(stop=given).sampling.get("stop") == stop


def test_older_name_of_the_limit():
    assert job_of(max_tokens=0).sampling["max_tokens"] == 0
    assert job_of(max_tokens=4, max_completion_tokens=4).sampling["max_tokens"] == 4
    assert fault_of(max_tokens=4, max_completion_tokens=5)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, Grammar("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}},
            Grammar("json_schema", {"type": "null"}),
        ),
        ({"type": "regex", "pattern": "a+"}, Grammar("regex", "a+")),
        ({"type": "choice", "choices": ["a", "b"]}, Grammar("choice", ("a", "b"))),
        ({"type": "lark", "grammar": "start: /a/"}, Grammar("lark", "start: /a/")),
    ],
)
def test_response_format(given, grammar):
    assert job_of(response_format=given).grammar == grammar


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("auto", None)),
        ("none", ("none", None)),
        ("required", ("required", None)),
        ({"type": "function", "function": {"name": "weather"}}, ("required", "weather")),
    ],
)
def test_tool_choice(given, expected):
    job = job_of(tools=[WEATHER], tool_choice=given, parallel_tool_calls=False)
    assert (job.tool_choice, job.function) == expected
    assert job.tools == (WEATHER,)
    assert not job.parallel_tool_calls


@pytest.mark.parametrize(
    ("given", "thinks"),
    [
        ({}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {}, "reasoning_effort": "high"}, True),
    ],
)
def test_thinking(given, thinks):
    assert job_of(**given).thinking is thinks


def test_a_budget_of_thinking():
    assert job_of(reasoning_effort="high", thinking_budget=20).thinking_budget == 20
    assert fault_of(thinking_budget=20)["param"] == "thinking_budget"
    budgets = [job_of(reasoning_effort=e).thinking_budget for e in ("minimal", "low", "high")]
    assert budgets == [256, 1024, None]
    assert job_of(chat_template_kwargs={"enable_thinking": True}).thinking_budget is None


def test_the_last_message_can_be_continued():
    talk = [*USER, {"role": "assistant", "content": "Well,"}]
    job = job_of(talk, continue_final_message=True, add_generation_prompt=False)
    assert job.continue_final
    assert not job_of(talk, add_generation_prompt=True).continue_final
    for prompted, continued in [(False, None), (True, True), (False, False)]:
        error = fault_of(talk, add_generation_prompt=prompted, continue_final_message=continued)
        assert error["param"] == "add_generation_prompt"
    assert fault_of(USER, continue_final_message=True)["param"] == "continue_final_message"


def test_messages_of_all_roles_reach_the_engine():
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}], "name": "s"},
        {"role": "user", "content": "One"},
        {"role": "user", "content": "Two", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    assert job_of(talk, tools=[WEATHER]).prompt == (
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "name": "s", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "One"},
        {"role": "user", "name": "Ann", "content": "Two"},
        {"role": "assistant", "tool_calls": [call], "content": None},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    )


def test_an_answer_can_be_sent_back_as_it_came():
    script = (Started(3), *CALL, ended("tool_calls"))
    message = ask(FakeService(script), tools=[WEATHER]).json()["choices"][0]["message"]
    extras = {"audio": None, "function_call": None, "annotations": []}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    assert (
        job_of([*USER, message | extras, result]).prompt[1]["tool_calls"] == (message["tool_calls"])
    )


def test_images_stand_in_their_order():
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BB", "detail": "low"}}
    low = {"type": "image_url", "image_url": IMAGE["image_url"] | {"detail": "low"}}
    talk = [{"role": "user", "content": [low, {"type": "text", "text": "and"}, other]}]
    job = job_of(talk)
    assert job.prompt[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
    ]
    assert job.images == (b"data:image/png;base64,AA", b"data:image/png;base64,BB")
    assert job.image_detail == "low"
    talk[0]["content"][0] = IMAGE
    assert fault_of(talk)["param"] == "messages[0].content[2].image_url.detail"


def test_images_of_results_follow_the_results():
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    talk = [
        *USER,
        {"role": "assistant", "tool_calls": [call | {"id": "a"}, call | {"id": "b"}]},
        {"role": "tool", "tool_call_id": "a", "content": [IMAGE]},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "See"}, IMAGE]},
    ]
    expected = [
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "See"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
    ]
    assert list(job_of(talk).prompt[2:]) == expected
    assert list(job_of([*talk, *USER]).prompt[2:]) == [*expected, *USER]


def test_images_of_a_model_that_reads_none_are_not_even_fetched():
    blind = CARD.__class__(**{**vars(CARD), "vision": False})
    service = FakeService(cards=(blind,))
    client = client_of(service)
    talk = [{"role": "user", "content": [IMAGE]}]
    response = client.post(PATH, json={"messages": talk})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    assert client.app.state.images.fetched == []


def test_an_image_that_cannot_be_had_names_its_place():
    where = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}
    error = fault_of([{"role": "user", "content": [{"type": "text", "text": "?"}, where]}])
    assert error["param"] == "messages[0].content[1].image_url.url"


def test_thinking_of_a_model_that_cannot_is_refused():
    plain = CARD.__class__(**{**vars(CARD), "thinking": False})
    error = fault_of(service=FakeService(cards=(plain,)), reasoning_effort="low")
    assert error["param"] == "reasoning_effort"
    assert ask(FakeService(cards=(plain,)), reasoning_effort="none").status_code == 200


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 1}, "stop"),
        ({"stop": ""}, "stop"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": "1"}, "seed"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"logit_bias": {"foo": 0}}, "logit_bias.foo"),
        ({"logit_bias": {"-1": 0}}, "logit_bias.-1"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern"),
        ({"response_format": {"type": "choice", "choices": []}}, "response_format.choices"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [WEATHER]},
            "tool_choice",
        ),
        (
            {
                "reasoning_effort": "none",
                "chat_template_kwargs": {"enable_thinking": True},
            },
            "reasoning_effort",
        ),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages[0].y"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "y": 1}]}]},
            "messages[0].content[0].y",
        ),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0]"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"messages": [{"role": "system", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    ],
)
def test_faults_name_the_parameter(given, param):
    error = fault_of(**given)
    assert error["param"] == param
    assert param in error["message"]


def test_a_missing_parameter_is_named():
    response = client_of().post(PATH, json={"model": "tiny"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff\xfe{}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_json_object(raw):
    service = FakeService()
    response = client_of(service).post(PATH, content=raw)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert service.jobs == []


def test_an_unknown_model():
    response = ask(model="gpt-4")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


# -- faults of the engine --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(stream):
    full = RequestRejected("the queue is full", http_status=429, retry_after_s=2)
    response = ask(FakeService(full), stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "rate_limit_exceeded"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(stream):
    error = RequestRejected("too long", code="context_length_exceeded", param="messages")
    response = ask(FakeService((error,)), stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_failure_of_the_engine_is_an_error_of_the_server():
    response = ask(FakeService((Started(3), *said("A"), EngineFailure("out of memory"))))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "fault",
    [
        EngineFailure("out of memory"),
        RequestRejected("out of time", http_status=504),
        ended("cancelled"),
    ],
)
def test_a_stream_that_fails_ends_with_an_error(fault):
    service = FakeService((Started(3), *said("A"), fault))
    *_, last = chunks_of(ask(service, stream=True))
    assert last["error"]["type"] == "server_error"
    assert service.streams[0].cancelled


def test_an_answer_that_was_ended_early_is_no_success():
    response = ask(FakeService((Started(3), *said("A"), ended("cancelled"))))
    assert response.status_code == 503


def test_finish_reasons():
    for reason in ("stop", "length", "tool_calls"):
        script = (Started(3), Said(0, Finished(reason, Usage(3, 1))))
        assert ask(FakeService(script)).json()["choices"][0]["finish_reason"] == reason
