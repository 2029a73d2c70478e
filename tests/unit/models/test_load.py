"""Opening sources: what is accepted, and one clear sentence for what is not."""

import dataclasses
import json
import os
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model

from optiq.backend import mx, nn, tree_flatten
from optiq.configs import RunConfig
from optiq.errors import EngineFailure, UnsupportedModel, UsageError
from optiq.events import Notice, StageStarted
from optiq.models import load
from optiq.models.load import (
    open_quantized,
    open_source,
    read_config,
    size_on_disk,
    stored_bpw,
)
from optiq.models.safetensors_io import INDEX_NAME, ShardWriter, TensorSpec, read_headers
from optiq.upstream import SwitchLinear
from tests.tiny import (
    SPECIALS,
    VOCAB,
    tiny_checkpoint,
    tiny_config,
    tiny_weights,
    write_tokenizer,
)
from tests.unit.models.ggufs import recipe

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint to spoil."""
    return tiny_checkpoint(tmp_path)


def edit_json(file, **changes):
    """Set fields of a JSON file; None takes one away."""
    data = json.loads(file.read_text()) if file.exists() else {}
    data = {key: value for key, value in (data | changes).items() if value is not None}
    file.write_text(json.dumps(data))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(file), weights)


def contents(folder):
    """Every file under a folder, with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(ref, words, kind=UsageError, run=None):
    """Opening fails with one sentence, and nothing is written beside the source."""
    around = Path(ref).parent
    before = contents(around)
    with pytest.raises(UsageError, match=words) as caught:
        open_source(str(ref), run)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert before == contents(around)


# -- what is refused -------------------------------------------------------------------------------


def test_a_path_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "gone", "is no directory, GGUF file or hub id; check the path")
    refused("gone", "is no directory, GGUF file or hub id")


def test_a_file_that_is_no_gguf(folder):
    refused(folder / "model.safetensors", "is a file but no GGUF")


def test_a_directory_without_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json; give a Hugging Face model directory")


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", '{"a": }', "[" * 100_000])
def test_a_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, "config.json .*cannot be read")


@pytest.mark.parametrize("text", ["[]", "3", '"llama"', "null"])
def test_a_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json is not a JSON object")


@pytest.mark.parametrize("text", ["[1]", '"x"', "3"])
def test_a_generation_config_that_is_no_object(folder, text):
    (folder / "generation_config.json").write_text(text)
    refused(folder, "generation_config.json of .* cannot be read")


def test_a_generation_config_that_is_not_json_does_not_matter(folder):
    (folder / "generation_config.json").write_text("{")
    assert open_source(str(folder)).config["eos_token_id"] == 258


def test_end_ids_come_from_the_generation_config(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[256, 258])
    assert read_config(folder)["eos_token_id"] == [256, 258]


def test_an_unknown_model_type(folder):
    edit_json(folder / "config.json", model_type="lama")
    refused(folder, "model_type 'lama' is not supported by the installed mlx-lm", UnsupportedModel)


@pytest.mark.parametrize("value", [None, 3])
def test_a_config_without_model_type(folder, value):
    edit_json(folder / "config.json", model_type=value)
    refused(folder, "config.json has no model_type", UnsupportedModel)


def test_a_config_that_lacks_what_the_model_needs(folder):
    edit_json(folder / "config.json", hidden_size=None)
    refused(folder, "config.json of model_type 'llama' is not complete", UnsupportedModel)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hidden_size", 0, "division by zero"),
        ("num_attention_heads", 0, "float division by zero"),
        ("intermediate_size", 2**31, "Integer value 2147483648 is outside"),
        ("intermediate_size", 2**64, "uniform..: incompatible function arguments"),
        ("hidden_size", 0.5, "normal..: incompatible function arguments"),
        ("vocab_size", -1, "AssertionError"),
    ],
)
def test_a_config_with_absurd_numbers(folder, field, value, reason):
    edit_json(folder / "config.json", **{field: value})
    words = rf"is not complete or has values that no model can have .{reason}[^.]*.; get it again"
    refused(folder, words, UnsupportedModel)


@pytest.mark.parametrize("value", [10_001, 10**9, 10**400])
@pytest.mark.parametrize("place", ["top", "text"])
def test_more_blocks_than_fit_into_memory(folder, value, place):
    found = {"num_hidden_layers": value}
    edit_json(folder / "config.json", **(found if place == "top" else {"text_config": found}))
    refused(folder, "more than 10,000 blocks .num_hidden_layers., which no", UnsupportedModel)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no model\*.safetensors")


def test_a_missing_tensor(folder):
    edit_weights(folder, lambda weights: weights.pop(DOWN))
    refused(folder, f"lacks 1 tensors, first '{DOWN}'")


def test_an_extra_tensor(folder):
    edit_weights(folder, lambda weights: weights.update({"model.extra.weight": mx.zeros((2, 2))}))
    refused(folder, "has 1 tensors this model_type has no place for, first 'model.extra.weight'")


@pytest.mark.parametrize("shape", [(128, 255), (255, 128), (256, 128), (1, 128, 256)])
def test_a_tensor_of_the_wrong_shape(folder, shape):
    edit_weights(folder, lambda weights: weights.update({DOWN: mx.zeros(shape, mx.bfloat16)}))
    refused(folder, rf"'{DOWN}' of .* has shape .*, the config asks for \[128, 256\]")


def test_more_layers_in_the_config_than_in_the_files(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    refused(folder, "lacks 9 tensors, first 'model.layers.2.input_layernorm.weight'")


def test_fewer_layers_in_the_config_than_in_the_files(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    refused(folder, "has 9 tensors this model_type has no place for, first 'model.layers.1")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "cut short")


def test_a_corrupt_header(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"\0\0\0\0"
    file.write_bytes(data)
    refused(folder, "no sound safetensors file")


@pytest.mark.parametrize("dtype", ["I32", "F64", "F8_E4M3", "F8_E5M2"])
def test_matrices_of_another_dtype(folder, dtype):
    weights = tiny_weights(tiny_config())
    specs = [TensorSpec(name, "BF16", tuple(value.shape)) for name, value in weights.items()]
    specs = [s._replace(dtype=dtype) if s.name == DOWN else s for s in specs]
    with ShardWriter(folder, specs) as writer:
        for spec in specs:
            writer.write(spec.name, [bytes(spec.size_bytes)])
    refused(folder, "give a source in bfloat16, float16 or float32|cannot be read")


@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
@pytest.mark.parametrize("place", ["top", "text"])
def test_a_source_that_is_quantized_already(folder, field, place):
    found = {field: {"group_size": 64, "bits": 4}}
    edit_json(folder / "config.json", **(found if place == "top" else {"text_config": found}))
    refused(folder, "is quantized already .config.json says so.; give the unquantized checkpoint")


def test_a_source_that_another_file_says_is_quantized(folder):
    (folder / "hf_quant_config.json").write_text("{}")
    refused(folder, "is quantized already .hf_quant_config.json says so")


def test_quantized_weights_without_a_word_in_the_config(folder):
    def quantize(weights):
        path = DOWN.removesuffix(".weight")
        parts = mx.quantize(weights[DOWN])
        weights |= dict(zip((DOWN, f"{path}.scales", f"{path}.biases"), parts, strict=True))

    edit_weights(folder, quantize)
    refused(folder, "has 2 tensors this model_type has no place for")


def test_a_shard_that_is_missing(folder):
    weight_map = dict.fromkeys(tiny_weights(tiny_config()), "model-00002-of-00002.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "lacks the shard model-00002-of-00002.safetensors")


# -- remote code -----------------------------------------------------------------------------------


@pytest.fixture
def trap(folder, monkeypatch):
    """Code that the checkpoint brings, a mark it leaves, and a user who says yes to everything."""
    mark = folder.parent / "ran"
    (folder / "trap.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Trap(PreTrainedTokenizerFast): pass\n"
        "Model = ModelArgs = Trap\n"
    )
    monkeypatch.setattr("builtins.input", lambda _="": "y")
    return mark


def test_a_config_that_asks_for_its_own_model_code(folder, trap):
    edit_json(folder / "config.json", model_file="trap.py")
    refused(folder, "asks to run its own code .'trap.py'.; optiq never runs", UnsupportedModel)
    assert not trap.exists()


def test_a_model_type_is_no_path_to_code(folder, trap):
    edit_json(folder / "config.json", model_type="trap")
    refused(folder, "model_type 'trap' is not supported", UnsupportedModel)
    assert not trap.exists()


def test_auto_classes_with_code_are_passed_over(folder, trap):
    """Where transformers knows the class, as for most models that bring code."""
    classes = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}
    edit_json(folder / "config.json", auto_map=classes)
    code = {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}
    edit_json(folder / "tokenizer_config.json", auto_map=code)
    source = open_source(str(folder))
    assert source.tokenizer.encode("a", add_special_tokens=False) == [64]
    assert not trap.exists()


@pytest.mark.parametrize("name", ["Trap", None])
def test_a_tokenizer_that_needs_code_is_refused(folder, trap, name):
    code = {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}
    edit_json(folder / "tokenizer_config.json", auto_map=code, tokenizer_class=name)
    source = open_source(str(folder))
    with pytest.raises(UsageError, match="tokenizer in .* cannot be loaded"):
        source.tokenizer  # noqa: B018
    assert not trap.exists()


# -- imported GGUF files ---------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A GGUF file, and a cache of its own."""
    monkeypatch.setenv("OPTIQ_CACHE", str(tmp_path / "cache"))
    return recipe(num_hidden_layers=1).write(tmp_path / "model.gguf")


@pytest.fixture
def bare_tokenizer(tmp_path):
    """A directory with tokenizer.json alone, which has no merges, unlike the file."""
    other = tmp_path / "tokenizer"
    other.mkdir()
    write_tokenizer(other)
    (other / "tokenizer_config.json").unlink()
    return other


def imports(ref, run=None):
    """The source, and whether it was imported rather than found in the cache."""
    events = []
    source = open_source(str(ref), run, emit=events.append)
    return source, any(isinstance(event, StageStarted) for event in events)


def test_the_tokenizer_of_a_gguf_is_the_imported_one(gguf, bare_tokenizer):
    """The import adds the end tokens and the chat template that the directory lacks."""
    source, _ = imports(gguf, RunConfig(tokenizer=bare_tokenizer))
    assert source.tokenizer_path == source.path
    tokenizer = source.tokenizer
    assert len(tokenizer.encode("the", add_special_tokens=False)) == 3  # no merges
    assert tokenizer.eos_token == SPECIALS[2]
    assert tokenizer.has_chat_template
    assert sorted(file.name for file in bare_tokenizer.iterdir()) == ["tokenizer.json"]


def test_a_gguf_is_imported_once_for_each_tokenizer(gguf, bare_tokenizer):
    run = RunConfig(tokenizer=bare_tokenizer)
    plain, is_new = imports(gguf)
    assert is_new
    assert len(plain.tokenizer.encode("the", add_special_tokens=False)) == 1
    other, is_new = imports(gguf, run)
    assert is_new
    assert other.path != plain.path
    assert imports(gguf)[1] is False
    again, is_new = imports(gguf, run)
    assert (again.path, is_new) == (other.path, False)


def test_a_changed_tokenizer_directory_is_imported_anew(gguf, bare_tokenizer):
    run = RunConfig(tokenizer=bare_tokenizer)
    paths = [imports(gguf, run)[0].path]
    (bare_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    paths.append(imports(gguf, run)[0].path)
    assert (paths[-1] / "chat_template.jinja").read_text() == "{{ messages }}"
    (bare_tokenizer / "chat_template.jinja").write_text("{{ messages[0] }}")
    paths.append(imports(gguf, run)[0].path)
    file = bare_tokenizer / "tokenizer.json"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    paths.append(imports(gguf, run)[0].path)
    (bare_tokenizer / "chat_template.jinja").rename(bare_tokenizer / "chat_template.json")
    paths.append(imports(gguf, run)[0].path)
    assert len(set(paths)) == len(paths)
    assert imports(gguf, run)[1] is False


def test_another_version_of_the_import_is_another_directory(gguf, monkeypatch):
    first, _ = imports(gguf)
    monkeypatch.setattr(load, "IMPORT_VERSION", load.IMPORT_VERSION + 1)
    second, is_new = imports(gguf)
    assert is_new
    assert second.path != first.path


IMPORTED = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "gguf-import.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("name", IMPORTED)
@pytest.mark.parametrize("damage", ["lost", "cut short"])
def test_an_import_that_is_not_whole_is_made_again(gguf, name, damage):
    first, _ = imports(gguf)
    before = contents(first.path)
    file = first.path / name
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    events = []
    second = open_source(str(gguf), emit=events.append)
    assert second.info == first.info
    assert contents(second.path) == before
    told = [event for event in events if isinstance(event, Notice) and name in event.text]
    assert [event.level for event in told] == ["warning"]
    assert "is not whole" in told[0].text
    assert [entry.name for entry in first.path.parent.iterdir()] == [first.path.name]
    assert imports(gguf)[1] is False


def test_an_import_that_cannot_be_made_again_is_refused(gguf, monkeypatch):
    source, _ = imports(gguf)
    (source.path / "tokenizer.json").unlink()

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", deny)
    with pytest.raises(EngineFailure, match="gguf cannot be written: Permission denied"):
        imports(gguf)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_tokenizer_directory_that_is_none(gguf, tmp_path, kind):
    other = tmp_path / "other"
    if kind == "file":
        other.write_text("{}")
    if kind == "empty":
        other.mkdir()
    words = f"{other} .*give --tokenizer a directory with"
    refused(gguf, words, run=RunConfig(tokenizer=other))


# -- what is accepted ------------------------------------------------------------------------------


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]).item() for n in a
    )


def test_what_is_known_of_a_source(folder):
    source = open_source(str(folder))
    headers = read_headers(folder)
    assert source.path == folder
    assert source.info.name == str(folder)
    assert source.info.model_type == "llama"
    assert source.info.revision is None
    assert source.info.dtype == "bfloat16"
    assert source.dtype == mx.bfloat16
    assert source.info.size_bytes == sum(h.size_bytes for h in headers.values())
    assert source.info.fixed_bytes == 5 * 128 * 2  # norms
    quantizable = sum(info.num_params for info in source.modules) * 2
    assert source.info.fixed_bytes + quantizable == source.info.size_bytes
    assert same(source.weights(), tiny_weights(tiny_config()))
    assert same(dict(tree_flatten(source.model().parameters())), source.weights())


def test_opening_reads_no_weights(folder):
    """Weights may be rubbish until they are used: only headers are read."""
    mx.clear_cache()
    before = mx.get_active_memory()
    source = open_source(str(folder))
    kept = source.weights(), source.model()
    assert mx.get_active_memory() - before < 100_000 < source.info.size_bytes
    assert len(kept[0]) == len(source.parameters)


def split(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Make two shards with an index of a single file."""
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    weight_map = {name: names[n % 2] for n, name in enumerate(sorted(weights))}
    for shard in names:
        part = {name: weights[name] for name, at in weight_map.items() if at == shard}
        mx.save_safetensors(str(folder / shard), part)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
def test_shards_hold_the_same_as_a_single_file(folder, index):
    single = open_source(str(folder))
    expected = single.weights()
    mx.eval(expected)
    split(folder)
    if not index:
        (folder / INDEX_NAME).unlink()
    source = open_source(str(folder))
    assert same(source.weights(), expected)
    assert len(source.shards) == 2
    assert source.info.size_bytes == single.info.size_bytes
    assert source.info.fingerprint != single.info.fingerprint


def test_the_index_names_the_shards_and_other_files_are_not_read(folder):
    expected = open_source(str(folder)).weights()
    mx.eval(expected)
    split(folder, ("part-a.safetensors", "part-b.safetensors"))
    stale = {DOWN: mx.zeros((128, 256), mx.bfloat16), "model.extra.weight": mx.zeros((2, 2))}
    mx.save_safetensors(str(folder / "model-old.safetensors"), stale)
    assert same(open_source(str(folder)).weights(), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_dtypes(folder, dtype):
    kind = getattr(mx, dtype)

    def cast(weights):
        weights |= {name: value.astype(kind) for name, value in weights.items()}

    edit_weights(folder, cast)
    source = open_source(str(folder))
    assert source.info.dtype == dtype
    assert source.dtype == kind
    assert {value.dtype for value in source.weights().values()} == {kind}
    assert source.info.fixed_bytes == 5 * 128 * source.info.itemsize


def test_of_mixed_dtypes_most_bytes_win_and_matrices_are_cast(folder):
    """So that every matrix is stored as the plan counts it; vectors stay as they are."""

    def cast(weights):
        for name in (DOWN, NORM):
            weights[name] = weights[name].astype(mx.float32)

    edit_weights(folder, cast)
    source = open_source(str(folder))
    assert source.info.dtype == "bfloat16"
    weights = source.weights()
    assert weights[DOWN].dtype == mx.bfloat16
    assert weights[NORM].dtype == mx.float32
    assert source.info.fixed_bytes == 4 * 128 * 2 + 128 * 4
    assert mx.array_equal(weights[DOWN], tiny_weights(tiny_config())[DOWN]).item()


def unstacked(folder):
    """Experts one by one, as Hugging Face has them."""

    def rename(weights):
        for name in [name for name in weights if ".switch_mlp." in name]:
            stack = weights.pop(name)
            for expert in range(stack.shape[0]):
                one = name.replace(".switch_mlp.", f".experts.{expert}.")
                weights[one] = stack[expert]

    edit_weights(folder, rename)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_experts_of_single_files_are_stacked(tmp_path, family):
    folder = tiny_checkpoint(tmp_path, family)
    expected = open_source(str(folder)).weights()
    mx.eval(expected)
    unstacked(folder)
    source = open_source(str(folder))
    assert same(source.weights(), expected)
    assert same(source.weights(), expected)


def test_a_missing_expert(tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen3_moe")
    unstacked(folder)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_weights(folder, lambda weights: weights.pop(name))
    refused(folder, f"is missing or has the wrong shape: .*{name}", UnsupportedModel)


def test_an_expert_of_the_wrong_shape(tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen3_moe")
    unstacked(folder)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: mx.zeros((3, 3))}))
    refused(folder, "is missing or has the wrong shape", UnsupportedModel)


def test_a_head_that_the_tree_makes_and_the_checkpoint_has_not(tmp_path):
    """gemma3_text drops its head while it sanitizes: on each tree once."""
    source = open_source(str(tiny_checkpoint(tmp_path, "gemma3_text")))
    for _ in range(2):
        assert "lm_head.weight" not in source.weights()
        assert "lm_head" not in source.model()


def test_vision_tensors_of_a_larger_model_are_left_out(tmp_path):
    folder = tiny_checkpoint(tmp_path, "mistral3")
    before = open_source(str(folder))
    edit_weights(folder, lambda w: w.update({"vision_tower.patch.weight": mx.zeros((4, 4))}))
    source = open_source(str(folder))
    assert source.parameters == before.parameters
    assert source.info.size_bytes > before.info.size_bytes
    assert source.info.fixed_bytes == before.info.fixed_bytes


# -- quantized directories -------------------------------------------------------------------------


def quantize(source, out, settings, default=(4, 64)):
    """Save a quantized directory as mlx-lm does; settings: path ending -> (bits, group) or no."""
    config = {"group_size": default[1], "bits": default[0], "mode": "affine"}
    model = source.model()

    def predicate(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        for ending, chosen in settings.items():
            if path.endswith(ending):
                config[path] = chosen and {"bits": chosen[0], "group_size": chosen[1]}
                return config[path]
        return True

    nn.quantize(model, default[1], default[0], class_predicate=predicate)
    out.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    (out / "config.json").write_text(json.dumps(source.config | {"quantization": config}))
    return out


def dequantized(module):
    """Dense float32 weights of a module of mlx-lm's."""
    return mx.dequantize(
        module.weight,
        module.scales.astype(mx.float32),
        module.biases.astype(mx.float32),
        group_size=module.group_size,
        bits=module.bits,
    )


MIXED = {
    "q_proj": (8, 32),
    "k_proj": (3, 64),
    "v_proj": (2, 128),
    "down_proj": (6, 32),
    "up_proj": (5, 128),
    "o_proj": False,
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", MIXED),
        ("qwen3_moe", MIXED | {".gate": (8, 64)}),
        ("gemma3_text", MIXED),
        ("gemma4_text", MIXED | {"embed_tokens_per_layer": (3, 32)}),
        ("mistral3", MIXED),
    ],
)
def test_a_quantized_directory_gives_dequantized_weights(tmp_path, family, settings):
    source = open_source(str(tiny_checkpoint(tmp_path, family)))
    out = quantize(source, tmp_path / "out", settings)
    opened = open_quantized(out)
    assert opened.parameters == source.parameters
    assert opened.modules == source.modules
    assert opened.info.dtype == "float32"
    assert opened.info.fixed_bytes == source.info.fixed_bytes

    stock, _ = load_model(out, lazy=True)
    modules = dict(stock.named_modules())
    weights, dense = opened.weights(), source.weights()
    num_quantized = 0
    for info in source.modules:
        module, found = modules[info.path], weights[f"{info.path}.weight"]
        assert found.dtype == mx.float32
        if hasattr(module, "bits"):
            num_quantized += 1
            assert mx.array_equal(found, dequantized(module)).item(), info.path
        else:
            assert isinstance(module, nn.Linear | nn.Embedding | SwitchLinear)
            expected = dense[f"{info.path}.weight"].astype(mx.float32)
            assert mx.array_equal(found, expected).item(), info.path
    kept = sum(info.path.endswith("o_proj") for info in source.modules) if settings else 0
    assert num_quantized == len(source.modules) - kept
    for name in set(opened.parameters) - {f"{info.path}.weight" for info in source.modules}:
        assert mx.array_equal(weights[name], dense[name]).item(), name


def test_what_stock_mlx_lm_converts_is_opened(folder, tmp_path):
    out = tmp_path / "converted"
    mlx_lm.convert(str(folder), str(out), quantize=True, q_bits=4, q_group_size=64)
    opened = open_quantized(out)
    stock, _ = load_model(out, lazy=True)
    stock.set_dtype(mx.float32)
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCAB, (2, 9)))
    assert mx.allclose(opened.model()(tokens), stock(tokens), atol=1e-3).item()
    assert stored_bpw(out, opened.modules) == pytest.approx(4.5)
    assert size_on_disk(out) == (out / "model.safetensors").stat().st_size
    assert opened.tokenizer.encode("a", add_special_tokens=False) == [64]


def test_an_unquantized_directory_is_opened_as_it_is(folder):
    opened = open_quantized(folder)
    expected = {n: v.astype(mx.float32) for n, v in open_source(str(folder)).weights().items()}
    found = {n: v.astype(mx.float32) for n, v in opened.weights().items()}
    assert same(found, expected)
    assert stored_bpw(folder, opened.modules) == 16.0


@pytest.fixture
def quantized_copy(folder, tmp_path):
    return quantize(open_source(str(folder)), tmp_path / "quantized", {"o_proj": False})


def refuse_quantized(folder, words):
    with pytest.raises(UsageError, match=words) as caught:
        open_quantized(folder)
    assert "\n" not in str(caught.value)


def test_a_source_that_quantized_directories_are_not(quantized_copy):
    refused(quantized_copy, "is quantized already")


def test_a_quantized_directory_that_does_not_exist(tmp_path):
    refuse_quantized(tmp_path / "gone", "has no config.json")


def test_a_file_where_a_quantized_directory_should_be(quantized_copy):
    refuse_quantized(quantized_copy / "config.json", "config.json has no config.json; give a")


@pytest.mark.parametrize("place", ["default", "matrix"])
def test_another_mode_than_affine(quantized_copy, place):
    config = json.loads((quantized_copy / "config.json").read_text())["quantization"]
    path = DOWN.removesuffix(".weight")
    config |= {"mode": "mxfp4"} if place == "default" else {path: {"mode": "nvfp4"}}
    edit_json(quantized_copy / "config.json", quantization=config)
    refuse_quantized(quantized_copy, "is stored in mode '(mxfp4|nvfp4)'; optiq judges affine")


@pytest.mark.parametrize(
    ("leaf", "shape", "words"),
    [
        ("biases", None, f"'{DOWN[:-7]}.biases' is missing"),
        ("scales", None, "has 1 tensors this model_type has no place for"),
        ("scales", (128, 3), "do not fit together"),
        ("scales", (128, 2), "do not fit together"),
        ("biases", (128, 2), "do not fit together"),
        ("weight", (128, 30), "do not fit together"),
        ("weight", (120, 32), "do not fit together|has shape"),
    ],
)
def test_quantized_tensors_that_do_not_fit(quantized_copy, leaf, shape, words):
    name = f"{DOWN[:-7]}.{leaf}"

    def spoil(weights):
        old = weights.pop(name)
        if shape is not None:
            weights[name] = mx.zeros(shape, old.dtype)

    edit_weights(quantized_copy, spoil)
    refuse_quantized(quantized_copy, words)


def test_scales_of_a_matrix_that_the_model_has_not(quantized_copy):
    extra = {f"model.extra.{leaf}": mx.zeros((2, 2)) for leaf in ("weight", "scales", "biases")}
    edit_weights(quantized_copy, lambda weights: weights.update(extra))
    refuse_quantized(quantized_copy, "has 3 tensors this model_type has no place for")


def test_sources_can_be_copied_with_changes(tiny_source):
    other = dataclasses.replace(tiny_source, tokenizer_path=Path("/elsewhere"))
    assert same(other.weights(), tiny_source.weights())
