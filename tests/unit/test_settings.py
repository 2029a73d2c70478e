"""What the environment says, and what it says when nothing is set."""

from pathlib import Path

import pytest

from optiq import settings
from optiq.errors import UsageError

NAMES = (
    "OPTIQ_CACHE",
    "OPTIQ_BLAS",
    "OPTIQ_OFFLINE",
    "OPTIQ_DEBUG",
    "OPTIQ_API_KEY",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
    "MLX_RANK",
    "MLX_HOSTFILE",
    "NCCL_HOST_IP",
    "MLX_JACCL_COORDINATOR",
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
    found = load()
    assert found == settings.Settings(
        cache_dir=tmp_path / ".cache" / "optiq",
        blas="auto",
        offline_words=(("OPTIQ_OFFLINE", ""), ("HF_HUB_OFFLINE", "")),
        hub_endpoint=None,
        debug=False,
    )
    assert found.offline is False


def test_the_key_of_a_server_is_never_shown(load):
    found = load(OPTIQ_API_KEY="secret")
    assert found.served_key == "secret"
    assert "secret" not in repr(found)


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
        ("y", True),
        ("T", True),
        ("0", False),
        ("false", False),
        ("no", False),
        ("OFF", False),
        ("n", False),
        (" F ", False),
        ("", False),
        (" ", False),
    ],
)
@pytest.mark.parametrize(
    ("name", "field"),
    [("OPTIQ_OFFLINE", "offline"), ("HF_HUB_OFFLINE", "offline"), ("OPTIQ_DEBUG", "debug")],
)
def test_flags(load, name, field, value, expected):
    assert getattr(load(**{name: value}), field) is expected


@pytest.mark.parametrize("name", ["OPTIQ_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("value", ["maybe", "2", "01", "-", "yes please", "tr\nue"])
def test_a_word_that_is_neither_true_nor_false_is_refused_where_it_matters(load, name, value):
    found = load(**{name: value})  # importing optiq gets as far as this
    with pytest.raises(UsageError) as caught:
        found.offline  # noqa: B018
    assert str(caught.value) == f"{name} is {value!r}; set it to 1 or 0"


def test_one_wrong_word_is_not_hidden_by_the_other_variable(load):
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is 'maybe'"):
        load(OPTIQ_OFFLINE="1", HF_HUB_OFFLINE="maybe").offline  # noqa: B018


def test_any_word_that_is_not_false_asks_for_tracebacks(load):
    assert load(OPTIQ_DEBUG="2").debug


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


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({"NCCL_HOST_IP": "10.0.0.2"}, "10.0.0.2"),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.3:5000"}, "10.0.0.3"),
    ],
)
def test_where_rank_0_is(load, variables, host):
    found = load(MLX_RANK="1", **variables)
    assert (found.rank, found.first_host) == (1, host)


def test_where_rank_0_is_in_a_file_of_hosts(load, tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000", "10.0.0.1:5001"], ["10.0.0.2:5000"]]')
    assert load(MLX_RANK="0", MLX_HOSTFILE=str(hosts)).first_host == "10.0.0.1"


@pytest.mark.parametrize("text", [None, "", "[]", "[[5]]", "{}"])
def test_a_file_of_hosts_that_is_none(load, tmp_path, text):
    hosts = tmp_path / "hosts.json"
    if text is not None:
        hosts.write_text(text)
    with pytest.raises(UsageError, match="is no file of hosts"):
        load(MLX_RANK="0", MLX_HOSTFILE=str(hosts)).first_host  # noqa: B018  raises


def test_a_launch_that_does_not_say_where_rank_0_is(load):
    with pytest.raises(UsageError, match="no variable says where rank 0 is"):
        load(MLX_RANK="0").first_host  # noqa: B018  raises
