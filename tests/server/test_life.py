"""A server as a program: how it starts, and how it ends."""

import asyncio
import contextlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from optiq.configs import ServeConfig
from optiq.errors import EngineFailure, UsageError
from optiq.server import life
from tests.server.local import WAIT_S, until
from tests.server.managed import ManagedService

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def running(kind, drain=60.0):
    """A server program, and its URL."""
    command = [sys.executable, "-m", "tests.server.program", kind, str(drain)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(4 * WAIT_S, process.kill)
    watchdog.start()
    try:
        yield process, process.stdout.readline().strip()
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_is_let_to_its_end(number):
    with running("wait") as (process, url), streaming(url) as lines:
        process.send_signal(number)
        assert data_of(lines) == ['" second"', "[DONE]"]
        assert ended(process) == 0
        assert process.stdout.read() == ""
        assert "POST /v1/echo 200 ok" in process.stderr.read()


def test_nothing_new_is_taken_meanwhile_and_a_second_signal_ends_it_at_once():
    with running("slow") as (process, url), streaming(url) as lines:
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        answer = httpx.post(f"{url}/v1/echo", json={"prompt": "x"})
        assert answer.status_code == 503
        assert answer.headers["connection"] == "close"
        assert answer.json()["error"]["code"] == "shutting_down"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 130
        with contextlib.suppress(httpx.HTTPError):
            assert "late" not in "".join(data_of(lines))


def test_a_stream_that_takes_too_long_ends_with_an_error():
    with running("slow", drain=0.1) as (process, url), streaming(url) as lines:
        process.send_signal(signal.SIGTERM)
        error, done = data_of(lines)
        assert "shutting down" in json.loads(error)["error"]
        assert done == "[DONE]"
        assert ended(process) == 0
        assert "POST /v1/echo 200 failed" in process.stderr.read()


@pytest.fixture
def own_log():
    """What serving does to the log is undone."""
    loggers = [logging.getLogger(name) for name in ("optiq", "uvicorn")]
    before = [(log.handlers, log.propagate, log.level) for log in loggers]
    yield
    for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.mark.parametrize("error", [UsageError("no such model"), EngineFailure("no memory")])
@pytest.mark.usefixtures("own_log")
def test_what_cannot_be_loaded_ends_the_server(error):
    closed = []

    class Broken(ManagedService):
        async def start(self):
            await asyncio.sleep(0.1)
            raise error

        async def close(self):
            closed.append(True)

    urls = []
    with pytest.raises(type(error), match=str(error)):
        life.serve(Broken(), ServeConfig(port=0), urls.append)
    assert closed == [True]
    with pytest.raises(httpx.ConnectError):
        httpx.get(urls[0])


@pytest.mark.usefixtures("own_log")
def test_a_signal_before_the_model_is_loaded_ends_the_server():
    class Slow(ManagedService):
        async def start(self):
            await asyncio.sleep(600)

    status = life.serve(
        Slow(), ServeConfig(port=0, drain=0), lambda _: signal.raise_signal(signal.SIGTERM)
    )
    assert status == 0


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port} cannot be listened at"):
            life.listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.7", "no such name"])
def test_an_address_of_another_machine_is_refused(host):
    with pytest.raises(UsageError, match="listened at|no address"):
        life.listen(host, 0)


def test_ipv6_urls_have_brackets():
    with socket.socket() as four:
        four.bind(("127.0.0.1", 0))
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", life.url_of(four))
    six = type("Six", (), {"getsockname": lambda _: ("::1", 8080, 0, 0)})()
    assert life.url_of(six) == "http://[::1]:8080"
