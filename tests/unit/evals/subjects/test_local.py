"""A tiny model in process against plain forward passes of the whole model."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from optiq.artifacts import QuantOption
from optiq.backend import mx
from optiq.configs import EvalConfig
from optiq.errors import EngineFailure, UsageError
from optiq.evals.subjects.base import Ask
from optiq.evals.subjects.local import LocalModel
from optiq.evals.task import Chat, Choice, Continuation
from optiq.events import no_emit
from optiq.models.load import open_quantized, open_source
from optiq.quant.baseline import write_uniform
from tests.tiny import tiny_checkpoint, write_tokenizer

SHARED = "The quick brown fox jumps over the lazy dog, again and again.\n"
OPTIONS = (" A", " B", " CC", "D")
QUESTIONS = [Choice(SHARED, f"q{'x' * n}:", OPTIONS) for n in (1, 5, 9)]
QUESTIONS += [Choice("", "no beginning", ("A", "B")), Choice(SHARED, "", ("A", "BC"))]
TURN = {"role": "user", "content": "Hello"}


def dense(path):
    model = open_quantized(path).model()
    model.set_dtype(mx.float32)
    return model


def log_probabilities(model, ids):
    logits = np.array(model(mx.array([ids])))[0].astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def whole(model, tokenizer, bos, text, option):
    """Log-likelihood of an option from one pass over all its text."""
    ids = [*bos, *tokenizer.encode(text + option, add_special_tokens=False)]
    cut = len(bos) + len(tokenizer.encode(text, add_special_tokens=False))
    values = log_probabilities(model, ids)
    return sum(values[i - 1, ids[i]] for i in range(cut, len(ids)))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "qwen3_moe"])
def test_likelihoods_are_those_of_whole_texts(tmp_path, family, share):
    path = tiny_checkpoint(tmp_path, family)
    source = open_source(str(path))
    subject = LocalModel(path, EvalConfig(batch_size=3), share_prefix=share)
    found = dict(subject.answer([Ask(prompt) for prompt in QUESTIONS]))
    bos = [256] if family.startswith("gemma") else []
    assert subject.info.bos == ("<|endoftext|>" if bos else None)
    model = dense(path)
    for index, prompt in enumerate(QUESTIONS):
        text = prompt.shared + prompt.own
        wanted = [whole(model, source.tokenizer, bos, text, o) for o in prompt.options]
        assert found[index].response.logprobs == pytest.approx(wanted, abs=1e-4)


def test_likelihoods_of_a_quantized_model_use_dense_float32(quantized):
    subject = LocalModel(quantized.bad, EvalConfig())
    ((_, answer),) = subject.answer([Ask(QUESTIONS[0])])
    tokenizer = open_quantized(quantized.bad).tokenizer
    text = QUESTIONS[0].shared + QUESTIONS[0].own
    wanted = [whole(dense(quantized.bad), tokenizer, [], text, o) for o in OPTIONS]
    assert answer.response.logprobs == pytest.approx(wanted, abs=1e-4)
    assert subject.info.bpw == pytest.approx(3.5)
    assert subject.info.size_bytes == (quantized.bad / "model.safetensors").stat().st_size


def test_the_shared_beginning_is_read_once(tiny_llama):
    subject = LocalModel(tiny_llama, EvalConfig(batch_size=2))
    read = []

    class Counting:
        def __init__(self, model):
            self.model = model
            self.layers = model.layers

        def __call__(self, tokens, **keywords):
            read.append(tokens.size)
            return self.model(tokens, **keywords)

    questions = [Choice(SHARED, f"{n}?", ("A", "B")) for n in range(6)]
    subject._opened = dataclasses.replace(subject._opened, tree=Counting(subject._opened.tree))
    list(subject.answer([Ask(prompt) for prompt in questions]))
    assert sum(read) == len(SHARED) + 6 * 2
    read.clear()
    list(subject.answer([Ask(prompt) for prompt in questions]))
    assert sum(read) == 6 * 2


def test_a_chat_choice_goes_through_the_template(tiny_llama):
    prompt = Choice(SHARED, "q:", ("A", "B"), chat=True)
    subject = LocalModel(tiny_llama, EvalConfig())
    ((_, answer),) = subject.answer([Ask(prompt)])
    text = f"<|im_start|>user\n{SHARED}q:<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = open_source(str(tiny_llama)).tokenizer
    wanted = [whole(dense(tiny_llama), tokenizer, [], text, o) for o in ("A", "B")]
    assert answer.response.logprobs == pytest.approx(wanted, abs=1e-4)
    assert len(subject._choice(prompt).prefix) == len(tokenizer.encode(text.partition("q:")[0]))


def test_an_option_that_is_no_token_of_its_own(tiny_llama):
    with pytest.raises(UsageError, match="no token of its own"):
        list(LocalModel(tiny_llama, EvalConfig()).answer([Ask(Choice("", "a", ("", "b")))]))


def greedy(model, ids, count, stops=(258,)):
    """Tokens of a model that is run whole for every one of them."""
    out = []
    while len(out) < count:
        token = int(log_probabilities(model, ids + out)[-1].argmax())
        if token in stops:
            break
        out.append(token)
    return out


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_answers_are_greedy_whatever_the_batch(tmp_path, family):
    path = tiny_checkpoint(tmp_path, family)
    subject = LocalModel(path, EvalConfig(batch_size=2))
    turns = [{"role": "user", "content": "hi" * n} for n in (1, 9, 4)]
    asks = [Ask(Chat((turn,), 6 + n)) for n, turn in enumerate(turns)]
    asks.append(Ask(Continuation("abc def", 8)))
    found = dict(subject.answer(asks))
    tokenizer, model = open_source(str(path)).tokenizer, dense(path)
    for index, ask in enumerate(asks):
        ids = list(subject._ids(ask.prompt))
        wanted = greedy(model, ids, ask.prompt.max_tokens)
        response = found[index].response
        assert response.text == tokenizer.decode(wanted)
        cut = len(wanted) == ask.prompt.max_tokens
        assert response.truncated == cut
        assert response.num_tokens == len(wanted) + (not cut)


def test_a_stop_string_ends_the_answer(tiny_llama):
    subject = LocalModel(tiny_llama, EvalConfig())
    ((_, free),) = subject.answer([Ask(Continuation("abc def", 24))])
    text = free.response.text
    stop = text[10:12]
    ((_, cut),) = subject.answer([Ask(Continuation("abc def", 24, stop=(stop, "never")))])
    assert cut.response.text == text[: text.index(stop)]
    assert cut.response.num_tokens < 24
    assert not cut.response.truncated
    assert free.response.truncated


def sampling_model(folder, **settings):
    path = tiny_checkpoint(folder)
    given = {"do_sample": True, "temperature": 1.5, "top_k": 40, **settings}
    (path / "generation_config.json").write_text(json.dumps(given))
    return path


def test_sampled_answers_depend_on_their_key_alone(tmp_path):
    path = sampling_model(tmp_path, top_p=0.9)
    asks = [Ask(Chat(({"role": "user", "content": "hi" * n},), 8), key=n) for n in range(1, 5)]
    config = EvalConfig(sampling="model")

    def texts(asks, batch_size):
        subject = LocalModel(path, dataclasses.replace(config, batch_size=batch_size))
        found = dict(subject.answer(asks))
        return [found[i].response.text for i in range(len(asks))]

    together = texts(asks, 3)
    assert together == texts(asks, 1)
    assert together[::-1] == texts(asks[::-1], 3)
    other = [dataclasses.replace(ask, key=ask.key + 100) for ask in asks]
    assert texts(other, 3) != together
    assert LocalModel(path, config).info.sampling == "temperature 1.5, top_k 40, top_p 0.9"


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"temperature": -1}, {"top_k": "x"}])
def test_sampling_that_cannot_be_used(tmp_path, settings):
    path = sampling_model(tmp_path, **settings)
    with pytest.raises(UsageError, match="sampling|generation_config.json"):
        LocalModel(path, EvalConfig(sampling="model"))


def test_a_checkpoint_that_says_nothing_of_sampling(tiny_llama):
    with pytest.raises(UsageError, match="leave out --sampling model"):
        LocalModel(tiny_llama, EvalConfig(sampling="model"))


def test_functions_need_a_place_in_the_template(tiny_llama, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    prompt = Chat((TURN,), 4, tools=(tool,))
    with pytest.raises(UsageError, match="--bfcl-form prompt"):
        LocalModel(tiny_llama, EvalConfig()).check(prompt)
    path = tmp_path / "tools"
    shutil.copytree(tiny_llama, path)
    write_tokenizer(path, "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}")
    LocalModel(path, EvalConfig()).check(prompt)


def test_what_a_log_tells_of_a_model(tiny_llama, tmp_path):
    info = LocalModel(tiny_llama, EvalConfig(batch_size=5)).info
    assert (info.kind, info.batch_size, info.sampling, info.thinking) == (
        "local",
        5,
        "greedy",
        "off",
    )
    assert info.name == tiny_llama.name
    assert info.stop == ("<|im_end|>",)
    assert info.bpw == 16.0
    path = tmp_path / "bare"
    shutil.copytree(tiny_llama, path)
    write_tokenizer(path, template=None)
    bare = LocalModel(path, EvalConfig())
    assert not bare.has_template
    assert bare.info.template is None
    assert bare.info.fingerprint != info.fingerprint


def test_tokens_and_time_of_prompts(tiny_llama):
    subject = LocalModel(tiny_llama, EvalConfig(batch_size=2))
    assert subject.context == 512
    assert subject.num_tokens(Continuation("abcd", 4)) == 4
    assert subject.num_tokens(QUESTIONS[0]) == len(SHARED) + len("qx: CC")
    short, long = Continuation("ab", 8), Continuation("ab", 800)
    assert 0 < subject.seconds([Ask(short)]) < subject.seconds([Ask(long)])
    same = [Ask(prompt) for prompt in QUESTIONS[:2]]
    apart = [Ask(QUESTIONS[0]), Ask(Choice("b" * len(SHARED), "qxxxxx:", OPTIONS))]
    assert subject.seconds(same) < subject.seconds(apart)


def test_an_answer_never_goes_beyond_the_context(tmp_path):
    path = tiny_checkpoint(tmp_path, max_position_embeddings=16, eos_token_id=300)
    subject = LocalModel(path, EvalConfig())
    ((_, answer),) = subject.answer([Ask(Continuation("0123456789", 100))])
    assert answer.response.num_tokens <= 6


def test_a_broken_model(tmp_path, tiny_source):
    path = tmp_path / "broken"
    write_uniform(tiny_source, QuantOption("affine", 8, 32), path, no_emit)
    weights = mx.load(str(path / "model.safetensors"))
    name = "model.layers.1.mlp.down_proj.scales"
    weights[name] = weights[name] * float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    with pytest.raises(EngineFailure, match="not finite"):
        list(LocalModel(path, EvalConfig()).answer([Ask(QUESTIONS[0])]))
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError):
        list(LocalModel(path, EvalConfig()).answer([Ask(QUESTIONS[0])]))
