"""Safetensors on disk: strict headers, fingerprints, and the streaming writer."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.backend import mx
from optiq.errors import EngineFailure, UsageError
from optiq.models.safetensors_io import (
    INDEX_NAME,
    ShardWriter,
    TensorSpec,
    disk_failure,
    fingerprint,
    header_bytes,
    read_headers,
    write_synced,
)
from tests.tiny import tiny_checkpoint


def entry(shape=(2,), begin=0, dtype="F32", size=None):
    end = begin + (int(np.prod(shape)) * 4 if size is None else size)
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_raw(path, header, data=b"\0" * 8, length=None):
    """A file with any header: a dict, JSON text, or bytes."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    path.write_bytes(prefix + text + data)


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_headers(folder)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # what is wrong; what to do


# -- headers of one file ---------------------------------------------------------------------------


def test_headers_say_where_tensors_lie(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array([7], dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    headers = read_headers(tmp_path)
    assert set(headers) == set(arrays)
    data = path.read_bytes()
    for name, header in headers.items():
        assert header.name == name
        assert header.shape == arrays[name].shape
        assert header.file == path
        assert header.size_bytes == arrays[name].nbytes
        assert data[header.begin : header.end] == arrays[name].tobytes()
    assert [headers[n].dtype for n in ("b", "a", "empty")] == ["F32", "I64", "F16"]
    begins = [header.begin for header in headers.values()]
    assert begins == sorted(begins)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{", "no sound safetensors file"),
        ("[1, 2]", "the header is not a JSON object"),
        (b'{"a\xff": 1}', "no sound safetensors file"),
        ("{}".encode("utf-16"), "no sound safetensors file"),
        ("[" * 100_000, "no sound safetensors file"),
        ({"a": 1}, "the entry of 'a' is not dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "the entry of 'a' is not"),
        ({"a": entry() | {"more": 1}}, "the entry of 'a' is not"),
        ({"a": entry(dtype="F31")}, "'a' has the unknown dtype 'F31'"),
        ({"a": entry(dtype=["F32"])}, "unknown dtype"),
        ({"a": entry() | {"shape": [-2]}}, "are no natural numbers"),
        ({"a": entry() | {"shape": [True, 2]}}, "are no natural numbers"),
        ({"a": entry() | {"shape": [2.0]}}, "are no natural numbers"),
        ({"a": entry() | {"shape": 2}}, "are no natural numbers"),
        ({"a": entry() | {"data_offsets": [0, 4, 8]}}, "are no natural numbers"),
        ({"a": entry() | {"data_offsets": [8, 0]}}, "'a' needs 8 bytes, its offsets span -8"),
        ({"a": entry(size=4)}, "'a' needs 8 bytes, its offsets span 4"),
        ({"a": entry((2**62, 2**62, 16), size=8)}, "its offsets span 8"),
        ({"a": entry(), "b": entry((1,), begin=4)}, "tensors overlap or leave a hole"),
        ({"a": entry((1,)), "b": entry((1,), begin=0)}, "tensors overlap or leave a hole"),
        ({"a": entry((1,), begin=4)}, "tensors overlap or leave a hole"),
        ({"a": entry((1,))}, "4 bytes at its end belong to no tensor"),
        ({}, "8 bytes at its end belong to no tensor"),
        ({"a": entry((3,))}, "cut short: 'a' ends at byte"),
        (
            '{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2),
            "'a' is listed twice",
        ),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, header, words):
    write_raw(tmp_path / "model.safetensors", header)
    refused(tmp_path, words)


def test_metadata_is_no_tensor(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"__metadata__": {"a": "b"}, "x": entry()})
    assert list(read_headers(tmp_path)) == ["x"]


@pytest.mark.parametrize("keep", [0, 3, 8, 20, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": entry()})
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "cut short")


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, "{}", b"", length=200_000_000)
    with path.open("r+b") as file:
        file.truncate(300_000_000)  # a hole, no blocks on disk
    refused(tmp_path, "a header of 200000000 bytes is above the format's limit")
    write_raw(path, "{}", b"", length=2**64 - 1)
    refused(tmp_path, "cut short")


@given(
    position=st.integers(0, 10**6),
    value=st.integers(0, 255),
)
@settings(max_examples=200)
def test_a_changed_byte_is_refused_or_harmless(position, value):
    """Whatever byte of the header is wrong: a UsageError, or headers within the file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        write_raw(path, {"a": entry(), "b": entry((2, 3), begin=8)}, b"\0" * 32)
        data = bytearray(path.read_bytes())
        data[position % (len(data) - 32)] = value
        path.write_bytes(data)
        try:
            headers = read_headers(Path(name))
        except UsageError:
            return
        assert sum(header.size_bytes for header in headers.values()) == 32
        assert all(0 <= h.begin <= h.end <= len(data) for h in headers.values())


# -- directories -----------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Two shards with an index."""
    for number, name in enumerate("ab", 1):
        write_raw(tmp_path / f"model-0000{number}-of-00002.safetensors", {name: entry()})
    write_index(
        tmp_path,
        {f"{name}": f"model-0000{n}-of-00002.safetensors" for n, name in enumerate("ab", 1)},
    )
    return tmp_path


def test_tensors_of_all_shards(sharded):
    headers = read_headers(sharded)
    assert list(headers) == ["a", "b"]
    assert headers["b"].file.name == "model-00002-of-00002.safetensors"
    (sharded / INDEX_NAME).unlink()
    assert read_headers(sharded) == headers


def test_files_that_the_index_does_not_name_are_not_read(sharded):
    write_raw(sharded / "model-old.safetensors", {"a": entry(), "c": entry(begin=8)})
    assert list(read_headers(sharded)) == ["a", "b"]


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\m.safetensors",
        "..",
        ".",
        "",
    ],
)
def test_an_index_may_not_name_files_elsewhere(sharded, shard):
    write_index(sharded, {"a": shard})
    refused(sharded, "which is no file name inside the directory; do not trust this model")


def test_a_shard_may_not_be_a_link_to_elsewhere(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(sharded, "is a link to .*secret.safetensors, outside the directory")


def test_links_of_the_hubs_cache_are_read(tmp_path, sharded):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in [*sharded.glob("*.safetensors"), sharded / INDEX_NAME]:
        shutil.copy(file, blobs / file.name.upper())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name.upper())
    assert list(read_headers(snapshot)) == ["a", "b"]


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    refused(sharded, "lacks the shard model-00001-of-00002.safetensors")


def test_a_tensor_that_is_not_in_its_shard(sharded):
    write_index(
        sharded, {"a": "model-00002-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    )
    refused(sharded, "says that 'a' is in model-00002-of-00002.safetensors, which does not hold it")


def test_a_tensor_in_the_wrong_shard(sharded):
    one, two = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    write_index(sharded, {"a": two, "b": one})
    refused(sharded, "which does not hold it")


def test_a_tensor_in_two_shards(sharded):
    write_raw(
        sharded / "model-00002-of-00002.safetensors",
        {"a": entry(), "b": entry(begin=8)},
        b"\0" * 16,
    )
    refused(sharded, "'a' is in both .*model-00001.* and .*model-00002")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1, "a": 2}}',
    ],
)
def test_an_unreadable_index_is_refused(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    refused(sharded, f"{INDEX_NAME}.*download it again")


def test_an_index_that_names_a_number(sharded):
    write_index(sharded, {"a": 3})
    refused(sharded, "names the shard 3, which is no file name")


def test_no_weights(tmp_path):
    refused(tmp_path, r"has no model\*.safetensors; give a model directory with weights")


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(tmp_path, "only pickled weights .pytorch_model.bin., which can run code")


# -- fingerprint -----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path)


def test_a_fingerprint_does_not_depend_on_the_place(checkpoint, tmp_path):
    before = fingerprint(checkpoint)
    assert len(before) == 64
    assert int(before, 16) >= 0
    copy = tmp_path / "elsewhere" / "other-name"
    shutil.copytree(checkpoint, copy)
    os.utime(copy / "model.safetensors", (0, 0))
    assert fingerprint(copy) == before
    (copy / "README.md").write_text("not part of the model")
    assert fingerprint(copy) == before


@pytest.mark.parametrize("at", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_fingerprint_changes_with_weights(checkpoint, name, at):
    before = fingerprint(checkpoint)
    header = read_headers(checkpoint)[name]
    places = {"first": header.begin, "last": header.end - 1}
    place = places.get(at, (header.begin + header.end) // 2)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ 1]))
    assert fingerprint(checkpoint) != before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_fingerprint_changes_with_config_and_tokenizer(checkpoint, name):
    before = fingerprint(checkpoint)
    file = checkpoint / name
    file.write_text((file.read_text() if file.exists() else "{}") + " ")
    assert fingerprint(checkpoint) != before


def test_a_fingerprint_changes_with_names_of_tensors_and_shards(checkpoint):
    file = checkpoint / "model.safetensors"
    before = fingerprint(checkpoint)
    file.rename(checkpoint / "model-a.safetensors")
    renamed = fingerprint(checkpoint)
    data = (checkpoint / "model-a.safetensors").read_bytes()
    file.write_bytes(data.replace(b"model.norm.weight", b"model.norn.weight", 1))
    (checkpoint / "model-a.safetensors").unlink()
    assert len({before, renamed, fingerprint(checkpoint)}) == 3


def test_a_fingerprint_of_a_broken_file_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match="cut short"):
        fingerprint(checkpoint)


# -- writer ----------------------------------------------------------------------------------------

ARRAYS = {
    "z.first": np.arange(12, dtype=np.float32).reshape(3, 4),
    "é.second": np.arange(6, dtype=np.uint32).reshape(2, 3),
    "half": np.linspace(-1, 1, 5, dtype=np.float16),
    "scalar": np.array(3, dtype=np.int64),
    "empty": np.zeros((2, 0), dtype=np.uint8),
    "flags": np.array([True, False]),
}
CODES = {
    "float32": "F32",
    "uint32": "U32",
    "float16": "F16",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}


def specs_of(arrays):
    return [TensorSpec(name, CODES[str(a.dtype)], a.shape) for name, a in arrays.items()]


def write(folder, arrays, **options):
    with ShardWriter(folder, specs_of(arrays), **options) as writer:
        for name, array in arrays.items():
            data = array.tobytes()
            writer.write(name, [data[:3], memoryview(data[3:])])


def assert_same(found, arrays):
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        value = np.array(found[name])
        assert value.dtype == array.dtype
        assert value.shape == array.shape
        assert np.array_equal(value, array)


def test_written_tensors_are_read_by_everyone(tmp_path):
    write(tmp_path, ARRAYS)
    file = tmp_path / "model.safetensors"
    assert_same(safetensors.numpy.load_file(file), ARRAYS)
    assert_same(mx.load(str(file)), ARRAYS)
    assert list(read_headers(tmp_path)) == list(ARRAYS)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "mlx"}
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(ARRAYS), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    data = int.from_bytes(file.read_bytes()[:8], "little")
    assert data % 8 == 0


def test_several_shards(tmp_path):
    write(tmp_path, ARRAYS, shard_bytes=50)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    found = {}
    for name in names:
        part = safetensors.numpy.load_file(tmp_path / name)
        assert sum(array.nbytes for array in part.values()) <= 50
        found |= part
    assert_same(found, ARRAYS)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert {n: h.file.name for n, h in read_headers(tmp_path).items()} == index["weight_map"]


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    arrays = {n: np.zeros(size, np.uint8) for n, size in (("a", 1), ("b", 99), ("c", 1), ("d", 1))}
    write(tmp_path, arrays, shard_bytes=10)
    files = [header.file.name[6:11] for header in read_headers(tmp_path).values()]
    assert files == ["00001", "00002", "00003", "00003"]


@pytest.mark.parametrize("shard_bytes", [20, 60, 10**9])
def test_header_bytes_are_what_files_have_beside_data(tmp_path, shard_bytes):
    write(tmp_path, ARRAYS, shard_bytes=shard_bytes)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    data = sum(array.nbytes for array in ARRAYS.values())
    assert on_disk - data == header_bytes(specs_of(ARRAYS), shard_bytes)


def test_equal_tensors_give_equal_bytes(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        write(folder, ARRAYS, shard_bytes=50)
    a, b = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert a == b


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    shard_bytes=st.integers(1, 60),
)
@settings(max_examples=30)
def test_any_sizes_survive(sizes, shard_bytes):
    random = np.random.default_rng(0)
    arrays = {f"t{n}": random.integers(0, 256, s).astype(np.uint8) for n, s in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, arrays, shard_bytes=shard_bytes)
        headers = read_headers(folder)
        assert list(headers) == list(arrays)
        for key, header in headers.items():
            with header.file.open("rb") as file:
                file.seek(header.begin)
                assert file.read(header.size_bytes) == arrays[key].tobytes()


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (["b"], "'b' was written where 'a' is next"),
        (["a", "a"], "'a' was written where 'b' is next"),
        (["a", "b", "c"], "'c' was written where 'None' is next"),
        (["a"], "'b' was never written"),
        ([], "'a' was never written"),
    ],
)
def test_another_order_is_refused(tmp_path, order, words):
    specs = [TensorSpec(name, "U8", (1,)) for name in "ab"]

    def run():
        with ShardWriter(tmp_path, specs) as writer:
            for name in order:
                writer.write(name, [b"x"])

    with pytest.raises(ValueError, match=words):
        run()
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize("data", [b"", b"x", b"xxx"])
def test_another_length_is_refused(tmp_path, data):
    with (
        pytest.raises(ValueError, match=f"'a' has {len(data)} bytes, not 2"),
        ShardWriter(tmp_path, [TensorSpec("a", "U8", (2,))]) as writer,
    ):
        writer.write("a", [data])


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same name"):
        ShardWriter(tmp_path, [TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (2,))])


def test_an_error_of_the_caller_is_kept_and_no_index_is_written(tmp_path):
    specs = [TensorSpec(name, "U8", (1,)) for name in "ab"]

    def run():
        with ShardWriter(tmp_path, specs) as writer:
            writer.write("a", [b"x"])
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run()
    assert not (tmp_path / INDEX_NAME).exists()


# -- a disk that refuses ---------------------------------------------------------------------------

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_dev_full
@pytest.mark.parametrize("size", [10, 10**6])
@pytest.mark.parametrize("name", ["model.safetensors", INDEX_NAME])
def test_a_full_disk_is_an_engine_failure(tmp_path, size, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(EngineFailure, match=f"disk is full: writing into .*{tmp_path.name}"):
        write(tmp_path, {"a": np.zeros(size, np.uint8)})


@needs_dev_full
def test_a_disk_that_fills_at_the_second_shard(tmp_path):
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to("/dev/full")
    with pytest.raises(EngineFailure, match="disk is full"):
        write(tmp_path, {"a": np.zeros(9, np.uint8), "b": np.zeros(9, np.uint8)}, shard_bytes=10)
    assert not (tmp_path / INDEX_NAME).exists()


@needs_dev_full
def test_a_full_disk_while_a_file_is_synced(tmp_path):
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(EngineFailure, match="disk is full"), disk_failure(tmp_path):
        write_synced(tmp_path / "x", b"data")


def test_a_file_that_may_not_grow_is_an_engine_failure(tmp_path):
    """A limit on file sizes stops a write in the middle, as a quota does."""
    program = f"""
import resource
from pathlib import Path
from optiq.errors import EngineFailure
from optiq.models.safetensors_io import ShardWriter, TensorSpec
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with ShardWriter(Path({str(tmp_path)!r}), [TensorSpec("a", "U8", (10**6,))]) as writer:
        writer.write("a", (bytes(1000) for _ in range(1000)))
except EngineFailure as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert f"{tmp_path} cannot be written" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_missing_folder_is_an_engine_failure(tmp_path):
    with pytest.raises(EngineFailure, match="cannot be written"):
        write(tmp_path / "gone", {"a": np.zeros(1, np.uint8)})
