"""Roles of matrices where names and shapes could mislead, and what taps leave behind."""

import pytest

from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel
from optiq.models.head import HeadSlices, head_of
from optiq.models.modules import find_modules, module_at, parameters_of
from optiq.models.taps import tapped
from optiq.upstream import SwitchLinear

VOCAB, WIDTH = 12, 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(WIDTH, VOCAB)
        self.norm = nn.RMSNorm(WIDTH)
        self.experts = SwitchLinear(WIDTH, 6, 4, bias=False)


class Model(nn.Module):
    def __init__(self, *, tied=False, positions=0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = [Layer() for _ in range(11)]
        if positions:
            self.wpe = nn.Embedding(positions, WIDTH)
        if not tied:
            self.lm_head = nn.Linear(WIDTH, VOCAB)


def by_path(model, config=None):
    return {info.path: info for info in find_modules(model, config or {})}


def test_a_linear_inside_a_layer_is_no_head_whatever_its_rows():
    found = by_path(Model())
    assert found["layers.3.up"].role == "linear"
    assert found["lm_head"].role == "head"
    assert found["layers.3.gate"].role == "router"
    assert found["layers.3.experts"].role == "expert"
    assert found["layers.3.experts"].shape == (4, 6, WIDTH)
    assert "layers.3.norm" not in found


def test_layers_come_by_number_not_by_letter():
    paths = [p for p in by_path(Model()) if p.endswith(".up")]
    assert paths == [f"layers.{n}.up" for n in range(11)]
    every = list(by_path(Model()))
    assert every[0] == "embed"
    assert every[-1] == "lm_head"


def test_the_config_tells_the_vocabulary_from_longer_position_tables():
    told = by_path(Model(tied=True, positions=64), {"vocab_size": VOCAB})
    assert told["embed"].tied
    assert not told["wpe"].tied
    nested = by_path(Model(tied=True, positions=64), {"text_config": {"vocab_size": VOCAB}})
    assert nested["embed"].tied
    assert by_path(Model(positions=64), {"vocab_size": VOCAB})["lm_head"].role == "head"


def test_a_vocabulary_that_no_embedding_has_is_not_believed():
    assert by_path(Model(tied=True), {"vocab_size": 999})["embed"].tied


def test_what_the_family_keeps_from_quantizing_is_not_listed():
    class Keeps(Model):
        @property
        def quant_predicate(self):
            return lambda path, _: {"bits": 8} if path.endswith("gate") else "up" not in path

    found = by_path(Keeps())
    assert "layers.0.gate" in found
    assert "layers.0.up" not in found


def test_an_embedding_is_not_tied_because_the_head_may_not_be_quantized():
    class KeepsHead(Model):
        @property
        def quant_predicate(self):
            return lambda path, _: path != "lm_head"

    found = find_modules(KeepsHead(), {})
    assert not any(info.tied for info in found)
    with pytest.raises(UnsupportedModel, match="no output head"):
        head_of(found)


@pytest.mark.parametrize(
    ("config", "active"),
    [
        ({"num_experts_per_tok": 2}, 0.5),
        ({"top_k_experts": 1}, 0.25),
        ({"text_config": {"num_experts_per_tok": 3}}, 0.75),
        ({"num_experts_per_tok": 9}, 1.0),
        ({}, 1.0),
    ],
)
def test_the_share_of_experts_that_a_token_reads(config, active):
    found = by_path(Model(), config)
    assert found["layers.0.experts"].active == active
    assert found["embed"].active == 1 / VOCAB
    assert found["layers.0.up"].active == 1.0
    assert by_path(Model(tied=True), config)["embed"].active == 1.0


def test_modules_and_parameters_by_name():
    model = Model()
    assert module_at(model, "layers.10.up") is model.layers[10].up
    assert module_at(model, "") is model
    parameters = parameters_of(model)
    assert parameters["layers.10.up.bias"] is model.layers[10].up.bias
    with pytest.raises(KeyError):
        module_at(model, "layers.0.down")


def test_taps_leave_the_model_as_it_was():
    model = Model()
    before, names = dict(model.named_modules()), list(parameters_of(model))
    infos = find_modules(model, {})
    with pytest.raises(RuntimeError), tapped(model, "", infos):
        raise RuntimeError
    with tapped(model.layers[2], "layers.2.", infos):
        assert "up.weight" not in parameters_of(model.layers[2])
    assert list(parameters_of(model)) == names
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[path] is before[path] for path in before)


def test_taps_record_every_use_and_the_cotangents():
    model = Model()
    infos = [info for info in find_modules(model, {}) if info.path in {"embed", "layers.1.up"}]
    x = mx.random.normal((2, 3, WIDTH), key=mx.random.key(0))
    seed = mx.random.normal((2, 3, VOCAB), key=mx.random.key(1))
    with tapped(model, "", infos) as taps:
        taps.start(gradients=True)
        assert module_at(model, "layers.1.up").weight.shape == (VOCAB, WIDTH)
        _, (grad,) = mx.vjp(
            lambda x: [model.layers[1].up(x) + model.embed.as_linear(2 * x)], [x], [seed]
        )
        first, second = taps.calls
        assert (first.path, first.lookup, second.path, second.lookup) == (
            "layers.1.up",
            False,
            "embed",
            False,
        )
        assert mx.allclose(first.g, seed).item()
        assert mx.allclose(second.x, 2 * x).item()
        expected = seed @ model.layers[1].up.weight + 2 * (seed @ model.embed.weight)
        assert mx.allclose(grad, expected, atol=1e-5).item()

        taps.start(gradients=False)
        model.embed(mx.array([[1, 2]]))
        (call,) = taps.calls
        assert call.lookup
        assert call.g is None


def test_an_anchor_gives_lookups_a_cotangent():
    model = Model()
    infos = [info for info in find_modules(model, {}) if info.path == "embed"]
    ids = mx.array([[1, 2, 1]])
    seed = mx.random.normal((1, 3, WIDTH), key=mx.random.key(1))
    with tapped(model, "", infos) as taps:

        def run(zero):
            taps.start(gradients=True, anchor=zero)
            return [3 * model.embed(ids)]

        _, grads = mx.vjp(run, [mx.array(0.0)], [seed])
        mx.eval(grads)
        (call,) = taps.calls
        assert mx.allclose(call.g, 3 * seed).item()
        assert mx.array_equal(call.x, ids).item()


@pytest.mark.parametrize("tied", [True, False])
def test_slices_of_the_head_are_slices_of_the_logits(tied):
    model = Model(tied=tied)
    x = mx.random.normal((2, WIDTH), key=mx.random.key(0))
    run = model.embed.as_linear if tied else model.lm_head
    whole = run(x)
    head = HeadSlices(model, find_modules(model, {}))
    assert head.vocab_size == VOCAB
    for start, stop in ((0, 5), (5, 10), (10, 99)):
        with head.slice(start, stop):
            assert mx.allclose(run(x), whole[:, start:stop], atol=1e-6).item()
    with pytest.raises(KeyError), head.slice(0, 1):
        raise KeyError
    assert mx.allclose(run(x), whole, atol=1e-6).item()
