"""One line and one outcome for every request, and nothing of what was said in it."""

import asyncio
import json
import logging
import re

import pytest
from starlette.testclient import TestClient

from optiq.errors import EngineFailure, RequestRejected
from optiq.server.access import LogFormatter
from optiq.server.jobs import Started
from tests.server.fake import DEFAULT, said
from tests.server.local import app_of
from tests.server.managed import ManagedService

OWN = "http://127.0.0.1:8080"
SECRET = "a prompt that is nobody's business"


@pytest.fixture(params=[True, False], ids=["json", "text"])
def lines(request):
    """Everything that is logged, as lines."""
    out = []

    class Handler(logging.Handler):
        def emit(self, record):
            out.append(self.format(record))

    handler = Handler()
    handler.setFormatter(LogFormatter(as_json=request.param))
    logger = logging.getLogger("optiq")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield out
    logger.removeHandler(handler)
    logger.setLevel(level)


def client_of(script=DEFAULT, **options):
    return TestClient(app_of(ManagedService(script), **options), base_url=OWN)


def outcomes(client):
    """Requests by route and outcome, as /metrics has them."""
    found = re.findall(
        r'^optiq:requests_total\{method="\w+",outcome="(\w+)",'
        r'route="([^"]+)",status="(\d+)"\} (\S+)',
        client.get("/metrics").text,
        re.MULTILINE,
    )
    return {(route, int(status), outcome): float(count) for outcome, route, status, count in found}


def post(client, path="/v1/echo", **body):
    return client.post(path, json={"prompt": SECRET, **body})


def test_a_line_says_what_was_done_and_not_what_was_said(lines):
    answer = client_of().post(
        "/v1/echo?key=hidden",
        json={"prompt": SECRET},
        headers={"x-request-id": "mine-1", "authorization": "Bearer hidden"},
    )
    (line,) = lines
    assert answer.headers["x-request-id"] == answer.headers["request-id"] == "mine-1"
    for hidden in (SECRET, "Hello", "hidden"):
        assert hidden not in line
    if line.startswith("{"):
        fields = json.loads(line)
        assert fields.pop("duration_s") >= fields.pop("ttft_s") >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}", fields.pop("time"))
        assert fields == {
            "method": "POST",
            "path": "/v1/echo",
            "status": 200,
            "outcome": "ok",
            "id": "mine-1",
            "prompt_tokens": 3,
            "completion_tokens": 2,
        }
    else:
        assert "POST /v1/echo 200 ok id=mine-1" in line
        assert "prompt_tokens=3 completion_tokens=2" in line


def test_a_fault_is_logged_without_what_it_quotes(lines):
    answer = post(client_of(), **{"raise": "KeyError"})
    assert answer.status_code == 500
    assert SECRET not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    text = "\n".join(lines)
    assert "KeyError" in text
    assert "echo.py" in text
    assert answer.headers["x-request-id"] in text
    assert SECRET not in text


def test_a_fault_is_logged_in_full_to_debug(lines, monkeypatch):
    monkeypatch.setenv("OPTIQ_DEBUG", "1")
    post(client_of(), **{"raise": "KeyError"})
    assert SECRET in "\n".join(lines)


@pytest.mark.parametrize(
    "given", ["a b", "x" * 129, "", 'a"b', "a,b", "é", "a\r\nset-cookie: x", "a\nPOST /fake 200 ok"]
)
def test_ids_that_could_forge_something_are_replaced(lines, given):
    app = app_of()
    sent = answered(app, [(b"x-request-id", given.encode()), (b"host", b"localhost")], "/nix")
    found = dict(sent[0]["headers"])[b"x-request-id"].decode()
    assert re.fullmatch(r"[0-9a-f]{32}", found)
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert found in lines[0]


def answered(app, headers, path, raw_path=None):
    """What an application sends to a request that no client would make."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "headers": headers,
    }
    if raw_path is not None:
        scope["raw_path"] = raw_path
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_what_monitors_ask_is_counted_and_not_logged(lines, path):
    client = client_of()
    client.get(path)
    assert lines == []
    assert outcomes(client) == {(path, 200, "ok"): 1}


@pytest.mark.parametrize("raw", [None, b"/x%0aPOST%20/fake"])
def test_a_path_cannot_forge_a_line(lines, raw):
    path = "/x\nPOST /fake 200 ok" if raw else "/x\u2028\u00e9"
    answered(app_of(), [(b"host", b"localhost")], path, raw)
    assert len(lines) == 1
    assert lines[0].isascii()
    assert "\n" not in lines[0]
    assert lines[0].isprintable()


FAILED = EngineFailure("the engine died")
LATE = RequestRejected("too late", http_status=504)


@pytest.mark.parametrize(
    ("script", "body", "status", "outcome"),
    [
        (DEFAULT, {}, 200, "ok"),
        (DEFAULT, {"stream": True}, 200, "ok"),
        ((RequestRejected("no"),), {}, 400, "rejected"),
        ((RequestRejected("no"),), {"stream": True}, 400, "rejected"),
        (RequestRejected("full", http_status=429, retry_after_s=2.5), {}, 429, "rejected"),
        ((Started(1), *said("a"), FAILED), {}, 500, "failed"),
        ((Started(1), *said("a"), FAILED), {"stream": True}, 200, "failed"),
        ((Started(1), *said("a"), LATE), {"stream": True}, 200, "failed"),
        ((Started(1), *said("a"), KeyError(SECRET)), {"stream": True}, 200, "failed"),
        (DEFAULT, {"model": "../../etc/passwd"}, 404, "rejected"),
    ],
)
def test_every_request_has_one_outcome(script, body, status, outcome):
    client = client_of(script)
    answer = post(client, **body)
    assert answer.status_code == status
    assert SECRET not in answer.text
    if body.get("stream") and status == 200:
        assert answer.text.endswith("data: [DONE]\n\n")
    assert outcomes(client) == {("/v1/echo", status, outcome): 1}
    if status == 429:
        assert answer.headers["retry-after"] == "3"


def test_requests_of_no_route_are_one_row():
    client = client_of()
    for number in range(3):
        client.get(f"/nix/{number}")
    assert outcomes(client) == {("other", 404, "rejected"): 3}


def test_what_was_ignored_is_named():
    assert post(client_of(), user="u").headers["x-optiq-ignored"] == "user"
    assert "x-optiq-ignored" not in post(client_of()).headers


def test_times_are_taken():
    client = client_of((Started(3), *said("a"), *said("b"), *said("c"), *DEFAULT[-1:]))
    for _ in range(2):
        post(client)
    text = client.get("/metrics").text
    for line in (
        "optiq:time_to_first_token_seconds_count 2.0",
        "optiq:inter_token_latency_seconds_count 4.0",
        "optiq:e2e_request_latency_seconds_count 2.0",
        'optiq:request_success_total{finished_reason="stop"} 2.0',
    ):
        assert line in text.splitlines()
