"""The tests of the openai package's own source distribution, against our routes.

    pip download --no-binary :all: --no-deps openai==3.54.0 && tar xzf openai-3.54.0.tar.gz
    python -m venv sdk && sdk/bin/pip install openai[aiohttp]==3.54.0 pytest pytest-asyncio rich
    python -m tests.server.sdk.run_openai --source openai-3.54.0 --python sdk/bin/python

The engine is a scripted one that takes any model's name. What `openai.txt` lists, with a reason
each, has to fail: a line that is no longer needed is an error. Exit status 0 if everything else
passes; what pytest said is in sdk-openai.log.
"""

import argparse
import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import uvicorn

from tests.server.apps_openai import app_of
from tests.server.fake import FakeService

FILES = ("chat/test_completions.py", "test_completions.py", "test_embeddings.py", "test_models.py")


def excepted() -> list[str]:
    """Tests of the list: `file::test` of every class and client, or `file::test[client]`."""
    lines = Path(__file__).with_name("openai.txt").read_text().splitlines()
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


def outcomes(python: str, source: Path, base_url: str) -> dict[str, str]:
    """What became of every test, by its id; what was said is in a file."""
    files = [f"tests/api_resources/{name}" for name in FILES]
    command = ["env", "-u", "PYTHONPATH", f"TEST_API_BASE_URL={base_url}", python, "-m", "pytest"]
    command += ["-o", "addopts=", "-p", "no:xdist", "-v", "--tb=short", *files]
    ran = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    Path("sdk-openai.log").write_text(ran.stdout + ran.stderr)
    found = re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", ran.stdout, re.MULTILINE)
    return {name.removeprefix("tests/api_resources/"): result for name, result in found}


def main() -> int:
    """Run, compare with the list, print the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="unpacked source distribution")
    parser.add_argument("--python", required=True, help="interpreter that has the package")
    options = parser.parse_args()
    python = str(Path(options.python).absolute())
    with served(app_of(FakeService(takes_any_name=True))) as address:
        results = outcomes(python, options.source, f"{address}/v1")
    listed = excepted()

    def is_listed(name: str) -> bool:
        file, _, test = name.partition("::")
        function = f"{file}::{test.rpartition('::')[2]}"
        return function in listed or function.split("[")[0] in listed

    wrong = [name for name, result in results.items() if is_listed(name) == (result == "PASSED")]
    passed = sum(result == "PASSED" for result in results.values())
    lines = [f"{passed} of {len(results)} pass; {sum(map(is_listed, results))} are excepted"]
    lines += [f"{'passes, but is listed' if is_listed(n) else 'FAILS'}: {n}" for n in wrong]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(bool(wrong) or not results)


if __name__ == "__main__":
    sys.exit(main())
