"""The tests of the client packages' own source distributions, against our routes.

    pip download --no-binary :all: --no-deps anthropic==2.12.0 openai==3.54.0   # and unpack both
    python -m venv sdk
    sdk/bin/pip install "anthropic[aiohttp]==2.12.0" "openai[aiohttp]==3.54.0" \\
        pytest pytest-asyncio respx rich inline-snapshot http-snapshot
    python -m tests.server.sdk.run openai --source openai-3.54.0 --python sdk/bin/python
    python -m tests.server.sdk.run anthropic --source anthropic-2.12.0 --python sdk/bin/python
    python -m tests.server.sdk.run responses --source openai-3.54.0 --python sdk/bin/python

The engine is a scripted one that takes any model's name, or with `--url http://HOST:PORT` that of a
running server (`optiq serve --alias '*' --model ...`, a small model). What the list of a suite
names, with a reason each, has to fail: a line that is no longer needed is an error. Exit status 0
if everything else passes.
"""

import argparse
import contextlib
import dataclasses
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from tests.server import apps_anthropic, apps_openai
from tests.server.fake import FakeService


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tests of a package: its files, the application that they are for, and how they are run.

    Attributes:
        files: of tests.
        app: makes the application of a service.
        base: what the base URL ends in.
        addopts: options of pytest.
    """

    files: tuple[str, ...]
    app: Callable = apps_anthropic.app_of
    base: str = ""
    addopts: str = ""


SUITES = {
    "anthropic": Suite(
        ("test_messages.py", "beta/test_messages.py"), addopts="-p tests._alias_httpx"
    ),
    "openai": Suite(
        (
            "chat/test_completions.py",
            "test_completions.py",
            "test_embeddings.py",
            "test_models.py",
        ),
        apps_openai.app_of,
        base="/v1",
    ),
    "responses": Suite(("test_responses.py",), base="/v1"),
}


class AnyName(FakeService):
    """Takes every model's name, as `--alias '*'` has it."""

    def resolve(self, name):
        return super().resolve(None)


def excepted(suite):
    """Tests of the list: `file::test` of every class and client, or `file::test[client]`."""
    lines = Path(__file__).with_name(f"{suite}.txt").read_text().splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


@contextlib.contextmanager
def served(app):
    """The address of an application that is served meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def outcomes(python, source, suite, base_url):
    """What became of every test, by its id, and what pytest wrote."""
    files = [f"tests/api_resources/{name}" for name in suite.files]
    command = [python, "-m", "pytest", "-o", f"addopts={suite.addopts}", "-v", "-p", "no:xdist"]
    env = ["env", "-u", "PYTHONPATH", f"TEST_API_BASE_URL={base_url}"]
    ran = subprocess.run(
        [*env, *command, *files], cwd=source, capture_output=True, text=True, check=False
    )
    found = re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", ran.stdout, re.MULTILINE)
    names = {name.removeprefix("tests/api_resources/"): result for name, result in found}
    return names, ran.stdout + ran.stderr


def is_listed(name, listed):
    """Whether a test is in the list, for all clients or for this one."""
    file, _, test = name.partition("::")
    function = f"{file}::{test.rpartition('::')[2]}"
    return function in listed or function.split("[")[0] in listed


def main():
    """Run, compare with the list, print the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--source", type=Path, required=True, help="unpacked source distribution")
    parser.add_argument("--python", required=True, help="interpreter that has the package")
    parser.add_argument("--url", help="of a running server, instead of a scripted engine")
    options = parser.parse_args()
    suite, python = SUITES[options.suite], str(Path(options.python).absolute())
    running = contextlib.nullcontext(options.url) if options.url else served(suite.app(AnyName()))
    with running as address:
        results, said = outcomes(python, options.source, suite, address + suite.base)
    if not results:
        sys.stdout.write(f"no tests ran\n{said}")
        return 1
    listed = excepted(options.suite)
    wrong = {
        name: "passes, but is listed" if result == "PASSED" else result
        for name, result in results.items()
        if is_listed(name, listed) == (result == "PASSED")
    }
    passed = sum(result == "PASSED" for result in results.values())
    count = sum(is_listed(name, listed) for name in results)
    lines = [f"{passed} of {len(results)} pass; {count} are excepted"]
    lines += [f"{result}: {name}" for name, result in wrong.items()]
    sys.stdout.write("\n".join([*lines, ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
