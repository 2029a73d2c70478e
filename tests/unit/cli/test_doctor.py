"""What the doctor finds."""

import json
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

import optiq
from optiq import blas
from optiq.cli import doctor
from optiq.cli.main import run

PLACE = Path(optiq.__file__).parent


def distribution(files, requires=(), version="0.7.7"):
    return SimpleNamespace(
        files=[PurePosixPath(file) for file in files], requires=list(requires), version=version
    )


OURS = distribution(["optiq/__init__.py", "optiq/pipeline.py"], ["mlx", "click"], "0.1.0")
EDITABLE = distribution(["_mlx_optiq.pth", "mlx_optiq-0.1.0.dist-info/METADATA"], ["mlx"], "0.1.0")


@pytest.mark.parametrize("found", [[], [OURS], [EDITABLE]])
def test_ours_is_known(found):
    assert doctor.namesakes(PLACE, found) == []


@pytest.mark.parametrize(
    "other",
    [
        distribution(["optiq/__init__.py", "optiq/cli.py"]),
        distribution(["optiq/pipeline.py"], ["mlx", "Flask>=3"]),
    ],
)
def test_the_namesake_is_named(other):
    (text,) = doctor.namesakes(PLACE, [OURS, other])
    assert "mlx-optiq 0.7.7" in text
    assert "never by the name" in text


def test_files_of_both_in_one_folder(tmp_path):
    (tmp_path / "cli.py").touch()
    (text,) = doctor.namesakes(tmp_path, [OURS])
    assert str(tmp_path) in text


def test_a_healthy_machine(capsys, monkeypatch):
    monkeypatch.setattr(blas, "installed_backends", lambda: ["mlx-cpu"])
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    for name in ("optiq", "python", "mlx", "mlx-lm", "numpy", "device", "BLAS", "speed", "memory"):
        assert report["rows"][name]


def test_two_back_ends_are_an_error_by_name(capsys, monkeypatch):
    monkeypatch.setattr(blas, "installed_backends", lambda: ["mlx-cpu", "mlx-cuda-13"])
    assert run(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "error: 2 MLX back ends are installed (mlx-cpu and mlx-cuda-13)" in text
    assert "all is well" not in text


def test_slow_products_come_with_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("optiq.backend.gflops", lambda: 2.5)
    monkeypatch.setattr("optiq.backend.is_cpu", lambda: True)
    monkeypatch.setattr("sys.platform", "linux")
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "libopenblas0-pthread" in text
    assert "pip install mkl" in text
