"""Requests that kill or fool other servers, one each: here they are answered or refused.

Faults that lie in an engine are its own tests; here stands what a protocol has to do with them.
"""

import pytest

from optiq.engine.grammar import Grammar
from optiq.errors import RequestRejected
from tests.server.apps_openai import client_of
from tests.server.fake import FakeService

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def test_a_list_of_prompts():
    response = client_of().post(TEXT, json={"prompt": ["hi", "yo"]})
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1]


def test_a_prompt_that_is_an_earlier_prompt_and_its_answer():
    client = client_of()
    text = client.post(TEXT, json={"prompt": "Hi"}).json()["choices"][0]["text"]
    assert client.post(TEXT, json={"prompt": "Hi" + text}).status_code == 200


def test_a_stop_that_is_a_number():
    service = FakeService()
    response = client_of(service).post(CHAT, json={"messages": USER, "stop": [1]})
    assert response.status_code == 400
    assert service.jobs == []


def test_a_bias_on_a_token_that_no_model_has():
    def check(job):
        assert job.sampling["logit_bias"] == {99999999: 5}
        return RequestRejected("logit_bias names token 99999999", param="logit_bias")

    body = {"messages": USER, "logit_bias": {"99999999": 5}}
    response = client_of(FakeService(check)).post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logit_bias"


def test_a_server_without_models():
    response = client_of(FakeService(cards=())).get("/v1/models")
    assert response.status_code == 200
    assert response.json()["data"] == []


@pytest.mark.parametrize(
    ("path", "given"),
    [
        (CHAT, {"max_tokens": None}),
        (CHAT, {"temperature": None}),
        (CHAT, {"stream_options": {}}),
        (CHAT, {"stream_options": {}, "stream": True}),
        (TEXT, {"max_tokens": None}),
        (TEXT, {"temperature": None}),
        (TEXT, {"logprobs": 2}),
        (TEXT, {"prompt": [1, 2]}),
        (TEXT, {"stream_options": {}, "stream": True}),
    ],
)
def test_what_the_protocol_allows(path, given):
    least = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    response = client_of().post(path, json=least | given)
    assert response.status_code == 200
    if "stream" in given:
        assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "given", "field", "value"),
    [
        (CHAT, {"n": 2}, "choices", 2),
        (TEXT, {"n": 2}, "choices", 2),
        (CHAT, {"response_format": {"type": "json_object"}}, "grammar", Grammar("json_object")),
        (CHAT, {"tool_choice": "required", "tools": [TOOL]}, "tool_choice", "required"),
        (TEXT, {"echo": True}, "echo", True),
    ],
)
def test_nothing_is_ignored_in_silence(path, given, field, value):
    least = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    service = FakeService(RequestRejected("asked"))
    client_of(service).post(path, json=least | given)
    assert getattr(service.jobs[0], field) == value


@pytest.mark.parametrize(
    ("body", "fault", "status"),
    [
        ({"messages": USER}, RequestRejected("the model failed", http_status=500), 500),
        ({"messages": USER}, RequestRejected("no such token"), 400),
        ({"messages": [{"role": "user", "content": {"x": 1}}]}, None, 400),
    ],
)
def test_errors_have_the_status_and_shape_of_the_protocol(body, fault, status):
    response = client_of(FakeService(fault)).post(CHAT, json=body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
