"""Start-up, exit statuses and messages of the command line."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import optiq
from optiq.cli.main import VERBS, run
from optiq.errors import BudgetInfeasible, EngineFailure, TargetMissed, UsageError

HEAVY = ("mlx", "mlx_lm", "pydantic", "rich", "huggingface_hub", "numpy", "scipy")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"]])
def test_start_is_fast(words):
    """Processor time, because the machine may be busy, and three tries; the program takes 0.1 s."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = f"import sys; from optiq.cli.main import run; sys.exit(run({words!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(times) < 0.3


def test_import_is_light():
    code = f"import sys, optiq.cli.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_verb(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, line in VERBS.items():
        assert f"{verb} " in text
        assert line in text


def test_every_verb_has_a_file_and_every_file_a_verb():
    folder = Path(optiq.__file__).parent / "cli"
    files = {path.stem for path in folder.glob("*.py")}
    assert set(VERBS) == files - {"__init__", "eval_show", "main", "options", "output", "toml"}


@pytest.mark.parametrize("verb", VERBS)
def test_short_help(verb, capsys):
    assert run([verb, "-h"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: optiq {verb}")


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"optiq {optiq.__version__}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["conver"], "did you mean 'convert'"),
        (["xyzzy"], "there are convert, judge"),
        (["measure", "x"], "-o sensitivity.json"),
        (["convert"], "SOURCE"),
        (["plan", "x", "--target-bpw", "four"], "four"),
        (["plan", "x", "--target-bpw", "4", "--target-kl", "1"], "one target"),
        (["plan", "x", "--pin", "nonsense"], "GLOB=OPTION"),
        (["plan", "missing.json"], "missing.json does not exist"),
        (["convert", "x", "-o", "y", "--effort", "huge"], "quick"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_wrong_use_is_status_2(words, part, capsys):
    assert run(words) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "status", "part"),
    [
        (UsageError("no such thing"), 2, "error: no such thing"),
        (BudgetInfeasible("too small", min_bpw=2.5, min_size_bytes=1), 2, "too small"),
        (EngineFailure("out of memory"), 1, "out of memory"),
        (TargetMissed("KL 0.2 is above"), 1, "KL 0.2"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on"),
        (OSError(errno.ENOSPC, "No space left", "/tmp/x"), 1, "the disk of /tmp/x is full"),
        (ValueError("line one\nline two"), 1, "ValueError: line one line two (this is a fault"),
    ],
)
def test_exit_status(error, status, part, pipeline, capsys, monkeypatch):
    monkeypatch.delenv("OPTIQ_DEBUG", raising=False)
    pipeline.error = error
    assert run(["judge", "model"]) == status
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(pipeline, capsys, monkeypatch):
    monkeypatch.setenv("OPTIQ_DEBUG", "1")
    pipeline.error = ValueError("broken")
    assert run(["judge", "model"]) == 1
    assert "Traceback" in capsys.readouterr().err
