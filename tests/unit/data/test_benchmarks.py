"""Benchmark files: formats, digests, what is wrong with them."""

import gzip
import hashlib
import json

import pytest

from optiq import hub
from optiq.data.benchmarks import FILES, BenchmarkData, digest, read_rows
from optiq.errors import EngineFailure, UsageError
from tests.benchmarks import read, write, write_benchmarks

# sha256 of google/IFEval's file at the pinned commit, as public projects have written it down
HUB_IFEVAL = "6a85310ca8ce15eff755aa08a3a4ff931c7e273e7515ebb3c492ea85fd8288f2"
OWN = [name for name in FILES if not name.startswith("humaneval")]


@pytest.fixture
def folder(tmp_path):
    return write_benchmarks(tmp_path)


@pytest.fixture
def published(shared):
    return shared / "assets" / "eval"


@pytest.fixture
def hub_files(monkeypatch):
    """Files that the hub has, by their place there."""
    files = {}

    def fetch(repo_id, name, *, revision, offline):
        assert (repo_id, revision) in {file.repo for file in FILES.values()}
        assert not offline
        return files[name]

    monkeypatch.setattr(hub, "fetch_dataset_file", fetch)
    return files


@pytest.mark.assets
@pytest.mark.parametrize("name", FILES)
def test_the_digests_are_those_of_the_published_rows(published, name):
    found = BenchmarkData(published).load(name)
    assert found.provenance.published
    assert found.provenance.digest == FILES[name].digest == digest(found.rows)


@pytest.mark.assets
def test_the_hubs_copy_of_ifeval_is_repaired(published, tmp_path, hub_files):
    text = (published / "ifeval/input_data.jsonl").read_bytes()
    example = b"(an example of a placeholder is [address])."
    before, asked, after = text.rstrip().partition(b"contain at least 3 placeholders " + example)
    assert asked
    old = before + b"contain at least one placeholder " + example + after
    assert hashlib.sha256(old).hexdigest() == HUB_IFEVAL
    hub_files["ifeval_input_data.jsonl"] = tmp_path / "x.jsonl"
    (tmp_path / "x.jsonl").write_bytes(old)
    assert (
        BenchmarkData(None).load("ifeval/input").rows
        == BenchmarkData(published).load("ifeval/input").rows
    )


@pytest.mark.assets
def test_parquet_and_its_empty_columns_give_the_same_rows(published, tmp_path, hub_files):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'eval'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'eval'")
    for name in ("gsm8k/test", "mmlu/dev", "ifeval/input"):
        rows = [dict(row) for row in BenchmarkData(published).load(name).rows]
        path = tmp_path / f"{name.replace('/', '-')}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)  # fills kwargs with nulls
        hub_files[FILES[name].remote] = path
        loaded = BenchmarkData(None).load(name)
        assert list(loaded.rows) == rows
        assert loaded.provenance.source == "@".join(FILES[name].repo) + f"/{FILES[name].remote}"


@pytest.mark.assets
def test_rows_of_the_hub_that_are_not_the_known_ones_are_refused(published, tmp_path, hub_files):
    rows = read(published / "gsm8k/test.jsonl")
    rows[700]["question"] += " "
    write(tmp_path / "moved.jsonl", rows)
    hub_files[FILES["gsm8k/test"].remote] = tmp_path / "moved.jsonl"
    with pytest.raises(EngineFailure, match=r"other rows than .*digest .* expected 176818e03496"):
        BenchmarkData(None).load("gsm8k/test")


@pytest.mark.parametrize("name", OWN)
def test_files_of_ones_own_are_taken_and_named_by_their_digest(folder, name):
    data = BenchmarkData(folder)
    found = data.load(name).provenance
    assert not found.published
    assert found.source == str(folder / FILES[name].path)
    before = data.variant([name])
    path = folder / FILES[name].path
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]))
    after = data.variant([name])
    assert before != after
    assert len(before) == len(after) == len("data-12345678")


@pytest.mark.assets
def test_published_files_need_no_name(published):
    assert BenchmarkData(published).variant(["gsm8k/test", "bfcl/answers"]) == ""


def test_spaces_order_of_keys_gzip_and_other_fields_do_not_change_a_digest(folder):
    data = BenchmarkData(folder)
    before = data.load("gsm8k/test").provenance.digest
    path = folder / "gsm8k/test.jsonl"
    rows = read(path)
    path.write_text(
        "\n\n".join(
            json.dumps({"n": 1, "answer": r["answer"], "question": r["question"]}) for r in rows
        )
    )
    assert data.load("gsm8k/test").provenance.digest == before
    (folder / "x.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_rows(folder / "x.gz")) == list(read_rows(path))


def test_a_missing_directory_or_file(tmp_path):
    with pytest.raises(UsageError, match="is no directory; give one with gsm8k/test.jsonl"):
        BenchmarkData(tmp_path / "nowhere").load("gsm8k/test")
    with pytest.raises(UsageError, match="has no gsm8k/test.jsonl; put the file there"):
        BenchmarkData(tmp_path).load("gsm8k/test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"question": "q", "answer": "a"}\n{"question": ', "line 2 is not JSON"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"question": "q"}', r"row 0 has no 'answer'; it has \['question'\]"),
        (b'{"question": "q", "answer": 5}', "'answer' of row 0 is '5', which is not of"),
        (b'{"question": "\\ud800", "answer": "a"}', "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_file_of_another_format(folder, content, message):
    (folder / "gsm8k/test.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        BenchmarkData(folder).load("gsm8k/test")


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("mmlu/test", "choices", ["a", "b", "c"]),
        ("mmlu/test", "answer", 4),
        ("mmlu/test", "answer", True),
        ("ifeval/input", "key", "1000"),
        ("ifeval/input", "kwargs", {}),
        ("bfcl/questions", "question", [{"role": "user", "content": "x"}]),
        ("bfcl/questions", "function", [{"name": "f"}]),
        ("bfcl/answers", "ground_truth", [{"f": {"x": 1}}]),
    ],
)
def test_values_of_another_form(folder, name, column, value):
    path = folder / FILES[name].path
    rows = read(path)
    rows[1][column] = value
    write(path, rows)
    with pytest.raises(UsageError, match=f"'{column}' of row 1 is "):
        BenchmarkData(folder).load(name)


def test_a_gzip_file_that_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-9])
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_rows(path))


def test_a_parquet_file_that_is_none(tmp_path):
    pytest.importorskip("pyarrow", reason="needs the extra 'eval'")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_rows(tmp_path / "x.parquet"))
