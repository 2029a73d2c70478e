"""Names of models."""

import pytest

from optiq.errors import RequestRejected, UsageError
from optiq.server.catalog import Catalog, Entry


@pytest.fixture
def folder(tmp_path):
    """A directory of two models and other things."""
    for name in ("beta", "alpha", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def test_models_of_a_directory_come_by_name(folder):
    catalog = Catalog.of([folder])
    assert [(entry.name, entry.found) for entry in catalog.entries] == [
        ("alpha", True),
        ("beta", True),
    ]


def test_first_model_is_the_default(folder):
    catalog = Catalog.of([folder / "beta", folder / "alpha"])
    assert catalog.resolve(None) == "beta"
    assert catalog.resolve("default_model") == "beta"
    assert catalog.resolve("alpha") == "alpha"
    assert not catalog.entries[0].found


def test_unknown_name_is_refused(folder):
    with pytest.raises(RequestRejected, match="gamma") as caught:
        Catalog.of([folder]).resolve("gamma")
    assert (caught.value.http_status, caught.value.param) == (404, "model")


@pytest.mark.parametrize("name", ["../alpha", "/etc", "alpha/", "", "*"])
def test_no_name_is_a_path(folder, name):
    with pytest.raises(RequestRejected):
        Catalog.of([folder]).resolve(name)


def test_aliases(folder):
    catalog = Catalog.of([folder], ["gpt-4=beta", "a=b=alpha"])
    assert catalog.resolve("gpt-4") == "beta"
    assert catalog.resolve("a=b") == "alpha"
    every = Catalog.of([folder], ["*"])
    assert every.resolve("anything") == "alpha"
    assert Catalog.of([folder], ["*=beta"]).resolve("anything") == "beta"
    assert Catalog.of([folder], ["*=beta"]).resolve("alpha") == "alpha"


@pytest.mark.parametrize("alias", ["x", "x=gamma", "=alpha", "alpha=beta", ""])
def test_wrong_alias(folder, alias):
    with pytest.raises(UsageError, match="--alias"):
        Catalog.of([folder], [alias])


def test_wrong_directories(folder):
    for path in (folder / "notes.txt", folder / "nowhere", folder / "empty"):
        with pytest.raises(UsageError, match=path.name):
            Catalog.of([path])
    with pytest.raises(UsageError, match="no model"):
        Catalog.of([])
    with pytest.raises(UsageError, match="rename"):
        Catalog.of([folder, folder / "alpha"])


def test_a_drafter_directory_is_of_the_first_model_and_a_name_of_all(folder):
    one = Catalog.of([folder], drafter=str(folder / "beta")).entries
    assert [entry.drafter for entry in one] == [str(folder / "beta"), None]
    assert [entry.drafter for entry in Catalog.of([folder], drafter="ngram").entries] == [
        "ngram",
        "ngram",
    ]


def test_fewer_models(tmp_path):
    catalog = Catalog((Entry("a", tmp_path), Entry("b", tmp_path)), {"x": "a", "y": "b"})
    fewer = catalog.only({"b"})
    assert fewer.resolve(None) == "b"
    assert fewer.resolve("y") == "b"
    with pytest.raises(RequestRejected):
        fewer.resolve("x")
