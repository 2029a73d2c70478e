"""Artifacts: their JSON, what is refused and how, atomic writing, and the laws of options."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiq import artifacts
from optiq.artifacts import (
    BITS,
    GROUP_SIZES,
    KEEP,
    LATTICE,
    Artifact,
    BitPlan,
    Fidelity,
    ModuleInfo,
    QuantOption,
    SensitivityTable,
    menu,
    write_atomic,
)
from optiq.errors import ArtifactMismatch, UsageError
from tests.unit.quant.tables import make_scores, make_table

KINDS = [
    kind
    for kind in vars(artifacts).values()
    if isinstance(kind, type) and issubclass(kind, Artifact) and kind is not Artifact
]
affine_options = st.builds(
    QuantOption, st.just("affine"), st.sampled_from(BITS), st.sampled_from(GROUP_SIZES)
)


def table():
    """A table of two modules, one of them on a grid."""
    modules = [
        ModuleInfo("a.q", "linear", (64, 128)),
        ModuleInfo("b", "embedding", (320, 96), True),
    ]
    options = (*menu(128), LATTICE)
    first = make_scores(modules[0], [1 / 3 * n for n in range(len(options))], options=options)
    return make_table([first, make_scores(modules[1], [1e-300] * len(menu(96)))])


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [*menu(128), KEEP, LATTICE], ids=lambda option: option.key)
def test_parse_reads_every_key(option):
    assert QuantOption.parse(option.key) == option


def test_bf16_means_keep():
    assert QuantOption.parse("bf16") is KEEP


@pytest.mark.parametrize(
    "text",
    ["", "4", "4/", "/64", "7/64", "1/64", "16/64", "4/16", "4/256", "4/64/32", "-4/64", "4/64.0",
     "4.0/64", "int4", "KEEP", " 4/64", "four/64", "²/64", "4/⑥"],
)  # fmt: skip
def test_parse_names_what_it_cannot_read(text):
    with pytest.raises(UsageError) as caught:
        QuantOption.parse(text)
    message = str(caught.value)
    assert f"'{text}' is no quantization option" in message
    assert str(list(BITS)) in message
    assert str(list(GROUP_SIZES)) in message


@given(st.text(max_size=8))
def test_parse_reads_or_refuses_any_text(text):
    try:
        option = QuantOption.parse(text)
    except UsageError:
        return
    assert option in {*menu(128), KEEP, LATTICE}


@given(
    option=affine_options,
    rows=st.integers(1, 50),
    groups=st.integers(1, 20),
    itemsize=st.sampled_from([2, 4]),
)
def test_size_is_that_of_the_arrays(option, rows, groups, itemsize):
    size = groups * 128
    words, scales = rows * size * option.bits // 32, rows * size // option.group_size
    expected = 4 * words + 2 * itemsize * scales
    assert option.size_bytes((rows, size), itemsize) == expected
    assert option.size_bytes((rows, size), itemsize) * 3 == option.size_bytes(
        (3, rows, size), itemsize
    )


def test_stored_bits_per_weight():
    shape = (128, 1024)
    for key, bpw in (("4/64", 4.5), ("4/32", 5), ("2/128", 2.25), ("8/64", 8.5), ("lattice", 5)):
        size_bytes = QuantOption.parse(key).size_bytes(shape, 2)
        assert size_bytes * 8 / (128 * 1024) == bpw
    assert KEEP.size_bytes(shape, 2) * 8 == 16 * 128 * 1024
    assert KEEP.size_bytes(shape, 4) * 8 == 32 * 128 * 1024


@given(st.integers(1, 5000))
def test_the_menu_has_the_groups_that_divide_a_row(in_dims):
    found = menu(in_dims)
    assert set(found) == {
        QuantOption("affine", bits, group)
        for bits in BITS
        for group in GROUP_SIZES
        if in_dims % group == 0
    }
    assert len(found) == len(set(found))


def test_the_menu_grows_in_size():
    sizes = [option.size_bytes((8, 1024), 2) for option in menu(1024)]
    assert sizes == sorted(set(sizes))
    assert [option.key for option in menu(64)][:3] == ["2/64", "2/32", "3/64"]
    assert menu(48) == ()


def test_a_module_knows_its_size():
    info = ModuleInfo("m", "expert", (4, 16, 128))
    assert (info.in_dims, info.num_params) == (128, 4 * 16 * 128)


def test_the_score_of_an_option():
    scores = table().modules[0]
    assert scores.score(LATTICE).option == LATTICE
    with pytest.raises(ArtifactMismatch, match=r"b was not measured at '4/128'; it has \['2/32'"):
        table().modules[1].score(QuantOption.parse("4/128"))


def test_a_table_counts_weights():
    assert table().num_params == 64 * 128 + 320 * 96


# -- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_has_a_schema_of_its_own(kind):
    assert kind.schema.startswith("optiq.")
    assert [k.schema for k in KINDS].count(kind.schema) == 1
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_json_gives_any_artifact_back(kind, data):
    """Any text, any number, infinite and undefined ones too."""
    artifact = data.draw(st.from_type(kind))
    artifact = dataclasses.replace(artifact, schema_version=kind.schema_version)
    text = artifact.to_json()
    assert text.endswith("}\n")
    record = json.loads(text, parse_constant=pytest.fail)
    assert list(record)[0] == "schema"
    assert list(record)[1:] == [field.name for field in dataclasses.fields(kind)]
    back = kind.from_dict(record, "here")
    assert repr(back) == repr(artifact)
    assert back.to_json() == text
    assert kind.from_dict(record, "here") is not back  # the record itself is left as it was


def test_a_saved_table_comes_back(tmp_path):
    path = tmp_path / "new" / "folder" / "sensitivity.json"
    table().save(path)
    assert SensitivityTable.load(path) == table()
    assert [file.name for file in path.parent.iterdir()] == ["sensitivity.json"]


def test_equal_artifacts_are_equal_bytes_in_utf8(tmp_path):
    one = dataclasses.replace(table(), calibration="текст")
    for name in ("a.json", "b.json"):
        one.save(tmp_path / name)
    data = (tmp_path / "a.json").read_bytes()
    assert data == (tmp_path / "b.json").read_bytes()
    assert "текст".encode() in data


def record(**changes):
    """The JSON of a table with some fields changed; None takes one out."""
    data = json.loads(table().to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value is not None})


def refusal(path, content, kind=SensitivityTable):
    """Class and message of the error that a file's content gives."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        kind.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert len(message) < 600
    return type(caught.value), message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_newer_schema_is_refused(tmp_path, kind):
    newer = json.dumps({"schema": kind.schema, "schema_version": kind.schema_version + 1})
    error, message = refusal(tmp_path / "x.json", newer, kind)
    assert error is ArtifactMismatch
    assert f"schema version {kind.schema_version + 1}" in message
    assert "update optiq" in message


@pytest.mark.parametrize("version", [None, "1", 1.5, True, 0, -1])
def test_a_version_that_is_none_is_refused(tmp_path, version):
    error, message = refusal(tmp_path / "x.json", record(schema_version=version))
    assert error is ArtifactMismatch
    assert "schema version" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"{'a': 1}", b"nonsense", b"[" * 100_000, record()[:-20]],
    ids=["empty", "brace", "binary", "quotes", "word", "deep", "truncated"],
)
def test_what_is_no_json_is_refused(tmp_path, content):
    error, message = refusal(tmp_path / "x.json", content)
    assert error is UsageError
    assert "cannot be read as JSON" in message
    assert "make it again" in message


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "3", '"optiq.sensitivity"', "{}", record(schema="optiq.plan"),
     record(schema=None)],
)  # fmt: skip
def test_another_artifact_is_refused(tmp_path, content):
    error, message = refusal(tmp_path / "x.json", content)
    assert error is ArtifactMismatch
    assert "no optiq.sensitivity artifact" in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"source": None}, "source"),
        ({"method": "guess"}, "method"),
        ({"num_tokens": "many"}, "num_tokens"),
        ({"modules": {"a": 1}}, "modules"),
        ({"modules": [{"module": {}}]}, "modules.0"),
        ({"checks": {"split_half": None}}, "checks.split_half"),
    ],
)
def test_fields_that_do_not_validate_are_named(tmp_path, changes, field):
    error, message = refusal(tmp_path / "x.json", record(**changes))
    assert error is ArtifactMismatch
    assert "does not validate" in message
    assert field in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=r"plan\.json does not exist; give the path of a optiq\.plan"
    ):
        BitPlan.load(tmp_path / "plan.json")


def test_a_directory_is_no_artifact(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Fidelity.load(tmp_path)


# -- atomic writing ------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Stands for Ctrl-C and for a full disk."""


def fail(*_):
    raise Interrupted


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "plan.json"
    write_atomic(path, b"old")
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(Interrupted):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_an_interrupted_first_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Interrupted):
        table().save(tmp_path / "new" / "sensitivity.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_data_is_on_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        Path, "replace", lambda *paths: (order.append("replace"), replace(*paths))[1]
    )
    write_atomic(tmp_path / "x", b"data")
    assert order == ["fsync", "replace"]
    assert (tmp_path / "x").read_bytes() == b"data"


def test_writing_over_a_file_replaces_it(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, b"a longer text")
    write_atomic(path, b"short")
    assert path.read_bytes() == b"short"
