"""Records of JSON lines, and windows cut from them."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.data.calibration import (
    Record,
    _even_shares,
    needs_bos,
    read_records,
    windows,
)
from optiq.errors import UsageError

LLAMA = {"model_type": "llama"}
GEMMA = {"model_type": "gemma3_text"}
BOS = 256


def texts(domain, *sizes):
    """Records of one repeated letter each, a letter a record; n letters and two newlines."""
    return [
        Record(f"{domain}{i}", domain, text=chr(97 + i) * (size - 2))
        for i, size in enumerate(sizes)
    ]


def cut(records, tokenizer, config=LLAMA, *, window=16, count=None, seed=0):
    return windows(records, tokenizer, config, window=window, count=count, seed=seed)


# -- reading -------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_reads_text_and_messages_with_domains(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"text": "one\u2028line"},
        "",
        {"messages": [{"role": "user", "content": "hi"}], "domain": "small talk"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]},
    )
    a, b, c = read_records(path)
    assert (a.domain, a.text) == ("text", "one\u2028line")
    assert (b.domain, b.messages) == ("small talk", ({"role": "user", "content": "hi"},))
    assert (c.domain, c.messages[0]["content"]) == ("chat", "parts")


def test_arguments_written_as_json_become_objects(tmp_path):
    call = {"id": "x", "function": {"name": "f", "arguments": '{"n": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    (record,) = read_records(write(tmp_path / "a.jsonl", {"messages": [turn]}))
    (message,) = record.messages
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"n": 1}
    assert message["tool_calls"][0]["id"] == "x"


def chat(**message):
    return {"messages": [message]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", "not JSON"),
        ('{"text": "\\ud800"}', "not JSON text"),
        ("[1]", "not a JSON object"),
        ({"prompt": "a"}, "neither 'text' nor 'messages'"),
        ({"text": "a", "messages": []}, "both 'text' and 'messages'"),
        ({"text": 3}, "'text' must be a string"),
        ({"text": "  "}, "not empty"),
        ({"text": "a", "domain": 3}, "'domain' must be"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": ["hi"]}, "a role of"),
        (chat(role="robot", content="a"), "a role of"),
        (chat(role="user", content=[{"type": "image"}]), "must be text"),
        (chat(role="user", content=3), "must be text"),
        (chat(role="assistant", tool_calls={}), "'tool_calls' must be a list"),
        (chat(role="assistant", tool_calls=[{"name": "f"}]), "a 'function' with a 'name'"),
        (
            chat(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "arguments of a tool call are no JSON",
        ),
        (
            chat(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
            "must be an object",
        ),
        (chat(role="user", content="a") | {"tools": {"name": "f"}}, "'tools' must be a list"),
        (chat(role="user", content="a") | {"tools": [{"name": "f"}]}, "'tools' must be a list"),
        ({"text": "a", "language": ["en"]}, "'language' must be a word"),
        ({"text": "a", "language": ""}, "'language' must be a word"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", {"text": "good"}, line)
    with pytest.raises(UsageError, match=rf"bad\.jsonl, line 2.*{reason}"):
        read_records(path)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="holds no records"):
        read_records(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        read_records(tmp_path / "binary.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_records(tmp_path)


# -- windows -------------------------------------------------------------------------------------


def test_windows_hold_the_text_in_order(tiny_tokenizer):
    out = cut([Record("a", "d", text="abcdefghijklmnop" * 2)], tiny_tokenizer)
    assert out.tokens.dtype == np.int32
    assert out.tokens.shape == (2, 16)
    assert tiny_tokenizer.decode(out.tokens[0].tolist()) == "abcdefghijklmnop"
    assert out.domains == ("d", "d")


def test_windows_keep_to_one_domain(tiny_tokenizer):
    out = cut(texts("x", 40, 40) + texts("y", 40), tiny_tokenizer)
    assert out.domains == ("x",) * 5 + ("y",) * 2


def test_the_digest_tells_tokens_apart(tiny_tokenizer):
    records = texts("x", 33, 33, 33, 33, 33)
    same = cut(records, tiny_tokenizer)
    assert same.digest == cut(records, tiny_tokenizer).digest
    other = cut(records, tiny_tokenizer, seed=1)
    assert other.digest != same.digest
    assert len(same.digest) == 64


def test_gemma_windows_begin_with_one_bos(tiny_tokenizer):
    records = [
        Record("a", "d", text="a" * 60),
        Record("b", "d", messages=({"role": "user", "content": "b" * 60},)),
    ]
    out = cut(records, tiny_tokenizer, GEMMA)
    assert (out.tokens[:, 0] == BOS).all()
    assert (out.tokens == BOS).sum() == len(out.tokens)
    assert not (cut(records, tiny_tokenizer).tokens == BOS).any()


def test_bos_at_the_head_of_a_record_is_not_doubled(tiny_tokenizer):
    record = Record("a", "d", text="<|endoftext|>" + "a" * 60)
    assert (cut([record], tiny_tokenizer, GEMMA).tokens == BOS).sum(axis=1).tolist() == [1] * 4


def test_bos_is_needed_where_the_tokenizer_adds_it(tiny_tokenizer):
    class AddsBos:
        bos_token_id = BOS

        def encode(self, text, add_special_tokens=True):
            ids = tiny_tokenizer.encode(text)
            return [BOS, *ids] if add_special_tokens else ids

    assert needs_bos(AddsBos(), LLAMA)
    assert not needs_bos(tiny_tokenizer, LLAMA)
    assert needs_bos(tiny_tokenizer, {"model_type": "gemma4_text"})
    tokens = cut([Record("a", "d", text="a" * 60)], AddsBos()).tokens
    assert (tokens == BOS).sum(axis=1).tolist() == [1] * 4


@pytest.mark.parametrize("config", [LLAMA, GEMMA])
def test_every_token_has_its_record(tiny_tokenizer, config):
    letters = "abcde"
    records = [
        Record(letter, domain, text=letter * size)
        for letter, domain, size in zip(letters, "xxyxy", (30, 7, 40, 25, 40), strict=True)
    ]
    out = cut(records, tiny_tokenizer, config)
    assert out.records.shape == out.tokens.shape
    for row, owners in zip(out.tokens, out.records, strict=True):
        for position, (token, owner) in enumerate(zip(row, owners, strict=True)):
            if token == BOS:
                assert (position, owner) == (0, owners[1])
            elif (text := tiny_tokenizer.decode([int(token)])).strip():
                assert text == letters[owner]


def test_count_is_spread_evenly(tiny_tokenizer):
    records = texts("x", 160) + texts("y", 160) + texts("z", 16)
    out = cut(records, tiny_tokenizer, count=8)
    assert Counter(out.domains) == {"x": 4, "y": 3, "z": 1}
    assert len(cut(records, tiny_tokenizer, count=500).tokens) == 21


def test_too_short_text_names_both_numbers(tiny_tokenizer):
    with pytest.raises(UsageError, match=r"15 tokens in 1 domains; a window takes at least 16"):
        cut(texts("x", 15), tiny_tokenizer)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 100))
def test_even_shares_laws(available, count):
    shares = _even_shares(available, count)
    assert sum(shares) == min(count, sum(available))
    assert all(share <= there for share, there in zip(shares, available, strict=True))
    cut_short = [s for s, there in zip(shares, available, strict=True) if s < there]
    if cut_short:
        assert max(shares) - min(cut_short) <= 1
