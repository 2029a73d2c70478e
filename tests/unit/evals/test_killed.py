"""kill -9 in the middle of a benchmark: the second run ends with the report of a whole one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.evals.run import evaluate
from optiq.evals.subjects.local import LocalModel
from optiq.events import no_emit
from tests.unit.evals.subjects.tasks import CHAT, CHOICE, TEXT

FILES = ("report.json", "sums.json", "sums.jsonl", "text.jsonl", "parity.jsonl")


def run(model, folder):
    config = EvalConfig(batch_size=2, full=True)
    subject = LocalModel(Path(model), config)
    tasks = [CHAT, TEXT, CHOICE]
    return evaluate(subject, tasks, config, BenchmarkData(None), Path(folder), no_emit)


def killed_after(model, folder, task, count):
    """A process with a run of its own, killed when `task` has that many records."""
    code = (
        f"import sys; sys.path[:0] = ['src', '.']; from {__spec__.name} import run; "
        f"run(*sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model), str(folder)], cwd=Path(__file__).parents[3]
    )
    path = folder / f"{task}.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= count:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "count"), [("sums", 3), ("text", 9), ("parity", 2)])
def test_a_killed_run_gives_the_same_report(tiny_llama, tmp_path, task, count):
    whole = run(tiny_llama, tmp_path / "whole")
    killed_after(tiny_llama, tmp_path / "killed", task, count)
    assert not (tmp_path / "killed" / "report.json").exists()
    assert run(tiny_llama, tmp_path / "killed") == whole
    for name in FILES:
        first, second = (tmp_path / f / name for f in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), name
