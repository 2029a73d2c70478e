"""Streaming: resuming, memory of weights, and models that are not plain chains of blocks."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from optiq.artifacts import SourceInfo
from optiq.backend import mx, nn, tree_flatten
from optiq.errors import EngineFailure, UnsupportedModel, UsageError
from optiq.models.load import Source, open_source
from optiq.models.modules import find_modules
from optiq.models.stream import Link, StreamedModel
from tests.tiny import VOCAB, tiny_checkpoint, tiny_config, tiny_weights

WIDTH, WORDS = 8, 11


# -- toy models ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def __call__(self, x):
        return x + mx.tanh(self.proj(x))


class Toy(nn.Module):
    """Embedding, three blocks, head; subclasses change how the blocks are used."""

    block = Block

    def __init__(self):
        super().__init__()
        mx.random.seed(7)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = [self.block() for _ in range(3)]
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def __call__(self, tokens):
        return self.head(self.body(self.embed(tokens), tokens))

    def body(self, h, tokens):
        for layer in self.layers:
            h = layer(h)
        return h


@dataclasses.dataclass
class ToySource:
    """As much of a source as streaming uses."""

    kind: type[Toy]
    dtype: mx.Dtype = mx.float32

    def __post_init__(self):
        self.modules = find_modules(self.kind(), {})
        name = self.kind.__name__
        self.info = SourceInfo(name, None, name, "toy", "float32", 0, 0)

    def model(self):
        return self.kind()

    def weights(self):
        return dict(tree_flatten(self.kind().parameters()))


def toy_tokens(num_sequences, window=5):
    random = np.random.default_rng(3)
    return mx.array(random.integers(0, WORDS, (num_sequences, window)), dtype=mx.int32)


def streamed(kind, work, tokens, batch=2):
    stream = StreamedModel(ToySource(kind), tokens, work)
    stream.batch = batch
    stream.forward()
    return stream


def assert_streams(kind, work, num_sequences=3, window=5, batch=2):
    """Logits and the gradients of the blocks' matrices equal those of the whole model."""
    tokens = toy_tokens(num_sequences, window)
    probe = mx.random.normal((num_sequences, window, WORDS), key=mx.random.key(1))
    whole = kind()
    expected = np.array(whole(tokens))
    _, tree = nn.value_and_grad(whole, lambda m: (m(tokens) * probe).sum())(whole)
    gradients = {name: np.array(value) for name, value in tree_flatten(tree)}

    stream = streamed(kind, work, tokens, batch)
    stream.load_ends()
    links = stream.outputs()
    found, pulled = [], []
    for rows in stream.batches():
        given = [stream.fetch(link)[rows] for link in links]
        run = lambda *h, rows=rows: stream.logits(rows, h)  # noqa: E731
        logits, grads = mx.vjp(run, given, [probe[rows]])
        found.append(np.array(logits[0]))
        pulled.append(grads)
    assert np.concatenate(found) == pytest.approx(expected, abs=1e-5)

    cotangents = {
        k: mx.concatenate(v) for k, v in zip(links, zip(*pulled, strict=True), strict=True)
    }
    sums = Counter()

    def visit(_rows, calls):
        for call in calls:
            if call.g is not None:
                x, g = (np.array(a).reshape(-1, WIDTH) for a in (call.x, call.g))
                sums[f"{call.path}.weight"] = sums[f"{call.path}.weight"] + g.T @ x

    for index in reversed(range(stream.num_blocks)):
        stream.backward(index, cotangents, visit)
    assert len(sums) == stream.num_blocks
    for name, total in sums.items():
        assert total == pytest.approx(gradients[name], rel=1e-3, abs=1e-4), name
    return stream, cotangents


class Additive(Toy):
    """A floating mask without rows for the sequences, whose length may equal their number."""

    class block(Block):
        def __call__(self, x, mask):
            return x + mx.tanh(mask @ self.proj(x))

    def body(self, h, tokens):
        mask = mx.tri(tokens.shape[1])
        for layer in self.layers:
            h = layer(h, mask)
        return h


class TokenIds(Toy):
    """Every block takes token ids: an array of whole numbers with a row for each sequence."""

    class block(Block):
        def __call__(self, x, ids):
            return x + mx.tanh(self.proj(x)) * (ids % 3)[..., None]

    def body(self, h, tokens):
        for layer in self.layers:
            h = layer(h, ids=tokens)
        return h


class FirstValues(Toy):
    """All blocks take what the first returns beside its output, and the embedding."""

    class block(Block):
        def __call__(self, x, start, values=None):
            y = self.proj(x)
            values = mx.sin(y) if values is None else values
            return x + start * mx.tanh(y + values), {"values": [values, None]}

    def body(self, h, tokens):
        start, values = h, None
        for layer in self.layers:
            h, kept = layer(h, start, values=values)
            values = kept["values"][0]
        return h


class Offsets(Toy):
    """A block returns whole numbers that the next one reads."""

    class block(Block):
        def __call__(self, x, offset=None, ids=None):
            offset = mx.array(2) if offset is None else offset
            ids = mx.arange(x.shape[0] * 2).reshape(-1, 2) * 0 + 1 if ids is None else ids
            return x + mx.tanh(self.proj(x)) * offset * ids[:, :1, None], offset + 1, ids + 1

    def body(self, h, tokens):
        offset = ids = None
        for layer in self.layers:
            h, offset, ids = layer(h, offset, ids=ids)
        return h


class FreshMasks(Toy):
    """Each block gets a mask that is made for it and then dropped, so identities are reused."""

    class block(Block):
        def __call__(self, x, mask):
            return x + mx.tanh(self.proj(x)) * mask[None, :, None]

    def body(self, h, tokens):
        for number, layer in enumerate(self.layers):
            h = layer(h, mx.arange(tokens.shape[1]) % (number + 2) == 0)
        return h


class InPlace(Toy):
    """A block writes over what it is given."""

    class block(Block):
        def __call__(self, x, table):
            y = self.proj(mx.sin(x))
            table *= 2
            x += mx.tanh(y) * table
            return x

    def body(self, h, tokens):
        table = mx.linspace(0, 1, WIDTH)
        for layer in self.layers:
            h = layer(h, table[...])
        return h


class AfterBlocks(Toy):
    """The head reads the embedding too."""

    def body(self, h, tokens):
        return super().body(h, tokens) + h


@pytest.mark.parametrize(
    "kind", [Toy, Additive, TokenIds, FirstValues, Offsets, FreshMasks, InPlace, AfterBlocks]
)
@pytest.mark.parametrize(("num_sequences", "batch"), [(5, 2), (3, 3), (1, 4), (4, 1)])
def test_what_crosses_blocks_is_followed(kind, tmp_path, num_sequences, batch):
    assert_streams(kind, tmp_path, num_sequences=num_sequences, batch=batch)


def test_arrays_without_rows_get_no_cotangent(tmp_path):
    stream, cotangents = assert_streams(Additive, tmp_path, num_sequences=5, window=5)
    kinds = {link.kind: link.batched for link in stream.calls[0].inputs()}
    assert kinds == {"pro": True, "const": False}
    assert [link.kind for link in cotangents] == ["pro"]


def test_crossing_values_get_cotangents(tmp_path):
    stream, _ = assert_streams(FirstValues, tmp_path)
    taken = [(link.kind, link.index) for link in stream.calls[2].links()]
    assert sorted(taken) == [("out", 1), ("out", 1), ("pro", 0)]


class NewBetween(Toy):
    def body(self, h, tokens):
        for layer in self.layers:
            h = layer(h) + 0.5
        return h


class InPlaceBetween(Toy):
    def body(self, h, tokens):
        for layer in self.layers:
            h = layer(h)
            h += 0.5
        return h


class ChosenBetween(TokenIds):
    """Whole numbers computed from an output show no NaN."""

    def body(self, h, tokens):
        for layer in self.layers:
            h = layer(h, ids=mx.argmax(h, axis=-1))
        return h


class StartChanges(FirstValues):
    def body(self, h, tokens):
        start = h[...]
        for layer in self.layers:
            h, _ = layer(h, start)
            start *= 0.5
        return h


@pytest.mark.parametrize("kind", [NewBetween, InPlaceBetween, ChosenBetween, StartChanges])
def test_code_between_blocks_is_refused(kind, tmp_path):
    with pytest.raises(UnsupportedModel, match="input of block 1 is computed between the blocks"):
        streamed(kind, tmp_path, toy_tokens(3))


class Twice(Toy):
    def body(self, h, tokens):
        return super().body(super().body(h, tokens), tokens)


class Skipping(Toy):
    def body(self, h, tokens):
        return self.layers[1](self.layers[0](h))


class Backwards(Toy):
    def body(self, h, tokens):
        for layer in reversed(self.layers):
            h = layer(h)
        return h


@pytest.mark.parametrize("kind", [Twice, Skipping, Backwards])
def test_blocks_must_run_once_and_in_order(kind, tmp_path):
    with pytest.raises(UnsupportedModel, match="each of its blocks once, in order"):
        streamed(kind, tmp_path, toy_tokens(3))


class HeadReadsMore(Toy):
    def body(self, h, tokens):
        first = self.layers[0](h)
        return self.layers[2](self.layers[1](first)) + first


class Flat(Toy):
    def body(self, h, tokens):
        shape, h = h.shape, h.reshape(-1, WIDTH)
        return super().body(h, tokens).reshape(shape)


class Cached(Toy):
    class block(Block):
        def __call__(self, x, cache):
            return super().__call__(x)

    def body(self, h, tokens):
        for layer in self.layers:
            h = layer(h, object())
        return h


class Losses(Toy):
    class block(Block):
        def __call__(self, x):
            return super().__call__(x), x.mean()

    def body(self, h, tokens):
        for layer in self.layers:
            h, _ = layer(h)
        return h


class Counts(Toy):
    """Whole numbers without rows that depend on the micro-batch."""

    class block(Block):
        def __call__(self, x):
            return super().__call__(x), (x > 0).sum()

    def body(self, h, tokens):
        for layer in self.layers:
            h, _ = layer(h)
        return h


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (HeadReadsMore, "logits of this model are computed from more than"),
        (Flat, r"takes an array of shape \[15, 8\], which has no row for each sequence"),
        (Counts, r"returns an array of shape \[\], which has no row for each sequence"),
        (Losses, r"returns an array of shape \[\], which has no row for each sequence"),
        (Cached, "takes or returns a object"),
    ],
)
def test_what_cannot_be_followed_is_refused(kind, words, tmp_path):
    with pytest.raises(UnsupportedModel, match=words):
        streamed(kind, tmp_path, toy_tokens(3))


def test_a_model_without_blocks_is_refused(tmp_path):
    class Flattened(Toy):
        def __init__(self):
            super().__init__()
            self.layers = ()

    with pytest.raises(UnsupportedModel, match="no list of blocks"):
        StreamedModel(ToySource(Flattened), toy_tokens(2), tmp_path)


# -- resuming --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A source of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return open_source(str(tiny_checkpoint(folder, "gemma4_text")))


def tokens_of(num_sequences=5, window=12, seed=0):
    random = np.random.default_rng(seed)
    return mx.array(random.integers(0, VOCAB, (num_sequences, window)), dtype=mx.int32)


def activations(work):
    """Bytes of every file of a work directory, by name."""
    return {file.name: file.read_bytes() for file in sorted(Path(work).iterdir())}


class Interrupt(Exception):
    pass


def interrupt_after(last):
    def done(index, _block):
        if index == last:
            raise Interrupt

    return done


@pytest.fixture
def opened(monkeypatch):
    """Counts of weights that were opened, and of blocks that were loaded."""
    counts = Counter()
    weights, load_block = Source.weights, StreamedModel.load_block

    def counted_weights(self):
        counts["weights"] += 1
        return weights(self)

    def counted_block(self, index):
        counts[index] += 1
        return load_block(self, index)

    monkeypatch.setattr(Source, "weights", counted_weights)
    monkeypatch.setattr(StreamedModel, "load_block", counted_block)
    return counts


def test_a_fresh_run_opens_weights_once_for_each_block_and_for_the_ends(deep, tmp_path, opened):
    StreamedModel(deep, tokens_of(), tmp_path).forward()
    assert opened == {"weights": 5, 0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("again", ["same object", "another process"])
def test_an_interrupted_run_goes_on_and_gives_the_same(deep, tmp_path, opened, again):
    fresh = tmp_path / "fresh"
    StreamedModel(deep, tokens_of(), fresh).forward()
    opened.clear()

    work = tmp_path / "killed"
    stream = StreamedModel(deep, tokens_of(), work)
    with pytest.raises(Interrupt):
        stream.forward(done=interrupt_after(2))
    if again == "another process":
        stream = StreamedModel(deep, tokens_of(), work)
    visited, finished = Counter(), []
    stream.forward(
        lambda calls: visited.update(call.path.split(".")[2] for call in calls[:1]),
        lambda index, _: finished.append(index),
    )
    assert {key: count for key, count in opened.items() if key != "weights"} == {
        0: 1,
        1: 1,
        2: 2,  # it was not finished
        3: 1,
    }
    assert finished == [2, 3]
    assert set(visited) == {"2", "3"}
    assert activations(work) == activations(fresh)


def test_a_finished_run_computes_nothing_again(deep, tmp_path, opened):
    StreamedModel(deep, tokens_of(), tmp_path).forward()
    before = activations(tmp_path)
    opened.clear()
    again = StreamedModel(deep, tokens_of(), tmp_path)
    again.forward(done=interrupt_after(0))
    assert opened == {"weights": 1}
    assert activations(tmp_path) == before
    assert len(again.calls) == again.num_blocks


def test_blocks_are_run_again_from_a_lost_file_on(deep, tmp_path, opened):
    StreamedModel(deep, tokens_of(), tmp_path).forward()
    before = activations(tmp_path)
    (tmp_path / "block_0001.safetensors").unlink()
    opened.clear()
    StreamedModel(deep, tokens_of(), tmp_path).forward()
    assert opened == {"weights": 4, 1: 1, 2: 1, 3: 1}
    assert activations(tmp_path) == before


def test_finished_blocks_are_counted_and_can_be_forgotten(deep, tmp_path, opened):
    stream = StreamedModel(deep, tokens_of(), tmp_path)
    assert stream.num_finished() == 0
    with pytest.raises(Interrupt):
        stream.forward(done=interrupt_after(2))
    assert stream.num_finished() == 2
    stream.forward()
    before = activations(tmp_path)
    assert StreamedModel(deep, tokens_of(), tmp_path).num_finished() == 4
    assert StreamedModel(deep, tokens_of(seed=1), tmp_path).num_finished() == 0
    stream.forget(1)
    assert stream.num_finished() == 1
    opened.clear()
    stream.forward()
    assert opened == {"weights": 4, 1: 1, 2: 1, 3: 1}
    assert activations(tmp_path) == before


def test_activations_of_other_tokens_are_not_used(deep, tmp_path, opened):
    StreamedModel(deep, tokens_of(seed=1), tmp_path / "a").forward()
    StreamedModel(deep, tokens_of(seed=2), tmp_path / "b").forward()
    opened.clear()
    StreamedModel(deep, tokens_of(seed=2), tmp_path / "a").forward()
    assert opened["weights"] == 5
    assert activations(tmp_path / "a") == activations(tmp_path / "b")


def test_activations_of_another_source_or_dtype_are_not_used(deep, tiny_source, tmp_path, opened):
    StreamedModel(tiny_source, tokens_of(), tmp_path).forward()
    StreamedModel(deep, tokens_of(), tmp_path).forward()
    opened.clear()
    half = StreamedModel(deep, tokens_of(), tmp_path)
    half.dtype = mx.float16
    half.forward()
    assert opened["weights"] == 5
    assert half.fetch(half.outputs()[0]).dtype == mx.float16


def test_a_resumed_run_can_go_backwards(deep, tmp_path):
    """Links of a run that was read back are those of a fresh one."""
    first = StreamedModel(deep, tokens_of(), tmp_path)
    first.forward()
    again = StreamedModel(deep, tokens_of(), tmp_path)
    again.forward()
    assert again.calls == first.calls
    cotangents = {link: mx.ones_like(again.fetch(link)) for link in again.outputs()}
    again.backward(3, cotangents, lambda _rows, _calls: None)
    assert {link for link in cotangents if link.index == 3} == {
        link for link in again.calls[3].links() if link.index == 3
    }


def test_backward_takes_outputs_out_and_adds_inputs_in(tmp_path):
    stream = streamed(Toy, tmp_path, toy_tokens(3))
    last, middle = Link("out", 2, 0), Link("out", 1, 0)
    seed = mx.random.normal((3, 5, WIDTH), key=mx.random.key(0))
    alone = {last: seed}
    stream.backward(2, alone, lambda _rows, _calls: None)
    assert list(alone) == [middle]
    both = {last: seed, middle: mx.ones_like(seed)}
    stream.backward(2, both, lambda _rows, _calls: None)
    assert np.array(both[middle]) == pytest.approx(np.array(alone[middle]) + 1, abs=1e-6)


# -- weights ---------------------------------------------------------------------------------------


def test_backward_opens_weights_once_a_block(deep, tmp_path, opened):
    stream = StreamedModel(deep, tokens_of(), tmp_path)
    stream.forward()
    opened.clear()
    cotangents = {link: mx.ones_like(stream.fetch(link)) for link in stream.outputs()}
    for index in (3, 2, 1, 0):
        stream.backward(index, cotangents, lambda _rows, _calls: None)
    assert opened == {"weights": 4, 0: 1, 1: 1, 2: 1, 3: 1}


def test_loaded_weights_are_there_and_dropped_ones_are_gone(deep, tmp_path):
    stream = StreamedModel(deep, tokens_of(), tmp_path)
    weights = deep.weights()
    block = stream.load_block(1)
    for name, value in tree_flatten(block.parameters()):
        expected = weights[f"{stream.prefix}.1.{name}"].astype(mx.float32)
        assert mx.array_equal(value, expected).item(), name
    stream.drop_block(1)
    for _, value in tree_flatten(block.parameters()):
        assert mx.isnan(value).all().item()
    model = stream.load_ends()
    assert mx.isfinite(model.model.embed_tokens.weight).all().item()
    assert mx.isnan(model.model.layers[0].mlp.up_proj.weight).all().item()
    stream.drop_ends()
    assert mx.isnan(model.model.embed_tokens.weight).all().item()


def test_weights_are_loaded_in_the_dtype_asked_for(tiny_source, tmp_path):
    stream = StreamedModel(tiny_source, tokens_of(), tmp_path)
    stream.dtype = mx.bfloat16
    block = stream.load_block(0)
    assert {v.dtype for _, v in tree_flatten(block.parameters())} == {mx.bfloat16}


def test_overrides_replace_weights(tiny_source, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    seen = []

    def zeroed(found, value):
        seen.append(found)
        return mx.zeros_like(value) if found == name else value

    plain = StreamedModel(tiny_source, tokens_of(), tmp_path / "a")
    other = StreamedModel(tiny_source, tokens_of(), tmp_path / "b", zeroed)
    plain.forward()
    other.forward()
    first, last = Link("out", 0, 0), Link("out", 1, 0)
    assert mx.array_equal(plain.fetch(first), other.fetch(first)).item()
    assert not mx.allclose(plain.fetch(last), other.fetch(last)).item()
    assert sorted(seen) == sorted(tiny_source.parameters)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    folder = tiny_checkpoint(tmp_path)
    weights = tiny_weights(tiny_config())
    flat = weights[name].reshape(-1)
    flat[3] = value
    weights[name] = flat.reshape(weights[name].shape)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    stream = StreamedModel(open_source(str(folder)), tokens_of(), tmp_path / "work")
    with pytest.raises(UsageError, match=f"'{name}' of .* holds NaN or inf"):
        stream.forward()


def test_a_model_with_experts_runs_one_sequence_at_a_time(tmp_path, tiny_source):
    source = open_source(str(tiny_checkpoint(tmp_path, "olmoe")))
    assert StreamedModel(source, tokens_of(), tmp_path / "a").batch == 1
    assert StreamedModel(tiny_source, tokens_of(), tmp_path / "b").batch > 1


# -- work directory --------------------------------------------------------------------------------


def test_blocks_of_another_run_are_adopted(deep, tmp_path, opened):
    name = "model.layers.2.mlp.up_proj.weight"

    def halved(found, value):
        return value / 2 if found == name else value

    reference = StreamedModel(deep, tokens_of(), tmp_path / "reference")
    reference.forward()
    whole = StreamedModel(deep, tokens_of(), tmp_path / "whole", halved)
    whole.forward()
    before = activations(tmp_path / "reference")
    opened.clear()
    part = StreamedModel(deep, tokens_of(), tmp_path / "part", halved)
    part.adopt(reference, 2)
    part.forward()
    assert opened == {"weights": 3, 2: 1, 3: 1}
    assert activations(tmp_path / "part") == activations(tmp_path / "whole")
    part.close()
    assert activations(tmp_path / "reference") == before


def test_adopting_no_block_or_all(deep, tmp_path, opened):
    reference = StreamedModel(deep, tokens_of(), tmp_path / "reference")
    reference.forward()
    for count in (0, 4):
        opened.clear()
        other = StreamedModel(deep, tokens_of(), tmp_path / str(count))
        other.adopt(reference, count)
        other.forward()
        assert opened["weights"] == 5 - count
        assert activations(other.work) == activations(reference.work)


def test_close_deletes_the_activations(deep, tmp_path):
    stream = StreamedModel(deep, tokens_of(), tmp_path / "work")
    stream.forward()
    assert {file.suffix for file in stream.work.iterdir()} == {".json", ".safetensors"}
    assert json.loads((stream.work / "calls.json").read_text())["calls"]
    stream.close()
    assert not stream.work.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["before_0000", "block_0001"])
def test_a_full_disk_is_an_engine_failure_and_the_run_can_go_on(deep, tmp_path, name):
    work = tmp_path / "work"
    work.mkdir()
    os.symlink("/dev/full", work / f"{name}.part.safetensors")
    stream = StreamedModel(deep, tokens_of(), work)
    with pytest.raises(EngineFailure, match="free disk space"):
        stream.forward()
    stream.forward()
    other = StreamedModel(deep, tokens_of(), tmp_path / "other")
    other.forward()
    assert activations(work) == activations(other.work)
