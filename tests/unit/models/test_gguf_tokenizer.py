"""Tokenizers rebuilt from the vocabulary of a GGUF file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Event, Notice
from optiq.models.gguf import import_gguf
from optiq.models.gguf_file import GGUFFile, open_gguf
from optiq.models.gguf_tokenizer import generation_ids, write_tokenizer
from optiq.models.load import load_tokenizer, open_source
from optiq.upstream import TokenizerWrapper
from tests.tiny import SPECIALS, TEMPLATE, VOCAB
from tests.tiny import write_tokenizer as write_other_tokenizer
from tests.unit.models.ggufs import (
    ALPHABET,
    MERGES,
    SPM_MERGES,
    TOOL_ID,
    TOOL_TOKEN,
    Recipe,
    add_byte_level,
    add_sentencepiece,
    recipe,
)

ONE_BLOCK = {"num_hidden_layers": 1}
HINT = "--tokenizer DIR"
PAIRS = [tuple(merge.split()) for merge in MERGES]
# Added tokens, which others do not know, begin with "<".
TEXTS = (st.text() | st.text("the1234 \n\té'TS’.,", max_size=40)).filter(lambda t: "<" not in t)


def byte_level(pre: str = "gpt-2", **fields: Any) -> Recipe:
    """A file with a byte-level vocabulary, and fields under `tokenizer.ggml.`."""
    made = recipe(**ONE_BLOCK)
    add_byte_level(made, pre)
    for key, value in fields.items():
        made.set(f"tokenizer.ggml.{key}", value)
    return made


def sentencepiece(**fields: Any) -> Recipe:
    """A file with SentencePiece's vocabulary, and fields under `tokenizer.ggml.`."""
    made = recipe(**ONE_BLOCK)
    add_sentencepiece(made)
    for key, value in fields.items():
        made.set(f"tokenizer.ggml.{key}", value)
    return made


def opened(made: Recipe, folder: Path) -> GGUFFile:
    return open_gguf(made.write(folder / "model.gguf"))


def rebuilt(made: Recipe, folder: Path, events: list[Event] | None = None) -> Tokenizer:
    """tokenizer.json of a recipe, in `folder`."""
    emit = (lambda event: None) if events is None else events.append
    write_tokenizer(opened(made, folder), VOCAB, folder, emit)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def loaded(made: Recipe, folder: Path) -> TokenizerWrapper:
    """The tokenizer as models are used with it: imported, then loaded by mlx-lm."""
    import_gguf(made.write(folder / "model.gguf"), folder / "out")
    return open_source(str(folder / "out")).tokenizer


def refusal(made: Recipe, folder: Path, kind: type[UsageError] = UsageError) -> str:
    """The sentence of a refused import, which must leave nothing behind."""
    path = made.write(folder / "model.gguf")
    with pytest.raises(kind) as caught:
        import_gguf(path, folder / "results" / "model")
    assert type(caught.value) is kind
    assert not list(folder.glob("results/*"))
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    return message


# Byte-level vocabularies


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Tokenizer:
    return rebuilt(byte_level(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Tokenizer:
    return rebuilt(byte_level("qwen2"), tmp_path_factory.mktemp("qwen2"))


def vocabulary_of(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab(with_added_tokens=False)


@settings(max_examples=100)
@given(text=TEXTS)
def test_text_comes_back(gpt2, text):
    ids = gpt2.encode(text).ids
    assert gpt2.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=150)
@given(text=TEXTS)
def test_gpt2_cuts_text_as_transformers_does(gpt2, text):
    own = GPT2Tokenizer(vocabulary_of(gpt2), PAIRS)
    assert gpt2.encode(text).ids == own.encode(text)


@settings(max_examples=150)
@given(text=TEXTS)
def test_qwen2_cuts_text_as_transformers_does(qwen2, text):
    own = Qwen2Tokenizer(vocabulary_of(qwen2), PAIRS)
    assert qwen2.encode(text).ids == own.encode(text)


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "the the", ["the", "Ġthe"]),
        ("gpt-2", "1234", ["1234"]),
        ("smollm", "1234", ["1234"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["12", "3", "4"]),  # threes from the left
        ("llama-bpe", "1212", ["12", "1", "2"]),
        ("gpt-2", "'TT", ["'", "TT"]),
        ("qwen2", "'TT", ["'T", "T"]),  # contractions of both cases
        ("llama-bpe", "'TT", ["'T", "T"]),
        ("gpt-2", "\n\nx", ["Ċ", "Ċ", "x"]),
        ("qwen2", "\n\nx", ["ĊĊ", "x"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # normalized to one letter
        ("llama-bpe", "e\u0301", ["e", "Ì", "ģ"]),
        ("gpt-2", "   x", ["ĠĠ", "Ġ", "x"]),
    ],
)
def test_how_text_is_cut(pre, text, tokens, tmp_path):
    made = byte_level(pre, add_bos_token=False)
    assert rebuilt(made, tmp_path).encode(text).tokens == tokens


@pytest.mark.parametrize(("pre", "tokens"), [("llama-bpe", ["abc"]), ("gpt-2", ["a", "b", "c"])])
def test_llama_3_takes_a_word_of_the_vocabulary_whole(pre, tokens, tmp_path):
    made = byte_level(pre, add_bos_token=False)
    names = made.fields["tokenizer.ggml.tokens"].value
    kinds = made.fields["tokenizer.ggml.token_type"].value
    names[300], kinds[300] = "abc", 1  # no merges lead to it
    assert rebuilt(made, tmp_path).encode("abc").tokens == tokens


def test_ids_are_those_of_the_file_and_unused_ones_are_left_out(gpt2):
    names = [*ALPHABET, *SPECIALS, *("".join(pair) for pair in PAIRS), TOOL_TOKEN]
    assert gpt2.get_vocab() == {name: number for number, name in enumerate(names)}


def test_added_tokens_are_whole_and_of_their_kind(gpt2):
    added = gpt2.get_added_tokens_decoder()
    assert {number: token.content for number, token in added.items()} == {
        **dict(zip(range(256, 260), SPECIALS, strict=True)),
        TOOL_ID: TOOL_TOKEN,
    }
    assert [number for number, token in added.items() if not token.special] == [TOOL_ID]
    ids = gpt2.encode(f"x{TOOL_TOKEN}<|im_end|>x").ids
    assert ids[1:3] == [TOOL_ID, 258]
    assert gpt2.decode(ids) == f"x{TOOL_TOKEN}x"  # control tokens are skipped


def test_a_token_with_a_role_is_special_whatever_its_kind(tmp_path):
    made = byte_level()
    made.fields["tokenizer.ggml.token_type"].value[258] = 1
    assert rebuilt(made, tmp_path).get_added_tokens_decoder()[258].special


def test_without_kinds_all_tokens_without_a_role_are_ordinary(tmp_path):
    made = byte_level()
    del made.fields["tokenizer.ggml.token_type"]
    assert set(rebuilt(made, tmp_path).get_added_tokens_decoder()) == {256, 258, 259}


def test_a_file_that_does_not_say_how_text_is_cut_gets_a_warning(tmp_path):
    events: list[Event] = []
    made = byte_level()
    del made.fields["tokenizer.ggml.pre"]
    assert rebuilt(made, tmp_path, events).encode("1234").tokens == ["1234"]
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.level == "warning"
    assert HINT in notice.text


@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "tekken"])
def test_another_way_to_cut_text_is_refused_by_name(pre, tmp_path):
    message = refusal(byte_level(pre), tmp_path, UnsupportedModel)
    assert repr(pre) in message
    assert HINT in message


# Beginning and end of text


@pytest.mark.parametrize(
    ("fields", "begin", "end"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [256], []),
        ({"add_eos_token": True}, [], [258]),
        ({"add_bos_token": True, "add_eos_token": True}, [256], [258]),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says(fields, begin, end, tmp_path):
    tokenizer = loaded(byte_level(**fields), tmp_path)
    x, y = tokenizer.convert_tokens_to_ids(["x", "y"])
    assert tokenizer.encode("x") == [*begin, x, *end]
    assert tokenizer.encode("x", add_special_tokens=False) == [x]
    raw = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert raw.encode("x", "y").ids == [*begin, x, *end, *begin, y, *end]


@pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("gpt-2", False), ("qwen2", False)])
def test_where_the_file_does_not_say_the_family_decides_on_bos(pre, adds, tmp_path):
    made = byte_level(pre)
    del made.fields["tokenizer.ggml.add_bos_token"]
    assert (rebuilt(made, tmp_path).encode("x").ids[0] == 256) is adds


def test_any_text_may_be_the_bos_token(tmp_path):
    made = byte_level(add_bos_token=True)
    for number, text in ((256, "<bos:1>"), (258, "$A")):
        made.fields["tokenizer.ggml.tokens"].value[number] = text
    assert rebuilt(made, tmp_path).encode("x").tokens == ["<bos:1>", "x"]
    made.set("tokenizer.ggml.bos_token_id", 258)
    assert rebuilt(made, tmp_path).encode("x").tokens == ["$A", "x"]


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_file_that_adds_a_token_must_name_it(role, tmp_path):
    made = byte_level(**{f"add_{role}_token": True})
    del made.fields[f"tokenizer.ggml.{role}_token_id"]
    assert f"'tokenizer.ggml.{role}_token_id'" in refusal(made, tmp_path)


# SentencePiece's vocabularies


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Tokenizer:
    return rebuilt(sentencepiece(), tmp_path_factory.mktemp("spm"))


# transformers puts no space in front of text that begins with one; SentencePiece does.
SPM_TEXTS = (st.text("helowrd ", max_size=30) | st.text(max_size=20)).filter(
    lambda text: not text.startswith(" ") and not {"\u2581", "<"} & set(text)
)


@settings(max_examples=150)
@given(text=SPM_TEXTS)
def test_sentencepiece_is_tokenized_as_transformers_does(spm, text):
    pairs = [tuple(merge.split()) for merge in SPM_MERGES]
    own = LlamaTokenizer(vocabulary_of(spm), pairs)
    ids = spm.encode(text, add_special_tokens=False).ids
    assert ids == own.encode(text, add_special_tokens=False)


def test_a_space_is_put_in_front_of_every_text(spm):
    assert spm.encode(" hello").tokens == ["<s>", "\u2581", "\u2581hello"]


def test_sentencepiece_begins_with_bos_and_a_space(tmp_path):
    tokenizer = loaded(sentencepiece(), tmp_path)
    ids = tokenizer.encode("hello world")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<s>", "\u2581hello", "\u2581w", "or", "l", "d")
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world"


def test_what_sentencepiece_lacks_becomes_bytes(spm):
    encoded = spm.encode("né")
    assert encoded.tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert spm.decode(encoded.ids) == "né"


def test_sentencepiece_without_a_space_in_front(tmp_path):
    tokenizer = rebuilt(sentencepiece(add_space_prefix=False, add_bos_token=False), tmp_path)
    encoded = tokenizer.encode("hello world")
    assert encoded.tokens[0] == "hello"
    assert tokenizer.decode(encoded.ids) == "hello world"
    assert tokenizer.decode(tokenizer.encode(" hello").ids) == " hello"


@pytest.mark.parametrize(
    ("key", "value"), [("remove_extra_whitespaces", True), ("precompiled_charsmap", [1, 2])]
)
def test_rules_of_sentencepiece_that_are_not_rebuilt_are_refused(key, value, tmp_path):
    message = refusal(sentencepiece(**{key: value}), tmp_path, UnsupportedModel)
    assert f"'tokenizer.ggml.{key}'" in message
    assert HINT in message


def test_a_rule_that_is_off_is_accepted(tmp_path):
    made = sentencepiece(remove_extra_whitespaces=False)
    assert rebuilt(made, tmp_path).encode("hello").tokens == ["<s>", "\u2581hello"]


# Vocabularies that are refused


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_a_vocabulary_without_merges_is_refused_with_a_hint(made, tmp_path):
    changed = made()
    del changed.fields["tokenizer.ggml.merges"]
    message = refusal(changed, tmp_path)
    assert "without merges" in message
    assert HINT in message


def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path):
    message = refusal(byte_level(model="bert"), tmp_path, UnsupportedModel)
    assert "'bert'" in message
    assert HINT in message


def test_a_file_without_a_vocabulary_is_refused(tmp_path):
    made = recipe(**ONE_BLOCK)
    for key in [key for key in made.fields if key.startswith("tokenizer.")]:
        del made.fields[key]
    message = refusal(made, tmp_path)
    assert "no vocabulary" in message
    assert HINT in message


def damaged(change: str) -> Recipe:
    """A byte-level file with one thing wrong."""
    made = byte_level()
    tokens = made.fields["tokenizer.ggml.tokens"].value
    kinds = made.fields["tokenizer.ggml.token_type"].value
    merges = made.fields["tokenizer.ggml.merges"].value
    match change:
        case "twice":
            tokens[5] = tokens[6]
        case "too many":
            tokens.append("more")
            kinds.append(1)
        case "kinds":
            kinds.pop()
        case "merge":
            merges.append("th e e")
        case "result":
            merges.append("x y")
        case "numbers":
            made.set("tokenizer.ggml.tokens", [1, 2, 3])
        case "role":
            made.set("tokenizer.ggml.eos_token_id", VOCAB)
    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("twice", "twice"),
        ("too many", f"{VOCAB + 1} tokens, but the embedding has {VOCAB} rows"),
        ("kinds", f"{VOCAB} tokens but {VOCAB - 1} token types"),
        ("merge", "malformed merge 'th e e'"),
        ("result", "xy"),
        ("numbers", "'tokenizer.ggml.tokens' is no array of str"),
        ("role", f"'tokenizer.ggml.eos_token_id' is {VOCAB}"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change, words, tmp_path):
    assert words in refusal(damaged(change), tmp_path)


# Templates and ids


def test_the_chat_template_is_that_of_the_file(tmp_path):
    template = "{# é #}\r\n" + TEMPLATE
    made = byte_level()
    made.set("tokenizer.chat_template", template)
    tokenizer = loaded(made, tmp_path)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes().decode() == template
    made.set("tokenizer.chat_template", TEMPLATE)
    (tmp_path / "again").mkdir()
    tokenizer = loaded(made, tmp_path / "again")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_file_without_a_template_gives_none(tmp_path):
    made = byte_level()
    del made.fields["tokenizer.chat_template"]
    assert not loaded(made, tmp_path).has_chat_template
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_further_templates_are_left_out_with_a_notice(tmp_path):
    events: list[Event] = []
    made = byte_level()
    made.set("tokenizer.chat_template.tool_use", "{{ tools }}")
    rebuilt(made, tmp_path, events)
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert "tool_use" in notice.text
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE


def test_special_tokens_come_back_by_role(tmp_path):
    tokenizer = loaded(byte_level(unknown_token_id=257), tmp_path)
    assert tokenizer.bos_token == SPECIALS[0]
    assert tokenizer.unk_token == SPECIALS[1]
    assert tokenizer.eos_token == SPECIALS[2]
    assert tokenizer.pad_token == SPECIALS[3]
    assert tokenizer.eos_token_ids == {258}
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 512
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 259}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert generation.items() <= config.items()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 258),
        ({"eot_token_id": 258}, 258),
        ({"eot_token_id": 257}, [258, 257]),
        ({"eos_token_id": 256}, [256, 258]),  # the template ends turns with <|im_end|>
        ({"eos_token_id": 256, "eot_token_id": 257, "eom_token_id": 259}, [256, 257, 259, 258]),
    ],
)
def test_all_that_ends_a_turn_ends_generation(fields, expected, tmp_path):
    file = opened(byte_level(**fields), tmp_path)
    assert generation_ids(file, VOCAB)["eos_token_id"] == expected


def test_a_turn_end_that_the_template_does_not_write_counts_for_nothing(tmp_path):
    made = byte_level(eos_token_id=256)
    made.set("tokenizer.chat_template", "{{ messages }}")
    assert generation_ids(opened(made, tmp_path), VOCAB)["eos_token_id"] == 256


def test_a_file_without_special_tokens_names_none(tmp_path):
    made = byte_level()
    for role in ("bos", "eos", "padding"):
        del made.fields[f"tokenizer.ggml.{role}_token_id"]
    del made.fields["tokenizer.chat_template"]
    assert generation_ids(opened(made, tmp_path), VOCAB) == {}


# --tokenizer DIR


@pytest.fixture
def other(tmp_path) -> Path:
    """Another directory, with a tokenizer and a template of its own."""
    folder = tmp_path / "other"
    folder.mkdir()
    write_other_tokenizer(folder, "{{ messages }}")
    return folder


def imported_with(made: Recipe, folder: Path, tokenizer: Path) -> Path:
    out = folder / "out"
    import_gguf(made.write(folder / "model.gguf"), out, tokenizer=tokenizer)
    return out


def without_merges() -> Recipe:
    made = byte_level()
    del made.fields["tokenizer.ggml.merges"]
    return made


def test_with_a_tokenizer_directory_no_merges_are_needed(other, tmp_path):
    out = imported_with(without_merges(), tmp_path, other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    tokenizer = open_source(str(out)).tokenizer
    assert tokenizer.chat_template == "{{ messages }}"  # its own, not the file's
    assert not (out / "chat_template.jinja").exists()
    assert tokenizer.decode(tokenizer.encode("the 1234")) == "the 1234"


def test_what_the_directory_lacks_is_the_files(other, tmp_path):
    (other / "tokenizer_config.json").unlink()
    (other / "weights.bin").write_bytes(b"not a tokenizer file")
    out = imported_with(without_merges(), tmp_path, other)
    assert not (out / "weights.bin").exists()
    tokenizer = load_tokenizer(out, {})
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        258,
        259,
    )


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_in_its_own_file_is_taken(name, other, tmp_path):
    (other / "tokenizer_config.json").unlink()
    content = "{{ messages }}" if name.endswith("jinja") else '{"chat_template": "{{ messages }}"}'
    (other / name).write_text(content)
    out = imported_with(without_merges(), tmp_path, other)
    assert {file.name for file in out.glob("chat_template*")} == {name}
    assert (out / name).read_text() == content


def refused_with(tokenizer: Path, folder: Path) -> str:
    path = without_merges().write(folder / "model.gguf")
    with pytest.raises(UsageError) as caught:
        import_gguf(path, folder / "results" / "model", tokenizer=tokenizer)
    assert not list(folder.glob("results/*"))
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_directory_without_a_tokenizer_is_refused(other, tmp_path):
    assert "no tokenizer.json" in refused_with(tmp_path / "missing", tmp_path)
    (other / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused_with(other, tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}', "\xff"])
def test_a_tokenizer_that_cannot_be_read_is_refused(content, other, tmp_path):
    (other / "tokenizer.json").write_text(content, encoding="latin-1")
    assert "is no tokenizer" in refused_with(other, tmp_path)


def test_a_tokenizer_of_another_model_is_refused(other, tmp_path):
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCAB)])
    tokenizer.save(str(other / "tokenizer.json"))
    message = refused_with(other, tmp_path)
    assert f"ids up to {2 * VOCAB - 61}" in message
    assert f"{VOCAB} rows" in message
