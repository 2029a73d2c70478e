"""The application around the protocols: its state, its document, its refusals."""

import asyncio

import pytest
from starlette.testclient import TestClient

from optiq.configs import ServeConfig
from optiq.errors import EngineFailure, UsageError
from optiq.server.app import create_app
from tests.server.local import app_of
from tests.server.managed import Figures, ManagedService

OWN = "http://127.0.0.1:8080"


def client_of(service=None, **options):
    return TestClient(app_of(service, **options), base_url=OWN)


def test_health_is_of_the_server_and_ready_of_the_engine():
    service = ManagedService(not_ready="the model is being loaded")
    client = client_of(service)
    assert client.get("/health").json() == {"status": "ok"}
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "reason": "the model is being loaded"}
    service.not_ready = ""
    assert client.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("path", "key"), [("/v1/nix", "code"), ("/v1/messages/nix", "type"), ("/api/nix", None)]
)
def test_unknown_routes_are_refused_in_dialect(path, key):
    for answer in (client_of().get(path), client_of().post(path, json={})):
        assert answer.status_code == 404
        body = answer.json()
        assert "/openapi.json" in answer.text
        assert isinstance(body["error"], str) if key is None else key in body["error"]
        assert body.get("type") == ("error" if key == "type" else None)


def test_models_are_of_two_dialects():
    client = client_of()
    assert "param" in client.get("/v1/models/nix").json()["error"]
    body = client.get("/v1/models/nix", headers={"anthropic-version": "2023-06-01"}).json()
    assert body["error"]["type"] == "not_found_error"


def test_other_methods_are_named():
    answer = client_of().get("/v1/echo")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


def test_a_wrong_request_of_the_engine_is_400():
    assert (
        client_of(ManagedService(UsageError("too long")))
        .post("/v1/echo", json={"prompt": "x"})
        .json()["error"]["message"]
        == "too long"
    )


@pytest.mark.parametrize(("not_ready", "status"), [("", 500), ("it is being restarted", 503)])
def test_a_failed_engine_is_500_and_one_that_comes_back_503(not_ready, status):
    service = ManagedService((EngineFailure("the engine died"),), not_ready=not_ready)
    answer = client_of(service).post("/v1/echo", json={"prompt": "x"})
    assert answer.status_code == status
    assert "the engine died" in answer.json()["error"]["message"]
    assert ("retry-after" in answer.headers) == (status == 503)


def test_the_document_says_what_happens():
    document = client_of().get("/openapi.json").json()
    assert "security" not in document
    assert {"/health", "/ready", "/metrics", "/v1/echo"} <= document["paths"].keys()
    text = str(document)
    for name in ("422", "HTTPValidationError"):
        assert name not in text
    assert {"400", "413", "415", "429", "503"} <= document["paths"]["/v1/echo"]["post"][
        "responses"
    ].keys()
    assert "413" not in document["paths"]["/health"]["get"]["responses"]


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_there_is_no_page_that_loads_scripts_from_elsewhere(path):
    assert client_of().get(path).status_code == 404


def test_metrics_say_how_the_engine_does():
    class Engine(ManagedService):
        def snapshot(self):
            return Figures(
                queued=4,
                running=3,
                outcomes={"finished": 7, "died": 1},
                cached_tokens=11,
                drafted_tokens=20,
                accepted_tokens=15,
                restarts=2,
                loaded=("tiny",),
            )

    answer = client_of(Engine()).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = answer.text.splitlines()
    for line in (
        "optiq:num_requests_waiting 4.0",
        "optiq:num_requests_running 3.0",
        "optiq:models_loaded 1.0",
        "optiq:engine_ready 1.0",
        "optiq:engine_restarts_total 2.0",
        "optiq:prompt_tokens_cached_total 11.0",
        "optiq:spec_decode_num_draft_tokens_total 20.0",
        "optiq:spec_decode_num_accepted_tokens_total 15.0",
        'optiq:engine_jobs_total{outcome="finished"} 7.0',
        'optiq:engine_jobs_total{outcome="died"} 1.0',
    ):
        assert line in lines


def test_two_applications_do_not_share_metrics():
    first, second = client_of(), client_of()
    first.get("/health")
    assert 'route="/health"' not in second.get("/metrics").text


def test_it_is_not_made_open_to_others(monkeypatch):
    monkeypatch.delenv("OPTIQ_API_KEY", raising=False)
    with pytest.raises(UsageError, match="API key|api-key"):
        create_app(ManagedService(), ServeConfig(host="0.0.0.0"))
    monkeypatch.setenv("OPTIQ_API_KEY", "k")
    client = TestClient(create_app(ManagedService(), ServeConfig(host="0.0.0.0")), base_url=OWN)
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"x-api-key": "k"}).status_code == 200


def test_a_request_that_comes_before_the_models_are_known_waits():
    class Late(ManagedService):
        asked = False

        async def known(self):
            for _ in range(3):
                await asyncio.sleep(0)
            self.cards, self.asked = cards, True

    service = Late()
    cards, service.cards = service.cards, ()
    answer = client_of(service).get("/v1/models")
    assert service.asked
    assert [one["id"] for one in answer.json()["data"]] == [card.name for card in cards]


def test_a_request_to_an_engine_that_never_came_up_is_503():
    service = ManagedService()
    service.cards = ()
    service.resolve = lambda name: "tiny"
    body = {"messages": [{"role": "user", "content": "Hello"}], "reasoning_effort": "low"}
    answer = client_of(service).post("/v1/chat/completions", json=body)
    assert answer.status_code == 503
    assert "/ready" in answer.json()["error"]["message"]
