"""The page of parameters is what the code does, row by row."""

import functools
from pathlib import Path

import pytest

from optiq.server.openai.tables import BODIES, markdown, tables
from tests.server.apps_openai import client_of
from tests.server.fake import FakeService

PAGE = Path(__file__).parents[2] / "docs/server/openai-parameters.md"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
LEAST = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PARSED = CALL | {"function": CALL["function"] | {"parsed_arguments": {}}}


def called(call=CALL, **rest):
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call], **rest}]}


IGNORED = {
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": True,
    "stream_options.include_obfuscation": {"stream_options": {"include_obfuscation": True}},
    "user": "u",
    "messages[].parsed": called(parsed={"a": 1}),
    "messages[].tool_calls[].index": called(CALL | {"index": 0}),
    "messages[].tool_calls[].function.parsed_arguments": called(PARSED),
}


def part(kind):
    return {"messages": [{"role": "user", "content": [{"type": kind, kind: {}}]}]}


REFUSED = {
    "audio": {"audio": {"voice": "alloy"}},
    "functions": {"functions": [{"name": "f"}]},
    "function_call": {"function_call": "none"},
    "moderation": {"moderation": {"model": "m"}},
    "web_search_options": {"web_search_options": {}},
    "suffix": {"suffix": "x"},
    "best_of other than n": {"best_of": 2},
    "messages[].content[].type=input_audio": part("input_audio"),
    "messages[].content[].type=file": part("file"),
    "messages[].content[].type=refusal": part("refusal"),
    "messages[].role=function": {"messages": [{"role": "function", "content": "x"}]},
    "tools[].type=custom": {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
    "tool_choice.type=allowed_tools": {"tool_choice": {"type": "allowed_tools"}},
    "tool_choice.type=custom": {"tool_choice": {"type": "custom", "custom": {"name": "f"}}},
    "modalities=audio": {"modalities": ["text", "audio"]},
    "verbosity other than medium": {"verbosity": "low"},
    "add_special_tokens=false": {"add_special_tokens": False},
}
HONOURED = {
    "messages": [USER, USER],
    "prompt": "Ho",
    "input": "Ho",
    "tokens": [1, 2],
    "model": "other",
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "stop": "x",
    "seed": 5,
    "logit_bias": {"1": 2},
    "response_format": {"type": "json_object"},
    "max_completion_tokens": 7,
    "max_tokens": 7,
    "logprobs": {"/v1/chat/completions": True, "/v1/completions": 2},
    "top_logprobs": 2,
    "tools": [TOOL],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": True},
    "thinking_budget": 5,
    "continue_final_message": True,
    "echo": True,
    "dimensions": 1,
    "encoding_format": "base64",
    "return_token_strs": True,
}
BESIDES = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "thinking_budget": {"reasoning_effort": "low"},
    "continue_final_message": {"messages": [USER, {"role": "assistant", "content": "A"}]},
}
# what a request can only confirm: another value is refused
CONFIRMED = {
    "add_generation_prompt": True,
    "modalities": ["text"],
    "verbosity": "medium",
    "best_of": 1,
    "add_special_tokens": True,
}
OF_MESSAGES = {
    "messages",
    "tools",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
}
ROWS = {
    kind: [(path, name) for path, table in tables().items() for name in getattr(table, kind)]
    for kind in ("honoured", "ignored", "refused")
}


@functools.cache
def service():
    card = FakeService().cards[0]
    other = card.__class__(**{**vars(card), "name": "other"})
    return FakeService(cards=(card, other))


def observed(path, body):
    """All that a request does: what the engine is asked, and the answer but for its name."""
    engine = service()
    engine.jobs.clear()
    response = client_of(engine).post(path, json=body)
    assert response.status_code == 200, response.text
    if "stream" in body:
        return tuple(engine.jobs), response.text.count("data: ")
    data = response.json()
    return tuple(engine.jobs), {key: data[key] for key in data if key not in {"id", "created"}}


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == markdown()


def test_every_parameter_is_in_one_table():
    for path, table in tables().items():
        rows = [*table.honoured, *table.ignored, *table.refused]
        assert len(rows) == len(set(rows))
        assert all(text for text in (table.honoured | table.ignored | table.refused).values())
        known = {name.partition(".")[0] for name in {*table.honoured, *table.ignored}}
        assert {name for name in known if "[" not in name} == set(BODIES[path].model_fields)


@pytest.mark.parametrize(("path", "name"), ROWS["honoured"])
def test_what_is_honoured_changes_something(path, name):
    least = dict(LEAST[path])
    if path == "/tokenize" and name in OF_MESSAGES:
        least = {"messages": [USER]}
    if name in CONFIRMED:
        assert observed(path, least | {name: CONFIRMED[name]}) == observed(path, least)
        return
    least |= BESIDES.get(name, {})
    value = HONOURED[name]
    value = value.get(path, value) if isinstance(value, dict) else value
    assert observed(path, least | {name: value}) != observed(path, least)


@pytest.mark.parametrize(("path", "name"), ROWS["ignored"])
def test_what_is_ignored_changes_nothing_and_is_named(path, name):
    given = IGNORED[name] if "." in name else {name: IGNORED[name]}
    without = called() if name.startswith("messages[]") else {}
    assert observed(path, LEAST[path] | given) == observed(path, LEAST[path] | without)
    response = client_of(service()).post(path, json=LEAST[path] | given)
    assert response.headers["x-optiq-ignored"] == name
    plain = client_of(service()).post(path, json=LEAST[path])
    assert "x-optiq-ignored" not in plain.headers


@pytest.mark.parametrize(("path", "name"), ROWS["refused"])
def test_what_is_refused_is_named(path, name):
    engine = service()
    engine.jobs.clear()
    response = client_of(engine).post(path, json=LEAST[path] | REFUSED[name])
    assert response.status_code == 400
    (key,) = REFUSED[name]
    assert response.json()["error"]["param"].startswith(key)
    assert engine.jobs == []


@pytest.mark.parametrize("path", LEAST)
def test_every_other_key_is_refused(path):
    response = client_of().post(path, json=LEAST[path] | {"never_heard_of": None})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "never_heard_of"
