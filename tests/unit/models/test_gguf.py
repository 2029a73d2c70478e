"""GGUF files -> directories: each weight in its place, nothing else accepted, nothing left."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from optiq.backend import mx
from optiq.errors import EngineFailure, OptiqError, UnsupportedModel, UsageError
from optiq.events import Event, Notice, Progress, StageDone, StageStarted
from optiq.models import gguf as importer
from optiq.models.gguf import import_gguf
from optiq.models.load import load_tokenizer, open_source
from optiq.upstream import build_model
from tests.unit.models.ggufs import Array, Packed, Recipe, packed, random_blocks, recipe

TYPES = [
    Kind.F32,
    Kind.F16,
    Kind.BF16,
    Kind.Q8_0,
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.Q4_K,
    Kind.Q5_K,
    Kind.Q6_K,
]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
}
DOWN = "blk.0.ffn_down.weight"
ONE_BLOCK = {"num_hidden_layers": 1}


def imported(made: Recipe, folder: Path, **options: Any) -> Path:
    """The directory made of a recipe."""
    out = folder / "out"
    import_gguf(made.write(folder / "model.gguf"), out, **options)
    return out


def stored(out: Path) -> dict[str, mx.array]:
    return mx.load(str(out / "model.safetensors"))


def as_numpy(value: mx.array) -> Array:
    return np.array(value.astype(mx.float32))


def refusal(source: Recipe | Path, folder: Path, kind: type[OptiqError] = UsageError) -> str:
    """The sentence of a refused import, which must leave nothing behind."""
    path = source if isinstance(source, Path) else source.write(folder / "model.gguf")
    out = folder / "results" / "model"
    with pytest.raises(kind) as caught:
        import_gguf(path, out)
    assert type(caught.value) is kind
    assert not list(folder.glob("results/*"))
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()  # one line, nothing that moves a cursor
    return message


# Round trips


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back_with_its_weights_and_its_logits(variant, tmp_path):
    arch, overrides = VARIANTS[variant]
    made = recipe(arch, **overrides)
    source = open_source(str(imported(made, tmp_path)))

    assert source.info.dtype == "float16"
    weights = source.weights()
    assert set(weights) == set(made.weights)
    for name, value in made.weights.items():
        np.testing.assert_array_equal(np.array(weights[name]), value.astype(np.float16), name)

    original = build_model(made.config)
    halves = {name: mx.array(value.astype(np.float16)) for name, value in made.weights.items()}
    original.load_weights(list(original.sanitize(halves).items()), strict=True)
    model = source.model()
    for each in (original, model):
        each.set_dtype(mx.float32)
    ids = mx.random.randint(0, 320, (2, 24), key=mx.random.key(1))
    expected = np.array(original(ids))
    assert expected.std() > 0.1
    np.testing.assert_allclose(np.array(model(ids)), expected, rtol=0, atol=1e-5)


def test_the_file_has_other_rows_than_the_directory():
    # The test above would see nothing if rows of q and k had the same order in both.
    made = recipe()
    for stem in ("q", "k"):
        rows = made.weights[f"model.layers.0.self_attn.{stem}_proj.weight"]
        assert not np.array_equal(made.tensors[f"blk.0.attn_{stem}.weight"], rows)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_gguf_package_reads_it(kind, tmp_path):
    made = recipe("qwen3", hidden_size=256, **ONE_BLOCK)  # rows of q and k stay where they are
    made.pack(kind)
    weights = stored(imported(made, tmp_path))
    reader = GGUFReader(tmp_path / "model.gguf")
    assert {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1} == {kind}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)
    by_name = {names.get_name(name, (".weight",)): value for name, value in weights.items()}
    assert len(by_name) == len(reader.tensors)
    for tensor in reader.tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        assert expected.any()
        value = by_name[tensor.name]
        assert value.dtype == mx.float16
        np.testing.assert_array_equal(np.array(value), expected.astype(np.float16), tensor.name)


def test_packed_rows_of_q_and_k_are_put_in_order(tmp_path):
    made = recipe("llama", hidden_size=256, **ONE_BLOCK)
    made.pack(Kind.Q4_K)
    weights = stored(imported(made, tmp_path))
    for stem, heads in (("q", 4), ("k", 2)):
        block = made.tensors[f"blk.0.attn_{stem}.weight"]
        rows = dequantize(block.data, block.kind).astype(np.float16)
        for row, values in enumerate(
            np.array(weights[f"model.layers.0.self_attn.{stem}_proj.weight"])
        ):
            head, place = divmod(row, len(rows) // heads)
            half, pair = divmod(place, len(rows) // heads // 2)
            np.testing.assert_array_equal(values, rows[head * len(rows) // heads + 2 * pair + half])


def test_the_size_of_chunks_changes_nothing(tmp_path, monkeypatch):
    made = recipe(**ONE_BLOCK)
    made.pack(Kind.Q8_0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = imported(made, tmp_path / "whole") / "model.safetensors"
    monkeypatch.setattr(importer, "_CHUNK_VALUES", 1000)
    parts = imported(made, tmp_path / "parts") / "model.safetensors"
    assert parts.read_bytes() == whole.read_bytes()


def test_equal_files_give_equal_directories(tmp_path):
    path = recipe(**ONE_BLOCK).write(tmp_path / "model.gguf")
    import_gguf(path, tmp_path / "one")
    import_gguf(path, tmp_path / "two")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o755
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "gguf-import.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_file_is_opened_by_its_path_and_imported_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIQ_CACHE", str(tmp_path / "cache"))
    path = recipe(**ONE_BLOCK).write(tmp_path / "model.gguf")
    first: list[Event] = []
    second: list[Event] = []
    source = open_source(str(path), emit=first.append)
    again = open_source(str(path), emit=second.append)
    assert again.path == source.path
    assert again.info == source.info
    assert source.config["eos_token_id"] == 258
    assert StageStarted("import model.gguf", 11, "tensors") in first
    assert Progress("import model.gguf", 11) in first
    assert StageDone("import model.gguf") in first
    assert not [event for event in second if isinstance(event, StageStarted)]


def test_an_import_knows_what_it_wrote(tmp_path):
    out = imported(recipe(**ONE_BLOCK), tmp_path)
    listed = json.loads((out / "gguf-import.json").read_text())
    there = {file.name: file.stat().st_size for file in out.iterdir()}
    assert listed == {name: size for name, size in there.items() if name != "gguf-import.json"}
    assert importer.damaged_files(out) == []
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{}")
    assert importer.damaged_files(out) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "3", "null"])
def test_an_import_without_its_list_is_damaged(text, tmp_path):
    out = imported(recipe(**ONE_BLOCK), tmp_path)
    (out / "gguf-import.json").unlink()
    if text is not None:
        (out / "gguf-import.json").write_text(text)
    assert importer.damaged_files(out) == ["gguf-import.json"]


# Numbers


@pytest.mark.parametrize("value", [65519.0, -65519.0])
def test_what_rounds_to_the_largest_float16_stays_float16(value, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.tensors[DOWN][3, 5] = value
    out = imported(made, tmp_path)
    weights = stored(out)
    assert {weight.dtype for weight in weights.values()} == {mx.float16}
    assert abs(weights["model.layers.0.mlp.down_proj.weight"][3, 5].item()) == 65504.0


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_beyond_float16_all_weights_become_bfloat16_with_a_notice(value, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.tensors[DOWN][3, 5] = value  # in the middle of the file: earlier ones were float16
    made.weights["model.layers.0.mlp.down_proj.weight"][3, 5] = value
    events: list[Event] = []
    out = imported(made, tmp_path, emit=events.append)

    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    weights = stored(out)
    assert set(weights) == set(made.weights)
    for name, weight in weights.items():
        assert weight.dtype == mx.bfloat16
        expected = mx.array(made.weights[name]).astype(mx.bfloat16)
        np.testing.assert_array_equal(as_numpy(weight), as_numpy(expected), name)
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert DOWN in notice.text
    assert "bfloat16" in notice.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.tensors[DOWN][3, 5] = value
    message = refusal(made, tmp_path)
    assert DOWN in message
    assert "not finite" in message


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(kind, scale, tmp_path):
    made = recipe(**ONE_BLOCK)
    block = packed(made.tensors[DOWN], kind)
    block.data[7, :2] = np.array([scale], np.float16).view(np.uint8)
    made.tensors[DOWN] = block
    assert DOWN in refusal(made, tmp_path)


def test_after_an_overflow_values_that_are_not_finite_are_still_refused(tmp_path):
    made = recipe(**ONE_BLOCK)
    made.tensors["blk.0.ffn_gate.weight"][0, 0] = 1e30
    made.tensors["output_norm.weight"][0] = np.inf
    assert "output_norm.weight" in refusal(made, tmp_path)


# What is not supported


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.IQ4_XS, Kind.MXFP4], ids=lambda kind: kind.name)
def test_other_types_are_refused_by_name(kind, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.tensors[DOWN] = Packed(random_blocks((128, 256), kind, 0), kind)
    message = refusal(made, tmp_path, UnsupportedModel)
    assert kind.name in message
    assert DOWN in message


@pytest.mark.parametrize("arch", ["mamba", "qwen3moe", "gemma2"])
def test_other_architectures_are_refused_by_name(arch, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.arch = arch
    made.tensors[DOWN] = Packed(random_blocks((128, 256), Kind.Q2_K, 0), Kind.Q2_K)
    message = refusal(made, tmp_path, UnsupportedModel)
    assert f"'{arch}'" in message
    assert "Q2_K" not in message  # another type would not help


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "mm.0.weight", "rope_factors.weight"]
)
def test_a_tensor_without_a_place_is_refused_by_name(name, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.tensors[name] = np.ones((4, 4), np.float32)
    assert f"'{name}'" in refusal(made, tmp_path, UnsupportedModel)


def test_a_bias_that_the_module_tree_lacks_is_refused(tmp_path):
    made = recipe("qwen2", **ONE_BLOCK)
    made.tensors["blk.0.attn_output.bias"] = np.ones(128, np.float32)
    assert "'blk.0.attn_output.bias'" in refusal(made, tmp_path, UnsupportedModel)


def test_a_part_of_a_split_model_is_refused(tmp_path):
    made = recipe(**ONE_BLOCK)
    made.set("split.count", 3, GGUFValueType.UINT16)
    assert "llama-gguf-split --merge" in refusal(made, tmp_path, UnsupportedModel)


@pytest.mark.parametrize("what", ["adapter", "mmproj"])
def test_a_file_that_holds_no_model_is_refused(what, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.set("general.type", what)
    assert f"'{what}'" in refusal(made, tmp_path, UnsupportedModel)


# What is missing or wrong


@pytest.mark.parametrize(
    ("name", "hf_name"),
    [
        ("output_norm.weight", "model.norm.weight"),
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_a_missing_tensor_is_refused(name, hf_name, tmp_path):
    made = recipe("qwen3")
    del made.tensors[name]
    message = refusal(made, tmp_path)
    assert "lacks 1 tensors" in message
    assert f"'{hf_name}'" in message


def test_a_missing_embedding_is_refused(tmp_path):
    made = recipe(**ONE_BLOCK)
    del made.tensors["token_embd.weight"]
    assert "'token_embd.weight'" in refusal(made, tmp_path)


def test_a_missing_block_is_refused(tmp_path):
    made = recipe()
    for name in [name for name in made.tensors if name.startswith("blk.1.")]:
        del made.tensors[name]
    assert "1 blocks, its metadata ask for 2" in refusal(made, tmp_path)


def test_an_untied_model_without_its_head_counts_as_tied(tmp_path):
    # llama.cpp does the same: a file says it in no other way.
    made = recipe(tie_word_embeddings=False)
    del made.tensors["output.weight"]
    out = imported(made, tmp_path)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (DOWN, (256, 128)),
        (DOWN, (128, 256, 1)),
        ("output_norm.weight", (64,)),
        ("output_norm.weight", (1, 128)),
        ("blk.0.attn_k.weight", (256, 128)),
        ("output.weight", (300, 128)),
    ],
)
def test_a_wrong_shape_is_refused(name, shape, tmp_path):
    made = recipe(**ONE_BLOCK, tie_word_embeddings=False)
    made.tensors[name] = np.ones(shape, np.float32)
    message = refusal(made, tmp_path)
    assert f"'{name}'" in message
    assert str(list(shape)) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 2**31),
        ("llama.embedding_length", 2**31),
        ("llama.feed_forward_length", 2**32 - 1),
        ("llama.attention.head_count", 2**30),
        ("llama.attention.head_count_kv", 2**30),
    ],
)
def test_sizes_that_no_tensor_has_are_refused_before_anything_is_built(key, value, tmp_path):
    made = recipe(**ONE_BLOCK)
    made.set(key, value, GGUFValueType.UINT32)
    assert "its metadata" in refusal(made, tmp_path)


# Files that are damaged, or no GGUF


class Sound:
    """Bytes of a sound file; the last tensor ends with them. Not in the reports of hypothesis."""

    def __init__(self, path: Path) -> None:
        last = GGUFReader(path).tensors[-1]
        self.data = path.read_bytes()[: last.data_offset + last.n_bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    return Sound(recipe(**ONE_BLOCK).write(tmp_path_factory.mktemp("sound") / "model.gguf"))


def place_of(data: bytes, mark: str) -> int:
    """A byte somewhere in the file."""
    return data.index(mark.encode()) + len(mark)


@pytest.mark.parametrize(
    "where",
    [
        "magic",
        "version",
        "counts",
        "general.name",
        "llama.block_count",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "blk.0.attn_norm.weight",
        "output_norm.weight",
        "first tensor",
        "last byte",
    ],
)
def test_a_file_cut_short_is_refused(where, sound, tmp_path):
    begin = len(sound.data) - 900_000
    ends = {
        "magic": 4,
        "version": 7,
        "counts": 15,
        "first tensor": begin,
        "last byte": len(sound.data) - 1,
    }
    # 30 bytes behind a name lie inside the value, the array or the tensor that it names
    end = ends[where] if where in ends else place_of(sound.data, where) + 30
    path = tmp_path / "model.gguf"
    path.write_bytes(sound.data[:end])
    message = refusal(path, tmp_path)
    assert "is cut short" in message
    assert end < 8 or "bytes are missing at its end" in message


METADATA_BYTES = 6500


@settings(max_examples=40)
@given(end=st.integers(0, METADATA_BYTES) | st.integers(0, 900_000))
def test_wherever_a_file_is_cut_it_is_refused(sound, end):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(sound.data[:end])
        refusal(path, Path(folder))


@settings(max_examples=60)
@given(at=st.integers(0, METADATA_BYTES), value=st.integers(0, 255))
def test_damaged_metadata_give_a_directory_or_one_sentence(sound, at, value):
    damaged = bytearray(sound.data)
    damaged[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(damaged)
        out = Path(folder) / "out"
        message = None
        try:
            import_gguf(path, out)
        except UsageError as error:
            message = str(error)
        left = {file.name for file in Path(folder).iterdir()}
        if message is None:
            assert left == {"model.gguf", "out"}
            assert (out / "model.safetensors").stat().st_size > 400_000
        else:
            assert left == {"model.gguf"}
            assert message.isprintable()


@pytest.mark.parametrize("key", ["tokenizer.ggml.token_type", "tokenizer.ggml.merges"])
@pytest.mark.parametrize("length", [2**20, 2**40, 2**64 - 1])
def test_a_damaged_length_of_an_array_is_refused_at_once(key, length, sound, tmp_path):
    at = place_of(sound.data, key) + 8  # behind the types of value and elements
    path = tmp_path / "model.gguf"
    path.write_bytes(sound.data[:at] + length.to_bytes(8, "little") + sound.data[at + 8 :])
    assert "damaged" in refusal(path, tmp_path)


def test_an_array_of_arrays_is_refused(sound, tmp_path):
    at = place_of(sound.data, "tokenizer.ggml.merges") + 4
    path = tmp_path / "model.gguf"
    path.write_bytes(sound.data[:at] + (9).to_bytes(4, "little") + sound.data[at + 4 :])
    assert "an array of arrays" in refusal(path, tmp_path)


@pytest.mark.parametrize("mark", ["llama.block", "blk.0.attn", "general.arch"])
@pytest.mark.parametrize("character", ["\n", "\x1b"])
def test_names_with_control_characters_do_not_reach_the_terminal(mark, character, sound, tmp_path):
    at = place_of(sound.data, mark)
    path = tmp_path / "model.gguf"
    path.write_bytes(sound.data[:at] + character.encode() + sound.data[at + 1 :])
    message = refusal(path, tmp_path)
    assert "damaged" in message
    assert message.isprintable()


def test_values_with_control_characters_do_not_reach_the_terminal(tmp_path):
    made = recipe(**ONE_BLOCK)
    made.set("llama.rope.scaling.type", "\x1b[31m\nred" + "d" * 1000)
    message = refusal(made, tmp_path, UnsupportedModel)
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    ("version", "words"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_other_versions_and_byte_orders_are_refused(version, words, sound, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(sound.data[:4] + version.to_bytes(4, "little") + sound.data[8:])
    assert words in refusal(path, tmp_path, UnsupportedModel)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04 and more")
    (tmp_path / "folder.gguf").mkdir()
    assert "no GGUF file" in refusal(tmp_path / "empty.gguf", tmp_path)
    assert "b'PK" in refusal(tmp_path / "zip.gguf", tmp_path)
    assert "cannot be read" in refusal(tmp_path / "folder.gguf", tmp_path)
    assert "cannot be read" in refusal(tmp_path / "missing.gguf", tmp_path)


# The output


def test_an_output_that_exists_is_left_alone(tmp_path):
    path = recipe(**ONE_BLOCK).write(tmp_path / "model.gguf")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        import_gguf(path, out)
    assert [file.name for file in out.iterdir()] == ["mine"]


def test_a_directory_made_meanwhile_stays(tmp_path):
    path = recipe(**ONE_BLOCK).write(tmp_path / "model.gguf")
    out = tmp_path / "out"

    def other_process(event: Event) -> None:
        if isinstance(event, StageDone):
            out.mkdir()
            (out / "config.json").write_text("{}")

    import_gguf(path, out, emit=other_process)
    assert (out / "config.json").read_text() == "{}"
    assert {file.name for file in tmp_path.iterdir()} == {"model.gguf", "out"}


def test_an_interrupted_import_leaves_nothing(tmp_path):
    path = recipe(**ONE_BLOCK).write(tmp_path / "model.gguf")

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, tmp_path / "out", emit=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_place_that_cannot_be_written_is_no_fault_of_the_file(tmp_path):
    path = recipe(**ONE_BLOCK).write(tmp_path / "model.gguf")
    with pytest.raises(EngineFailure, match="cannot be written"):
        import_gguf(path, path / "out")


# The real file

SMOLLM2 = Path(__file__).parents[3] / "models" / "smollm2-135m-instruct.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The directory made of SmolLM2-135M-Instruct."""
    if not SMOLLM2.is_file():
        pytest.skip(f"needs {SMOLLM2}; ../shared/tools/get-models models --only smollm2 fetches it")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(SMOLLM2, out)
    return out


@pytest.fixture(scope="module")
def calibration(shared) -> list[dict[str, Any]]:
    """All rows of calibration text."""
    files = sorted((shared / "assets" / "calib").glob("*/samples.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == 1204
    return rows


@pytest.mark.assets
@pytest.mark.usefixtures("smollm2")
def test_smollm2_is_the_file_that_the_others_mean():
    with SMOLLM2.open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == SMOLLM2_SHA256


@pytest.mark.assets
def test_smollm2_tokenizes_all_calibration_text_as_its_own_tokenizer(smollm2, shared, calibration):
    texts = [row["text"] for row in calibration if "text" in row]
    messages = [message for row in calibration for message in row.get("messages", [])]
    texts += [message["content"] for message in messages if message["content"]]
    assert len(texts) > 2000
    own = Tokenizer.from_file(str(shared / "assets" / "tokenizers" / "smollm2" / "tokenizer.json"))
    rebuilt = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert rebuilt.get_vocab() == own.get_vocab()
    for text, expected in zip(texts, own.encode_batch(texts), strict=True):
        ids = rebuilt.encode(text).ids
        assert ids == expected.ids
        assert rebuilt.decode(ids, skip_special_tokens=False) == text


@pytest.mark.assets
def test_smollm2_renders_conversations_as_its_own_template(smollm2, shared, calibration):
    own = load_tokenizer(shared / "assets" / "tokenizers" / "smollm2", {})
    rebuilt = load_tokenizer(smollm2, {"eos_token_id": 2})
    assert rebuilt.eos_token_ids == {2}
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(rebuilt, f"{role}_token_id") == getattr(own, f"{role}_token_id")
    chats = [row["messages"] for row in calibration if "messages" in row]
    chats = [chat for chat in chats if all(message["content"] for message in chat)]
    assert len(chats) > 900
    for chat in chats:
        expected = own.apply_chat_template(chat, tokenize=False)
        assert rebuilt.apply_chat_template(chat, tokenize=False) == expected
        assert rebuilt.encode(expected) == own.encode(expected)


@pytest.mark.assets
def test_smollm2_has_the_weights_and_the_config_of_its_directory(smollm2):
    directory = SMOLLM2.with_name("smollm2-135m-hf")
    if not directory.is_dir():
        pytest.skip(f"needs {directory}; ../shared/tools/get-models models --only smollm2 makes it")
    config = json.loads((smollm2 / "config.json").read_text())
    expected = json.loads((directory / "config.json").read_text())
    expected |= {"torch_dtype": "float16", "rms_norm_eps": 1e-5}  # there, a float32 written out
    assert {key: config[key] for key in expected} == expected

    given, wanted = open_source(str(smollm2)).weights(), open_source(str(directory)).weights()
    assert set(given) == set(wanted)
    for name, value in wanted.items():
        ours, theirs = as_numpy(given[name]), as_numpy(value)
        # half a last digit of bfloat16 and of float16, and of float16's smallest numbers
        bound = np.abs(theirs) * (2**-8 + 2**-11) + 2**-25
        assert np.all(np.abs(ours - theirs) <= bound), name
        assert ours.any()
