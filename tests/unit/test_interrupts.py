"""Runs that are killed or interrupted, and runs shared by processes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from optiq.artifacts import SensitivityTable
from tests.unit.test_pipeline import digests

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
KILLS = 10


def command(source: Path, out: Path, work: Path) -> list[str]:
    options = ["--effort", "quick", "--target-bpw", "4.5", "--max-windows", "12"]
    return [
        str(BIN / "optiq"),
        "convert",
        str(source),
        "-o",
        str(out),
        "--work",
        str(work),
        *options,
    ]


def test_killed_at_random_moments_a_run_ends_in_the_same_bytes(tiny_llama, tmp_path):
    subprocess.run(command(tiny_llama, tmp_path / "a" / "out", tmp_path / "wa"), check=True)
    out, work = tmp_path / "b" / "out", tmp_path / "wb"
    chance = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(tiny_llama, out, work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(1.5, 6.0))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if out.exists():
            break
    assert killed >= 3
    if not out.exists():
        subprocess.run(command(tiny_llama, out, work), check=True)
    assert digests(out) == digests(tmp_path / "a" / "out")
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_interrupt_exits_with_130_and_keeps_the_state(tiny_llama, tmp_path):
    out, work = tmp_path / "o" / "out", tmp_path / "work"
    process = subprocess.Popen(
        command(tiny_llama, out, work), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(work.rglob("block_*.safetensors")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert list(work.rglob("block_*.safetensors"))
    assert subprocess.run(command(tiny_llama, out, work), check=False).returncode == 0


SHARED_RUN = """
import sys
from pathlib import Path
from optiq import pipeline
from optiq.backend import mx
from optiq.configs import MeasureConfig, RunConfig

run = RunConfig(work=Path(sys.argv[2]))
table = pipeline.measure(sys.argv[1], MeasureConfig(effort="quick"), run)
if mx.distributed.init().rank() == 0:
    table.save(Path(sys.argv[3]))
"""


def test_two_processes_give_the_table_of_one(tiny_llama, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SHARED_RUN)

    def table(work: str, *launch: str) -> SensitivityTable:
        saved = tmp_path / f"{work}.json"
        words = [*launch, str(script), str(tiny_llama), str(tmp_path / work), str(saved)]
        subprocess.run(words, check=True, timeout=300)
        return SensitivityTable.load(saved)

    one = table("one", sys.executable)
    launch = [str(BIN / "mlx.launch"), "-n", "2", "--backend", "ring", "--python", sys.executable]
    two = table("two", *launch)
    a, b = (
        np.array([s.kl_nats_per_token for row in t.modules for s in row.scores]) for t in (one, two)
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12)
    assert one.num_tokens == two.num_tokens
    assert json.loads(one.to_json())["calibration"] == two.calibration
