"""Ollama's routes over a scripted engine."""

import base64
import json

import pytest
from hypothesis import given, settings

from optiq import __version__
from optiq.engine.grammar import Grammar
from optiq.errors import EngineFailure
from optiq.server.jobs import Started
from optiq.server.ollama_body import ChatBody, GenerateBody, Options
from optiq.server.wire import IGNORED_HEADER
from tests.server.apps_anthropic import client_of
from tests.server.fake import FakeService, ended, said
from tests.server.scripts import BLIND, EVERYTHING, USAGE, answers, broken, holding

PICTURE = base64.b64encode(b"png").decode()
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
BODIES = {
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/api/generate": {"model": "tiny", "prompt": "Hi"},
}
PATHS = list(BODIES)


def asked(path, service=None, **rest):
    service = service or FakeService()
    answer = client_of(service).post(path, json=BODIES[path] | rest)
    assert answer.status_code == 200, answer.text
    return service.jobs[-1], answer


def refused(path, status=400, service=None, **rest):
    answer = client_of(service).post(path, json=BODIES[path] | rest)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    return answer.json()["error"]


def lines(answer):
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


# -- the answer ------------------------------------------------------------------------------------


def test_a_chat_has_thinking_text_and_calls():
    told = asked("/api/chat", FakeService(EVERYTHING), stream=False)[1].json()
    assert told["message"] == {
        "role": "assistant",
        "content": "I look it up.",
        "thinking": "Let me see.",
        "tool_calls": [
            {
                "id": "call_0",
                "function": {"name": "weather", "arguments": {"city": "Oslo"}, "index": 0},
            },
            {"id": "call_1", "function": {"name": "clock", "arguments": {}, "index": 1}},
        ],
    }
    assert told["done"]
    assert told["done_reason"] == "stop"
    assert told["prompt_eval_count"] == USAGE.prompt_tokens
    assert told["eval_count"] == USAGE.completion_tokens
    rest = told["total_duration"] - told["prompt_eval_duration"] - told["eval_duration"]
    assert abs(rest) < 10  # rounding


@settings(max_examples=30)
@given(answers())
def test_a_stream_adds_up_to_the_whole_chat(script):
    whole = asked("/api/chat", FakeService(script), stream=False)[1].json()["message"]
    parts = [line["message"] for line in lines(asked("/api/chat", FakeService(script))[1])]
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert "".join(part.get("thinking", "") for part in parts) == whole.get("thinking", "")
    calls = [one for part in parts for one in part.get("tool_calls", [])]
    assert calls == whole.get("tool_calls", [])


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_ends_with_the_counts(path):
    *parts, last = lines(asked(path)[1])
    assert [part["done"] for part in parts] == [False, False]
    assert last["done"]
    assert last["eval_count"] == 2


def test_a_generated_text_is_a_response():
    told = asked("/api/generate", FakeService(EVERYTHING), stream=False)[1].json()
    assert (told["response"], told["thinking"]) == ("I look it up.", "Let me see.")


def test_the_limit_is_named():
    script = (Started(3), *said("a"), ended("length"))
    assert lines(asked("/api/chat", FakeService(script))[1])[-1]["done_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_cannot_be_read_is_text(stream):
    service = FakeService((Started(3), *broken(0, "f", "call:f{"), ended(failed_calls=1)))
    answer = asked("/api/chat", service, tools=[TOOL], stream=stream)[1]
    found = lines(answer) if stream else [answer.json()]
    assert found[0]["message"] == {"role": "assistant", "content": "call:f{"}


def test_a_failure_in_mid_stream_is_the_last_line():
    script = (Started(3), *said("a"), EngineFailure("the engine died"))
    assert lines(asked("/api/chat", FakeService(script))[1])[-1] == {"error": "the engine died"}


def test_models_are_listed():
    client = client_of()
    (model,) = client.get("/api/tags").json()["models"]
    assert model == {
        "name": "tiny",
        "model": "tiny",
        "modified_at": "2023-11-14T22:13:20Z",
        "size": 1000,
        "digest": "",
        "details": {"format": "mlx", "quantization_level": "4.50 bpw"},
    }
    assert client.get("/api/version").json() == {"version": __version__}
    shown = client.post("/api/show", json={"model": "tiny", "verbose": True})
    assert shown.json()["capabilities"] == ["completion", "vision", "tools", "thinking"]
    assert shown.json()["model_info"] == {"general.context_length": 4096}
    assert shown.headers[IGNORED_HEADER] == "verbose"
    assert client.post("/api/show", json={"model": "gpt"}).status_code == 404


# -- what is honoured ------------------------------------------------------------------------------

OPTIONS = [
    ("temperature", 0.5, {"temperature": 0.5}),
    ("top_p", 0.5, {"top_p": 0.5}),
    ("top_k", 3, {"top_k": 3}),
    ("min_p", 0.1, {"min_p": 0.1}),
    ("seed", 7, {"seed": 7}),
    ("num_predict", 5, {"max_tokens": 5}),
    ("num_predict", -1, {}),
    ("stop", "a", {"stop": ("a",)}),
    ("stop", ["a", "b"], {"stop": ("a", "b")}),
    ("repeat_penalty", 1.2, {"repetition_penalty": 1.2}),
    ("presence_penalty", 0.5, {"presence_penalty": 0.5}),
    ("frequency_penalty", 0.5, {"frequency_penalty": 0.5}),
    ("repeat_last_n", -1, {}),
    ("penalize_newline", True, {}),
    ("tfs_z", 1, {}),
    ("typical_p", 1.0, {}),
    ("mirostat", 0, {}),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("key", "value", "sampling"), OPTIONS)
def test_options_reach_the_engine(path, key, value, sampling):
    job, answer = asked(path, options={key: value})
    assert job.sampling == sampling
    assert IGNORED_HEADER not in answer.headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given_", "field", "value"),
    [
        ({"model": "default_model"}, "model", "tiny"),
        ({"stream": False}, "choices", 1),
        ({"think": True}, "thinking", True),
        ({"think": "low"}, "thinking_budget", 1024),
        ({"think": False}, "thinking", False),
        ({"format": "json"}, "grammar", Grammar("json_object")),
        ({"format": ""}, "grammar", None),
        ({"format": {"type": "array"}}, "grammar", Grammar("json_schema", {"type": "array"})),
    ],
)
def test_what_is_honoured_reaches_the_engine(path, given_, field, value):
    job, answer = asked(path, **given_)
    assert getattr(job, field) == value
    assert IGNORED_HEADER not in answer.headers


def test_a_conversation_reaches_the_engine_whole():
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Look", "images": [PICTURE]},
        {"role": "assistant", "thinking": "Hm.", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_name": "weather", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    job, _ = asked("/api/chat", messages=messages, tools=[TOOL])
    made = [{"id": f"call_{i}", "type": "function", "function": call["function"]} for i in range(2)]
    assert job.prompt == (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look"}]},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": made,
        },
        {"role": "tool", "content": "rain", "tool_call_id": "call_0", "name": "weather"},
        {"role": "tool", "content": "sun", "tool_call_id": "call_1", "name": "weather"},
    )
    assert job.images == (b"png",)
    assert job.tools[0]["function"]["name"] == "weather"


def test_a_prompt_is_a_conversation_or_raw():
    job, _ = asked("/api/generate", system="Be brief", images=[PICTURE])
    assert job.prompt == (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
    )
    assert asked("/api/generate", raw=True)[0].prompt == "Hi"
    assert "raw" in refused("/api/generate", raw=True, system="a")


# -- what is ignored, and what is refused ----------------------------------------------------------

IGNORED = {
    "keep_alive": "5m",
    "options.f16_kv": True,
    "options.logits_all": True,
    "options.low_vram": True,
    "options.main_gpu": 0,
    "options.mirostat_eta": 0.1,
    "options.mirostat_tau": 5.0,
    "options.num_batch": 8,
    "options.num_ctx": 2048,
    "options.num_gpu": 1,
    "options.num_keep": 4,
    "options.num_thread": 2,
    "options.numa": False,
    "options.use_mlock": True,
    "options.use_mmap": True,
    "options.vocab_only": False,
}


IN_CALLS = {
    "messages[].tool_calls[].function.description": "a",
    "messages[].tool_calls[].function.index": 1,
}


@pytest.mark.parametrize("key", IN_CALLS)
def test_what_is_ignored_of_calls_is_named(key):
    call = {"function": {"name": "weather", "arguments": {}}}
    data = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    plain, _ = asked("/api/chat", **data)
    job, answer = asked("/api/chat", **holding(key, IN_CALLS[key], data))
    assert job == plain
    assert answer.headers[IGNORED_HEADER] == key


def test_every_parameter_has_a_row():
    assert IGNORED.keys() == GenerateBody.without_effect
    assert ChatBody.without_effect == IGNORED.keys() | IN_CALLS.keys()
    ignored = {key.removeprefix("options.") for key in IGNORED}
    assert {key for key, _, _ in OPTIONS} == Options.model_fields.keys() - ignored


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", IGNORED)
def test_what_is_ignored_is_named(path, key):
    plain, _ = asked(path)
    job, answer = asked(path, **holding(key, IGNORED[key]))
    assert job == plain
    assert answer.headers[IGNORED_HEADER] == key


@pytest.mark.parametrize(
    ("path", "key"),
    [("/api/chat", key) for key in ChatBody.refused]
    + [("/api/generate", key) for key in GenerateBody.refused],
)
def test_what_is_refused_is_named(path, key):
    assert refused(path, **{key: [1]}).startswith(f"{key}: ")
    assert asked(path, **{key: None})[0] == asked(path)[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given_", "word"),
    [
        ({"echo": 1}, "echo"),
        ({"format": "yaml"}, "format"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"options": {"repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"options": {"penalize_newline": False}}, "options.penalize_newline"),
        ({"options": {"temprature": 1}}, "options.temprature"),
        ({"options": {"num_predict": -3}}, "options.num_predict"),
    ],
)
def test_what_cannot_be_honoured_is_named(path, given_, word):
    assert word in refused(path, **given_)


def test_results_without_a_call_and_thinking_without_the_gift_are_refused():
    stray = [{"role": "tool", "tool_name": "clock", "content": "9"}]
    assert "clock" in refused("/api/chat", messages=stray)
    assert "think" in refused("/api/chat", think=True, service=FakeService(cards=(BLIND,)))


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_model_is_not_found(path):
    assert "gpt" in refused(path, 404, model="gpt")
