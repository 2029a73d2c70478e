"""docs/serving.md names what there is."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.server.local import app_of

TEXT = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def test_the_metrics_are_those_of_the_server():
    client = TestClient(app_of(), base_url="http://127.0.0.1")
    client.get("/health")
    types = re.findall(r"^# TYPE (optiq:\S+) (\w+)$", client.get("/metrics").text, re.MULTILINE)
    there = {name: kind for name, kind in types if not name.endswith("_created")}
    rows = re.findall(r"^\| (`optiq:.*?) \| (\w+) \|", TEXT, re.MULTILINE)
    named = {name: kind for names, kind in rows for name in re.findall(r"`(.*?)`", names)}
    assert named == there


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/openapi.json"])
def test_the_routes_of_state_are_there(path):
    assert f"| `{path}` |" in TEXT
    assert TestClient(app_of(), base_url="http://127.0.0.1").get(path).status_code == 200
