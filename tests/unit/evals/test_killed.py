"""kill -9 in the middle of a benchmark: the second run ends with the files of a whole one."""

import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from optiq.configs import EvalConfig
from optiq.errors import UsageError
from optiq.evals.tasks import TASKS
from tests.benchmarks import write_benchmarks

ROOT = Path(__file__).parents[3]
ARCHIVE = ROOT / "tests" / "assets" / "gemma4-small" / "weights.tar.xz"
NUM_ITEMS = 10
OPTIONS = (
    f"--limit={NUM_ITEMS}",
    "--batch-size=2",  # eight questions are asked together
    "--max-tokens=16",
    "--bfcl-form=prompt",
    "--humaneval-form=text",
    "--hashhop-max-chars=1500",
    "--allow-code-execution",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The small trained Gemma-4."""
    folder = tmp_path_factory.mktemp("small")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "it-qat-q4_0-unquantized"


@pytest.fixture(scope="module", params=["own", pytest.param("published", marks=pytest.mark.assets)])
def data(request, tmp_path_factory):
    """A `--data-dir`."""
    if request.param == "own":
        return write_benchmarks(tmp_path_factory.mktemp("data"))
    return request.getfixturevalue("shared") / "assets" / "eval"


def needs(task):
    """Skip where this machine cannot score the benchmark."""
    try:
        TASKS.get(task).ready(EvalConfig(allow_code_execution=True))
    except UsageError as error:
        pytest.skip(str(error))


def start(task, model, data, folder):
    """The command in a process of its own."""
    code = "import sys; sys.path.insert(0, 'src'); from optiq.cli.main import run; sys.exit(run())"
    arguments = ["eval", str(model), "--tasks", task, "--data-dir", str(data), "-o", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *OPTIONS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(task, model, data, folder):
    """The command to its end: every file it leaves, by name."""
    with start(task, model, data, folder) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill(task, model, data, folder, count):
    """The command, killed when the log has `count` answers."""
    path = folder / f"{task}.jsonl"
    with start(task, model, data, folder) as process:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            if path.is_file() and path.read_bytes().count(b"\n") >= count:
                break
            time.sleep(0.001)
        process.kill()
        output, _ = process.communicate()
    assert count <= path.read_bytes().count(b"\n") < NUM_ITEMS, output
    assert not (folder / "report.json").exists()


@pytest.mark.parametrize("task", TASKS.names())
def test_a_killed_run_goes_on_to_the_same_files(task, model, data, tmp_path):
    needs(task)
    whole = run(task, model, data, tmp_path / "whole")
    assert set(whole) == {"report.json", f"{task}.json", f"{task}.jsonl"}
    kill(task, model, data, tmp_path / "killed", count=3)
    assert run(task, model, data, tmp_path / "killed") == whole
