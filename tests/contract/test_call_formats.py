"""Every format of calls keeps the promises of `CallFormat`."""

import pytest
from tokenizers import AddedToken, Tokenizer

from optiq.engine.events import ToolCallDelta, ToolCallDone, ToolCallStarted
from optiq.engine.tools import CALL_FORMATS, call_format
from optiq.engine.tools.base import CallError, CallWriter
from optiq.upstream import tokenizer_of
from tests.gemma4 import TARGET
from tests.tiny import write_tokenizer

QUOTE = '<|"|>'
CALLS = {
    "gemma4": f"call:f{{a:{QUOTE}x{QUOTE}}}",
    "mlx_lm": '{"name": "f", "arguments": {"a": "x"}}',
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A model that writes calls in each format, by its name."""
    folder = tmp_path_factory.mktemp("json")
    write_tokenizer(folder, "<tool_call>{{ tool_call.name }}")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    backend.save(str(folder / "tokenizer.json"))
    return {"gemma4": tokenizer_of(TARGET, {}), "mlx_lm": tokenizer_of(folder, {})}


@pytest.fixture(params=CALL_FORMATS.names())
def name(request):
    return request.param


def reader_of(name, tokenizers):
    form = CALL_FORMATS.get(name)(tokenizers[name])
    writer = CallWriter(iter("abc").__next__)
    return writer, form.reader(writer, [])


def put(reader, tokenizer, text):
    backend = tokenizer.backend_tokenizer
    for number, piece in enumerate(text.split(QUOTE)):
        if number:
            reader.special(backend.token_to_id(QUOTE), QUOTE)
        reader.text(piece)


def test_a_model_without_calls_has_no_format(name, tiny_tokenizer):
    assert CALL_FORMATS.get(name)(tiny_tokenizer) is None
    assert call_format(tiny_tokenizer) is None


def test_the_models_own_format_is_found(name, tokenizers):
    form = call_format(tokenizers[name])
    assert form.name == name
    assert form.start
    assert form.end != form.start


def test_a_block_is_read_and_nothing_of_it_is_left(name, tokenizers):
    writer, reader = reader_of(name, tokenizers)
    put(reader, tokenizers[name], CALLS[name])
    reader.close()
    started, *deltas, done = writer.take()
    assert (started, done) == (
        ToolCallStarted(0, "a", "f"),
        ToolCallDone(0, "a", "f", '{"a": "x"}'),
    )
    assert all(isinstance(delta, ToolCallDelta) for delta in deltas)
    assert "".join(delta.arguments for delta in deltas) == done.arguments
    assert (reader.raw, writer.take()) == ("", [])


@pytest.mark.parametrize("cut", [1, 5])
def test_a_block_that_breaks_off_is_an_error_and_its_text_is_kept(name, cut, tokenizers):
    writer, reader = reader_of(name, tokenizers)
    text = CALLS[name][:-cut]
    put(reader, tokenizers[name], text)
    with pytest.raises(CallError, match=r"\w"):
        reader.close()
    assert reader.raw == text
    assert not any(isinstance(event, ToolCallDone) for event in writer.take())
