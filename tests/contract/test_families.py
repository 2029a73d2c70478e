"""Every family: what is found in its tree, and streaming against the whole model in float32."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from optiq.backend import mx, nn, tree_flatten
from optiq.models.head import HeadSlices, head_of
from optiq.models.load import open_source
from optiq.models.stream import StreamedModel
from optiq.models.taps import tapped
from tests.tiny import FAMILIES, VOCAB, tiny_checkpoint

NUM_SEQUENCES, WINDOW = 3, 24
MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
CASES = [*FAMILIES, "gemma4_moe"]

# linears, routers, expert stacks, embeddings, heads
ROLES = {
    "llama": (14, 0, 0, 1, 0),
    "llama_untied": (14, 0, 0, 1, 1),
    "qwen2": (14, 0, 0, 1, 0),
    "qwen3": (14, 0, 0, 1, 0),
    "qwen3_moe": (8, 2, 6, 1, 1),
    "gemma3_text": (21, 0, 0, 1, 0),
    "gemma4_text": (33, 0, 0, 2, 0),
    "gemma4_moe": (33, 4, 12, 2, 0),
    "phi3": (8, 0, 0, 1, 1),
    "mistral3": (14, 0, 0, 1, 0),
    "olmoe": (8, 2, 6, 1, 1),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A source, tokens, and the logits and gradients of the whole model in float32."""
    family, overrides = request.param, {}
    if family == "gemma4_moe":
        family, overrides = "gemma4_text", MOE
    folder = tmp_path_factory.mktemp(request.param)
    source = open_source(str(tiny_checkpoint(folder, family, **overrides)))
    random = np.random.default_rng(5)
    tokens = mx.array(random.integers(0, VOCAB, (NUM_SEQUENCES, WINDOW)), dtype=mx.int32)
    probe = mx.array(random.normal(size=(NUM_SEQUENCES, WINDOW, VOCAB)).astype(np.float32))
    model = source.model()
    model.set_dtype(mx.float32)
    model.train()
    logits = model(tokens)
    _, tree = nn.value_and_grad(model, lambda m: (m(tokens) * probe).sum())(model)
    gradients = dict(tree_flatten(tree))
    mx.eval(logits, gradients)
    return SimpleNamespace(
        name=request.param,
        source=source,
        tokens=tokens,
        probe=probe,
        logits=np.array(logits),
        gradients=gradients,
    )


def quantizable(model):
    """Path -> module of what stock mlx-lm can quantize."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "to_quantized")}


def test_every_matrix_is_listed_once_with_its_shape(case):
    tree = quantizable(case.source.model())
    listed = [info.path for info in case.source.modules]
    assert sorted(listed) == sorted(tree)
    for info in case.source.modules:
        assert info.shape == tuple(tree[info.path].weight.shape)
        assert info.in_dims == tree[info.path].weight.shape[-1]
        assert case.source.parameters[f"{info.path}.weight"] == info.shape


def test_roles(case):
    found = Counter(info.role for info in case.source.modules)
    kinds = ("linear", "router", "expert", "embedding", "head")
    assert tuple(found[kind] for kind in kinds) == ROLES[case.name]
    for info in case.source.modules:
        leaf = info.path.rpartition(".")[2]
        assert (info.role == "head") == (leaf == "lm_head")
        assert (info.role == "embedding") == leaf.startswith("embed_tokens")
        assert (info.role == "expert") == (len(info.shape) == 3)
        assert (info.role == "router") == (info.path.endswith((".gate", ".router.proj")))


def test_the_head_is_the_untied_one_or_the_tied_embedding(case):
    has_head = ROLES[case.name][-1] == 1
    tied = [info.path.rpartition(".")[2] for info in case.source.modules if info.tied]
    assert tied == ([] if has_head else ["embed_tokens"])
    head = head_of(case.source.modules)
    assert head.shape == (VOCAB, 128)
    assert head.role == ("head" if has_head else "embedding")


def test_the_share_of_weights_read_for_a_token(case):
    for info in case.source.modules:
        if info.role == "expert":
            assert info.active == 0.5
        elif info.role == "embedding" and not info.tied:
            assert info.active == 1 / VOCAB
        else:
            assert info.active == 1.0


def test_modules_come_in_the_order_of_the_model(case):
    names = [info.path for info in case.source.modules]
    numbers = [int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name]
    assert numbers == sorted(numbers)
    assert "embed_tokens" in names[0]


def test_weights_are_those_of_the_tree_and_fresh_each_time(case):
    first, second = case.source.weights(), case.source.weights()
    shapes = {name: tuple(value.shape) for name, value in first.items()}
    assert shapes == case.source.parameters
    assert all(first[name] is not second[name] for name in first)


@pytest.mark.parametrize("batch", [None, 2])
def test_streamed_logits_are_those_of_the_whole_model(case, tmp_path, batch):
    stream = StreamedModel(case.source, case.tokens, tmp_path)
    stream.dtype = mx.float32
    stream.batch = batch or stream.batch
    stream.forward()
    stream.load_ends()
    outputs = [stream.fetch(link) for link in stream.outputs()]
    rows = [stream.logits(r, [o[r] for o in outputs]) for r in stream.batches()]
    found = np.concatenate([np.array(part) for part in rows])
    assert np.isfinite(found).all()
    assert np.abs(found - case.logits).max() <= 1e-4 * max(1.0, np.abs(case.logits).max())


def test_one_sequence_alone_is_streamed_alike(case, tmp_path):
    stream = StreamedModel(case.source, case.tokens[1:2], tmp_path)
    stream.dtype = mx.float32
    stream.forward()
    stream.load_ends()
    one = slice(0, 1)
    found = np.array(stream.logits(one, [stream.fetch(link) for link in stream.outputs()]))
    assert np.abs(found - case.logits[1:2]).max() <= 1e-4 * max(1.0, np.abs(case.logits).max())


class Gradients:
    """Adds up dL/dW of every matrix from what taps recorded."""

    def __init__(self, source):
        self.infos = {info.path: info for info in source.modules}
        self.of = {path: np.zeros(info.shape, np.float64) for path, info in self.infos.items()}

    def add(self, call):
        if call.g is None:
            return
        g = np.array(call.g).reshape(-1, call.g.shape[-1]).astype(np.float64)
        if call.lookup:
            np.add.at(self.of[call.path], np.array(call.x).reshape(-1), g)
            return
        x = np.array(call.x).reshape(-1, call.x.shape[-1]).astype(np.float64)
        if call.indices is None:
            self.of[call.path] += g.T @ x
            return
        x = np.repeat(x, len(g) // len(x), axis=0)
        for expert in range(len(self.of[call.path])):
            chosen = np.array(call.indices).reshape(-1) == expert
            self.of[call.path][expert] += g[chosen].T @ x[chosen]


def backpropagate(stream, probe, gradients):
    """All passes backwards: head, blocks, what comes before the blocks."""
    modules = stream.source.modules
    model = stream.load_ends()
    links = stream.outputs()
    outputs = [stream.fetch(link) for link in links]
    pulled = [[] for _ in links]
    head = HeadSlices(model, modules)
    for rows in stream.batches():
        total = [mx.zeros_like(o[rows]) for o in outputs]
        for start in range(0, VOCAB, 128):  # the last slice is a short one
            stop = min(start + 128, VOCAB)
            with head.slice(start, stop), tapped(model, "", [head.info]) as taps:
                taps.start(gradients=True)
                given = [o[rows] for o in outputs]
                _, grads = mx.vjp(
                    lambda *h, rows=rows: stream.logits(rows, h),
                    given,
                    [probe[rows, :, start:stop]],
                )
                mx.eval(grads)
                total = [a + b for a, b in zip(total, grads, strict=True)]
                (call,) = [c for c in taps.calls if not c.lookup]
                part = np.array(call.g).reshape(-1, stop - start).astype(np.float64).T
                x = np.array(call.x).reshape(part.shape[1], -1)
                gradients.of[call.path][start:stop] += part @ x
        for pieces, piece in zip(pulled, total, strict=True):
            pieces.append(piece)
    cotangents = {k: mx.concatenate(v) for k, v in zip(links, pulled, strict=True)}
    mx.eval(list(cotangents.values()))
    stream.drop_ends()

    for index in reversed(range(stream.num_blocks)):
        stream.backward(index, cotangents, lambda _, calls: [gradients.add(c) for c in calls])
    assert {link.kind for link in cotangents} == {"pro"}

    model = stream.load_ends()
    before = list(cotangents)
    outside = [info for info in modules if not info.path.startswith(f"{stream.prefix}.")]
    with tapped(model, "", outside) as taps:
        for rows in stream.batches():

            def run(zero, rows=rows):
                taps.start(gradients=True, anchor=zero)
                return stream.prologue(rows, before)

            seeds = [cotangents[link][rows] for link in before]
            _, grads = mx.vjp(run, [mx.array(0.0)], seeds)
            mx.eval(grads)
            for call in taps.calls:
                gradients.add(call)
    stream.drop_ends()


@pytest.mark.parametrize("batch", [1, 2])  # two sequences are enough for mlx-lm to sort experts
def test_gradients_from_taps_are_those_of_the_whole_model(case, tmp_path, batch):
    stream = StreamedModel(case.source, case.tokens, tmp_path)
    stream.dtype = mx.float32
    stream.batch = batch
    stream.forward()
    gradients = Gradients(case.source)
    backpropagate(stream, case.probe, gradients)
    for path, found in gradients.of.items():
        expected = np.array(case.gradients[f"{path}.weight"]).astype(np.float64)
        scale = np.linalg.norm(expected)
        assert scale > 0, path
        assert np.linalg.norm(found - expected) <= 1e-3 * scale, path


def test_what_a_forward_pass_records_are_the_inputs_of_the_matrices(case, tmp_path):
    seen = Counter()

    def visit(calls):
        for call in calls:
            assert call.g is None
            assert call.x.shape[-1] == case.source.parameters[f"{call.path}.weight"][-1]
            seen[call.path] += 1

    stream = StreamedModel(case.source, case.tokens, tmp_path)
    stream.batch = 1
    stream.forward(visit)
    inside = [i.path for i in case.source.modules if i.path.startswith(f"{stream.prefix}.")]
    assert seen == {path: NUM_SEQUENCES for path in inside}
