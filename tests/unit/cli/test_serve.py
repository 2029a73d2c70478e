"""`optiq serve`: what it refuses before anything listens, and a model served to its end."""

import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from optiq import extras
from optiq.cli.main import run
from optiq.configs import ServeConfig
from optiq.errors import UsageError
from optiq.server import life
from tests.server.local import WAIT_S, until


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPTIQ_API_KEY", raising=False)


def refused(capsys, *words):
    assert run(["serve", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "--model"),
        (("--model", "nix"), "no directory"),
        (("--port", "70000"), "--port"),
        (("--drain", "-1"), "--drain"),
        (("--max-queue", "0"), "--max-queue"),
        (("--request-timeout", "0"), "--request-timeout"),
        (("--idle-unload", "nan"), "--idle-unload"),
        (("--max-body", "big"), "is no size"),
        (("--cache-limit", "0"), "--cache-limit"),
        (("--num-drafts", "2"), "--drafter"),
        (("--num-drafts", "x"), "--num-drafts"),
        (("--cors-origin", "evil.example"), "--cors-origin"),
        (("--cors-origin", "https://*.example"), "--cors-origin"),
        (("--allowed-host", "http://box"), "--allowed-host"),
    ],
)
def test_options_that_cannot_be_honoured(capsys, words, reason):
    assert reason in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--host", "0.0.0.0"), "OPTIQ_API_KEY"),
        (("--cors-origin", "*"), "any web page"),
        (("--image-host", "http://x"), "--image-host"),
        (("--api-key-file", "nix"), "cannot be read"),
        (("--host", "203.0.113.7"), "listened at"),
    ],
)
def test_doors_that_would_be_open(capsys, tiny_llama, tmp_path, words, reason):
    (tmp_path / "key").write_text("k")
    key = ("--api-key-file", str(tmp_path / "key")) if "203.0.113.7" in words else ()
    assert reason in refused(capsys, "--model", str(tiny_llama), *words, *key)


def test_a_port_in_use(capsys, tiny_llama):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port}" in refused(capsys, "--model", str(tiny_llama), "--port", port)


def test_a_missing_extra_is_named(capsys, monkeypatch):
    def load(module, *, extra, purpose):
        raise UsageError(f"{purpose} needs {module} of {extra}")

    monkeypatch.setattr(extras, "load", load)
    assert "optiq serve needs fastapi of serve" in refused(capsys)


def test_models_of_a_file_are_paths(tmp_path, capsys):
    (tmp_path / "o.toml").write_text('[serve]\nmodel = ["nix"]\n')
    assert "nix is no directory" in refused(capsys, "--config", str(tmp_path / "o.toml"))


def test_options_reach_the_engine():
    options = life.options_of(
        ServeConfig(
            drafter="ngram",
            num_drafts="3",
            cache_limit="2GB",
            memory_limit="8GB",
            max_context=1000,
            max_running=5,
            max_queue=7,
            request_timeout=11.0,
            idle_unload=13.0,
        )
    )
    assert options.max_queue == 7
    assert options.request_timeout_s == 11.0
    worker = options.worker
    assert (worker.memory_limit, worker.max_context, worker.idle_unload_s) == ("8GB", 1000, 13.0)
    assert worker.limits.running == 5
    assert worker.engine == {"num_drafts": 3, "prefix_memory": 2 * 10**9, "kv_bits": None}
    plain = life.options_of(ServeConfig()).worker.engine
    assert plain == {"num_drafts": None, "prefix_memory": None, "kv_bits": None}


def test_a_model_is_served_until_a_signal(tiny_llama):
    code = "import sys; from optiq.cli.main import run; sys.exit(run())"
    words = ["serve", "--model", str(tiny_llama), "--port", "0", "--log-json"]
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(4 * WAIT_S, process.kill)
    watchdog.start()
    try:
        url = process.stdout.readline().strip()
        until(lambda: httpx.get(f"{url}/ready", timeout=WAIT_S).status_code == 200)
        assert "optiq:models_loaded 1.0" in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/nix").status_code == 404
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=WAIT_S)
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 0
    assert out == ""
    assert '"path": "/nix", "status": 404, "outcome": "rejected"' in log
