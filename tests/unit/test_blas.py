"""Which BLAS is loaded before MLX, in fresh interpreters where that matters."""

import ctypes.util
import importlib.metadata
import os
import subprocess
import sys

import pytest

from optiq import blas

REPORT = "; print(blas.NAME)"
IMPORT = "from optiq import blas"


@pytest.fixture
def fresh(monkeypatch):
    """Output and warnings of a program in a new interpreter with that `OPTIQ_BLAS`."""

    def run(program, choice=""):
        monkeypatch.setenv("OPTIQ_BLAS", choice)
        command = [sys.executable, "-W", "default", "-c", program + REPORT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    return run


@pytest.fixture
def load(monkeypatch):
    """What `blas` decides for a choice in a process where MLX is not there yet; loads nothing."""

    def decide(choice, *, libraries=(), backends=("mlx-cpu",), system="Linux"):
        opened = []

        def cdll(name, mode):
            opened.append(name)
            assert mode == ctypes.RTLD_GLOBAL
            if name not in libraries:
                raise OSError(name)
            return type("Library", (), dict.fromkeys(libraries[name]))()

        monkeypatch.setenv("OPTIQ_BLAS", choice)
        monkeypatch.delitem(sys.modules, "mlx.core")
        monkeypatch.setattr(blas.ctypes, "CDLL", cdll)
        monkeypatch.setattr(blas, "installed_backends", lambda: list(backends))
        monkeypatch.setattr(blas.platform, "system", lambda: system)
        return blas._load(), opened

    return decide


# -- the choice ----------------------------------------------------------------------------------


def test_off_loads_nothing(load):
    assert load("off", libraries={"libopenblas.so.0": ["cblas_sgemm"]}) == (
        "MLX's own (OPTIQ_BLAS=off)",
        [],
    )


def test_auto_takes_the_first_library_there_is(load):
    name, opened = load("auto", libraries={"libmkl_rt.so.3": ["cblas_sgemm"]})
    assert name == "libmkl_rt.so.3"
    assert opened == ["libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3"]


def test_auto_finds_libraries_of_wheels(load):
    """The wheel of MKL puts its library into the environment's own lib directory."""
    wheel = os.path.join(sys.prefix, "lib", "libmkl_rt.so.2")
    assert load("auto", libraries={wheel: ["cblas_sgemm"]})[0] == "libmkl_rt.so.2"


def test_auto_without_a_library_says_that_it_is_slow(load):
    assert load("auto")[0] == "MLX's reference BLAS (slow)"


@pytest.mark.parametrize(
    ("system", "backends"),
    [
        ("Darwin", ["mlx-metal"]),
        ("Linux", ["mlx-cuda-13"]),
        ("Linux", []),
        ("Windows", ["mlx-cpu"]),
    ],
)
def test_auto_leaves_other_machines_alone(load, system, backends):
    libraries = {"libopenblas.so.0": ["cblas_sgemm"]}
    found = load("auto", libraries=libraries, backends=backends, system=system)
    assert found == ("MLX's own", [])


def test_a_named_library_is_loaded_anywhere(load):
    found = load(
        "/opt/libx.so", libraries={"/opt/libx.so": ["cblas_sgemm"]}, backends=["mlx-metal"]
    )
    assert found == ("libx.so", ["/opt/libx.so"])


@pytest.mark.parametrize("libraries", [{}, {"libx.so": ["scipy_cblas_sgemm"]}])
def test_a_wrong_library_warns_and_says_what_to_do(load, libraries):
    with pytest.warns(RuntimeWarning, match=r"OPTIQ_BLAS=libx.so .*cblas_sgemm.*; give a BLAS"):
        assert load("libx.so", libraries=libraries)[0] == "MLX's own"


def test_auto_passes_over_a_library_without_the_standard_symbols(load):
    libraries = {"libopenblas.so.0": [], "libopenblas.so": ["cblas_sgemm"]}
    assert load("auto", libraries=libraries)[0] == "libopenblas.so"


def test_an_empty_choice_is_auto(load):
    assert load("", libraries={"libopenblas.so.0": ["cblas_sgemm"]})[0] == "libopenblas.so.0"


# -- in a process of its own ---------------------------------------------------------------------


def test_off_in_a_fresh_interpreter(fresh):
    name, warnings = fresh(IMPORT, "off")
    assert name == "MLX's own (OPTIQ_BLAS=off)"
    assert warnings == ""


def test_mlx_before_optiq_warns(fresh):
    name, warnings = fresh(f"import mlx.core; {IMPORT}", ctypes.util.find_library("c") or "libc")
    assert name == "MLX's own (mlx was imported before optiq)"
    assert "RuntimeWarning: mlx was imported before optiq" in warnings
    assert "import optiq first" in warnings


@pytest.mark.skipif(not ctypes.util.find_library("m"), reason="needs a C library by name")
def test_a_library_that_is_no_blas_warns(fresh):
    library = ctypes.util.find_library("m")
    name, warnings = fresh(IMPORT, library)
    assert name == "MLX's own"
    assert (
        f"RuntimeWarning: OPTIQ_BLAS={library} cannot be loaded or has no cblas_sgemm" in warnings
    )


def test_the_backend_names_the_library_that_was_loaded(fresh):
    """The same interpreter loads the BLAS, then MLX, without a word, and products are right."""
    program = (
        "import optiq, sys; assert 'mlx.core' not in sys.modules; "
        "from optiq.backend import BLAS, mx; from optiq import blas; assert BLAS == blas.NAME; "
        "a = mx.ones((64, 64)); assert (a @ a == 64).all().item()"
    )
    name, warnings = fresh(program)
    assert name == blas.NAME
    assert warnings == ""


# -- back ends -----------------------------------------------------------------------------------


def test_installed_backends(monkeypatch):
    there = {"mlx-cuda-13", "mlx-cpu", "mlx"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert blas.installed_backends() == ["mlx-cpu", "mlx-cuda-13"]
    there.clear()
    assert blas.installed_backends() == []
