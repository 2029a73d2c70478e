"""A server as a program: how it starts, and how it ends."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.server.local import WAIT_S, until

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def running(kind, port=0, drain=60.0):
    """A server program, and its URL; None where it says none."""
    command = [sys.executable, "-m", "tests.server.program", kind, str(port), str(drain)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(4 * WAIT_S, process.kill)
    watchdog.start()
    try:
        yield process, process.stdout.readline().strip() or None
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@contextlib.contextmanager
def streaming(url):
    """A stream of which the first word has come, and the lines that follow."""
    with httpx.stream(
        "POST", f"{url}/v1/echo", json={"prompt": "x", "stream": True}, timeout=WAIT_S
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines) == 'data: "first"'
        yield lines


def data_of(lines):
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def ended(process):
    process.wait(WAIT_S)
    return process.returncode


def test_port_0_prints_the_port_and_a_signal_ends_it():
    with running("quick") as (process, url):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.post(f"{url}/v1/echo", json={"prompt": "x"}).json() == {"text": "Hello world"}
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 0
        assert process.stdout.read() == ""
        assert "POST /v1/echo 200 ok" in process.stderr.read()


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with running("quick", port) as (process, url):
            assert url is None
            assert ended(process) == 2
            assert f"127.0.0.1:{port} cannot be listened at" in process.stderr.read()


@pytest.mark.parametrize(
    ("kind", "status", "reason"), [("usage", 2, "no such model"), ("failure", 1, "no memory")]
)
def test_what_cannot_be_loaded_ends_the_server(kind, status, reason):
    with running(kind) as (process, _):
        assert ended(process) == status
        assert reason in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_is_let_to_its_end(number):
    with running("wait") as (process, url), streaming(url) as lines:
        process.send_signal(number)
        assert data_of(lines) == ['" second"', "[DONE]"]
        assert ended(process) == 0


def test_nothing_new_is_taken_meanwhile():
    with running("slow") as (process, url), streaming(url):
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        answer = httpx.post(f"{url}/v1/echo", json={"prompt": "x"})
        assert answer.status_code == 503
        assert answer.headers["connection"] == "close"
        assert answer.json()["error"]["code"] == "shutting_down"


def test_a_stream_that_takes_too_long_ends_with_an_error():
    with running("slow", drain=0.1) as (process, url), streaming(url) as lines:
        process.send_signal(signal.SIGTERM)
        error, done = data_of(lines)
        assert "shutting down" in json.loads(error)["error"]
        assert done == "[DONE]"
        assert ended(process) == 0


def test_a_second_signal_ends_it_at_once():
    with running("slow") as (process, url), streaming(url) as lines:
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 130
        with contextlib.suppress(httpx.HTTPError):
            assert "[DONE]" not in data_of(lines)[:1]
