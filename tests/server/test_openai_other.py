"""/v1/embeddings, /v1/models, /tokenize, /detokenize, and the document of all routes."""

import base64
import struct

import jsonschema
import pytest

from optiq.server.jobs import CountJob, DetokenizeJob, EmbedJob, GenerateJob
from tests.server.apps_openai import app_of, client_of
from tests.server.fake import CARD, FakeService


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hi", ("Hi",)),
        (["Hi", "Ho"], ("Hi", "Ho")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_what_is_embedded(given, expected):
    service = FakeService()
    body = {"input": given, "dimensions": 2, "encoding_format": None, "user": "Ann"}
    response = client_of(service).post("/v1/embeddings", json=body)
    assert response.status_code == 200
    assert response.headers["x-optiq-ignored"] == "user"
    assert service.jobs == [EmbedJob("tiny", expected, 2)]
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(expected)))
    assert data[0] == {"object": "embedding", "index": 0, "embedding": [1.0, 0.0]}
    assert response.json()["usage"] == {
        "prompt_tokens": 2 * len(expected),
        "total_tokens": 2 * len(expected),
    }


def test_embeddings_in_base64():
    body = {"input": "Hi", "encoding_format": "base64"}
    (one,) = client_of().post("/v1/embeddings", json=body).json()["data"]
    assert struct.unpack("<2f", base64.b64decode(one["embedding"])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [1, "a"]}, "input[1]"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "task": "x"}, "task"),
    ],
)
def test_faults_of_embeddings_name_the_parameter(body, param):
    response = client_of().post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param.split("[")[0])


def test_models_have_the_fields_of_both_dialects():
    body = client_of().get("/v1/models").json()
    assert (body["object"], body["has_more"]) == ("list", False)
    assert body["first_id"] == body["last_id"] == "tiny"
    (model,) = body["data"]
    assert {
        "id": "tiny",
        "object": "model",
        "owned_by": "optiq",
        "created": 1_700_000_000,
        "type": "model",
        "display_name": "tiny",
        "created_at": "2023-11-14T22:13:20Z",
        "context_length": 4096,
    }.items() <= model.items()
    assert model["capabilities"]["image_input"] == {"supported": True}
    assert model["capabilities"]["drafter"] == {"supported": False}
    assert client_of().get("/v1/models/tiny").json() == model


def test_no_models_are_an_empty_list():
    body = client_of(FakeService(cards=())).get("/v1/models").json()
    assert body["data"] == []
    assert body["first_id"] is None


@pytest.mark.parametrize("name", ["gpt-4", "a/b", ""])
def test_a_model_that_is_not_there(name):
    response = client_of().get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_names_with_a_slash():
    card = CARD.__class__(**{**vars(CARD), "name": "org/model"})
    assert client_of(FakeService(cards=(card,))).get("/v1/models/org/model").status_code == 200


def test_tokens_of_a_text():
    service = FakeService()
    body = {"prompt": "Hi!", "return_token_strs": True, "add_special_tokens": True}
    assert client_of(service).post("/tokenize", json=body).json() == {
        "count": 2,
        "max_model_len": 4096,
        "tokens": [2, 1],
        "token_strs": ["Hi", "!"],
    }
    assert service.jobs == [CountJob(GenerateJob("tiny", "Hi!"))]


def test_tokens_of_a_conversation():
    service = FakeService()
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    assert client_of(service).post("/tokenize", json=body).json()["token_strs"] is None
    (job,) = service.jobs
    assert job.prompt.thinking
    assert job.prompt.prompt == ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
        ({"prompt": 5}, "prompt"),
    ],
)
def test_faults_of_tokenize_name_the_parameter(body, param):
    response = client_of().post("/tokenize", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    taken = app_of().openapi()["paths"]["/tokenize"]["post"]["requestBody"]
    schema = taken["content"]["application/json"]["schema"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, schema)
    jsonschema.validate({"prompt": "a", "messages": None}, schema)
    jsonschema.validate({"messages": [{"role": "user", "content": "a"}]}, schema)


def test_text_of_tokens():
    service = FakeService()
    response = client_of(service).post("/detokenize", json={"tokens": [2, 1]})
    assert response.json() == {"prompt": "Hi!"}
    assert service.jobs == [DetokenizeJob("tiny", (2, 1))]
    assert client_of().post("/detokenize", json={"tokens": [True]}).status_code == 400


def test_the_document_has_every_body_and_answer():
    paths = app_of().openapi()["paths"]
    posts = {path: item["post"] for path, item in paths.items() if "post" in item}
    assert set(posts) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
    }
    for path, post in posts.items():
        body = post["requestBody"]["content"]["application/json"]["schema"]
        assert body["additionalProperties"] is False
        assert "$ref" not in str(body)
        answer = post["responses"]["200"]["content"]
        assert "$ref" in answer["application/json"]["schema"]
        assert ("text/event-stream" in answer) == path.endswith("completions")
        assert {"400", "404", "429", "500", "503"} <= set(post["responses"])
