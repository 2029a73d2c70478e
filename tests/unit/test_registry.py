"""Names, built-ins and plug-ins of a registry."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from optiq.errors import UsageError
from optiq.registry import Registry

BUILTIN = {"path": "pathlib:Path", "counter": "collections:Counter"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a distribution with entry points of the group `optiq.thing`."""

    def add(name, points, modules=None):
        place = tmp_path / name
        info = place / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = ["[optiq.thing]", *(f"{key} = {value}" for key, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, text in (modules or {}).items():
            (place / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(place)

    return add


def test_names_are_sorted():
    assert Registry("thing", BUILTIN).names() == ["counter", "path"]


def test_get_imports_the_attribute():
    registry = Registry("thing", BUILTIN)
    assert registry.get("path") is Path
    assert registry.get("counter") is Counter


def test_nothing_is_imported_before_it_is_used():
    registry = Registry("thing", {"broken": "no_such_module_at_all:X"})
    assert registry.names() == ["broken"]
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        registry.get("broken")


def test_an_unknown_name_is_an_error_that_lists_the_others():
    with pytest.raises(UsageError) as caught:
        Registry("thing", BUILTIN).get("pat")
    assert str(caught.value) == "no thing 'pat'; there are ['counter', 'path']"


def test_later_changes_of_the_table_do_not_matter():
    table = dict(BUILTIN)
    registry = Registry("thing", table)
    table.clear()
    assert registry.names() == ["counter", "path"]


def test_a_plug_in_is_one_of_the_names(install):
    install("plugin_a", {"extra": "registry_plugin_a:VALUE"}, {"registry_plugin_a": "VALUE = 7"})
    registry = Registry("thing", BUILTIN)
    assert registry.names() == ["counter", "extra", "path"]
    assert registry.get("extra") == 7
    assert Registry("other", BUILTIN).names() == ["counter", "path"]


def test_a_plug_in_may_not_redefine_a_built_in(install):
    install("plugin_b", {"path": "registry_plugin_b:VALUE"})
    with pytest.raises(UsageError) as caught:
        Registry("thing", BUILTIN)
    text = str(caught.value)
    assert "registry_plugin_b:VALUE" in text
    assert "built-in thing 'path'" in text
    assert "uninstall" in text


def test_two_plug_ins_of_one_name_are_an_error(install):
    install("plugin_c", {"extra": "registry_plugin_c:VALUE"})
    install("plugin_d", {"extra": "registry_plugin_d:VALUE"})
    with pytest.raises(UsageError, match=r"registry_plugin_[cd].*registry_plugin_[cd].*'extra'"):
        Registry("thing", BUILTIN)


@pytest.mark.parametrize(
    ("modules", "cause"),
    [({}, "No module named"), ({"registry_plugin_e": "OTHER = 1"}, "has no attribute")],
    ids=["module missing", "attribute missing"],
)
def test_a_plug_in_that_cannot_be_loaded_is_named(install, modules, cause, monkeypatch):
    monkeypatch.delitem(sys.modules, "registry_plugin_e", raising=False)
    install("plugin_e", {"extra": "registry_plugin_e:VALUE"}, modules)
    registry = Registry("thing", BUILTIN)
    assert registry.get("counter")
    with pytest.raises(UsageError) as caught:
        registry.get("extra")
    assert "plug-in for thing 'extra' cannot be loaded" in str(caught.value)
    assert cause in str(caught.value)
