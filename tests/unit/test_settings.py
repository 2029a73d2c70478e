"""What the environment says, and what it says when nothing is set."""

from pathlib import Path

import pytest

from optiq import settings

NAMES = (
    "OPTIQ_CACHE",
    "OPTIQ_BLAS",
    "OPTIQ_OFFLINE",
    "OPTIQ_DEBUG",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Settings of an environment that has only these variables, and a home directory."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def loaded(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return settings.load()

    return loaded


def test_defaults(load, tmp_path):
    assert load() == settings.Settings(
        cache_dir=tmp_path / ".cache" / "optiq",
        blas="auto",
        offline=False,
        hub_endpoint=None,
        debug=False,
    )


def test_empty_variables_are_as_good_as_none(load):
    assert load(**dict.fromkeys(NAMES, "")) == load()


@pytest.mark.parametrize(
    ("variables", "cache_dir"),
    [
        ({"OPTIQ_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/optiq"),
        ({"OPTIQ_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
    ],
)
def test_cache_directory(load, variables, cache_dir):
    assert load(**variables).cache_dir == Path(cache_dir)


def test_home_is_expanded(load, tmp_path):
    assert load(OPTIQ_CACHE="~/mine").cache_dir == tmp_path / "mine"
    assert load(OPTIQ_CACHE="", XDG_CACHE_HOME="~/c").cache_dir == tmp_path / "c" / "optiq"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" On ", True),
        ("0", False),
        ("false", False),
        ("no", False),
        ("", False),
    ],
)
@pytest.mark.parametrize(
    ("name", "field"),
    [("OPTIQ_OFFLINE", "offline"), ("HF_HUB_OFFLINE", "offline"), ("OPTIQ_DEBUG", "debug")],
)
def test_flags(load, name, field, value, expected):
    assert getattr(load(**{name: value}), field) is expected


def test_either_variable_means_offline(load):
    assert load(OPTIQ_OFFLINE="0", HF_HUB_OFFLINE="1").offline
    assert load(OPTIQ_OFFLINE="1", HF_HUB_OFFLINE="0").offline


def test_blas_and_endpoint_are_taken_as_they_are(load):
    found = load(OPTIQ_BLAS="/opt/lib/libblas.so", HF_ENDPOINT="https://mirror.example")
    assert found.blas == "/opt/lib/libblas.so"
    assert found.hub_endpoint == "https://mirror.example"


def test_the_environment_is_read_at_each_call(load):
    assert load(OPTIQ_BLAS="off").blas == "off"
    assert load(OPTIQ_BLAS="auto").blas == "auto"
