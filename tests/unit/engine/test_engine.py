"""`optiq.load`: prompts, images, events, logits, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import optiq
from optiq.backend import mx
from optiq.engine import reading
from optiq.engine.engine import EngineOptions
from optiq.engine.events import Finished, TextDelta, Tokens, collect
from optiq.engine.loading import open_target
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Notice
from tests.gemma4 import (
    ASSISTANT,
    INFO,
    LIMIT,
    SUPPRESSED,
    TARGET,
    TINY,
    apart,
    inputs,
    reference,
    stored_patches,
)
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def engine():
    return optiq.load(TARGET)


@pytest.fixture(scope="module")
def artifact(gemma_release):
    return optiq.load(gemma_release.path)


def picture(name="chat_0.png"):
    return TINY / "images" / name


# -- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(INFO["text"]))
def test_logits_of_text_are_those_of_pytorch(engine, artifact, name):
    ids, _ = inputs(f"text/{name}")
    expected = reference()[f"text/{name}/logits"]
    assert engine.dtype == mx.float32
    for each in (engine, artifact):
        assert apart(each.logits(ids), expected) <= LIMIT


@pytest.mark.parametrize("name", list(INFO["image"]))
def test_logits_after_images_are_those_of_pytorch(engine, artifact, name):
    ids, _ = inputs(f"image/{name}")
    images = [tuple(patches) for patches in stored_patches(name)]
    expected = reference()[f"image/{name}/logits"]
    for each in (engine, artifact):
        assert apart(each.logits(ids, images), expected) <= LIMIT


def test_another_mask_gives_other_logits():
    ids, _ = inputs("image/two_long")
    images = [tuple(patches) for patches in stored_patches("two_long")]
    causal = optiq.load(TARGET, options=EngineOptions(image_mask="causal")).logits(ids, images)
    assert apart(causal[-1], reference()["image/two_long/last_logits_causal"]) <= LIMIT
    assert apart(causal[-1], reference()["image/two_long/logits"][-1]) > 0.3


@pytest.mark.parametrize("ids", [[], [512], [-1]])
def test_token_ids_are_checked(engine, ids):
    with pytest.raises(UsageError, match="token ids must be 0 to 511"):
        engine.logits(ids)


# -- writing -------------------------------------------------------------------------------------


def test_events_add_up_to_the_result(engine):
    settings = {"temperature": 0, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    events = list(engine.generate("Hello, MLX!", **settings))
    assert isinstance(events[-1], Finished)
    result = engine.generate("Hello, MLX!", **settings).result()
    assert result.text == "".join(e.text for e in events if isinstance(e, TextDelta))
    assert list(result.token_ids) == [t for e in events if isinstance(e, Tokens) for t in e.ids]
    assert result.usage == events[-1].usage
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (9, 9)
    assert result.finish_reason == "length"
    assert len(result.logprobs) == 9
    assert not set(SUPPRESSED) & set(result.token_ids)


def test_token_ids_are_taken_as_they_are(engine):
    settings = {"seed": 3, "max_tokens": 9}
    ids = engine.prompts.raw("Hello").tokens
    found = engine.generate(ids, **settings).result()
    assert found == engine.generate("Hello", **settings).result()
    no_bos = engine.generate(list(ids[1:]), **settings).result()
    assert no_bos.usage.prompt_tokens == len(ids) - 1
    for wrong in ([512], [3, -1]):
        with pytest.raises(UsageError, match="token ids must be 0 to 511"):
            engine.generate(wrong)


def test_an_image_among_token_ids(artifact):
    encoded = artifact.tokenizer.encode("<|image|>What?", add_special_tokens=False)
    ids = [artifact.tokenizer.bos_token_id, *encoded]
    settings = {"temperature": 0, "max_tokens": 6}
    found = artifact.generate(ids, [picture()], **settings).result()
    assert found == artifact.generate("<|image|>What?", [picture()], **settings).result()
    with pytest.raises(UsageError, match="1 image markers for 0 images"):
        artifact.generate(ids)


def test_the_answer_goes_on_where_the_last_message_ends(tiny_llama):
    engine = optiq.load(tiny_llama)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell, "
    settings = {"temperature": 0, "max_tokens": 6}
    found = engine.generate(messages, continue_final=True, **settings).result()
    assert found.token_ids == engine.generate(text, **settings).result().token_ids
    with pytest.raises(UsageError, match="continue_final need messages"):
        engine.generate(text, continue_final=True)


def test_a_result_holds_what_was_iterated_before(engine):
    settings = {"seed": 3, "max_tokens": 9}
    generation = engine.generate("Hello", **settings)
    next(generation)
    next(generation)
    assert generation.result() == engine.generate("Hello", **settings).result()


def test_answers_share_passes_and_are_those_of_one_at_a_time(engine):
    prompts = ["Hello", "The weather in Oslo", "A"]
    alone = [engine.generate(p, seed=1, max_tokens=12).result().token_ids for p in prompts]
    begun = [engine.generate(p, seed=1, max_tokens=12) for p in prompts]
    assert [each.result().token_ids for each in begun] == alone


def test_who_takes_the_steps_himself_gets_the_same_events(engine):
    prompts = ["hello", "a longer text to go on with"]
    expected = [engine.generate(p, max_tokens=9, seed=3).result() for p in prompts]
    answers = [engine.generate(p, max_tokens=9, seed=3) for p in prompts]
    seen = [[], []]
    assert not engine.idle
    while not engine.idle:
        engine.step()
        for events, answer in zip(seen, answers, strict=True):
            events += answer.pending()
    assert all(answer.done for answer in answers)
    assert [collect(events).text for events in seen] == [one.text for one in expected]
    assert [collect(events).token_ids for events in seen] == [list(o.token_ids) for o in expected]


def test_cancel(engine):
    generation = engine.generate("Hello", seed=0)
    for _ in range(3):
        next(generation)
    generation.cancel()
    result = generation.result()
    assert result.finish_reason == "cancelled"
    assert 0 < result.usage.completion_tokens < 10


def test_an_answer_that_nobody_wants_any_more_takes_no_time(engine):
    engine.generate("Hello", seed=0)
    engine.generate("Hello", max_tokens=1).result()
    assert engine._loop.idle


def test_a_stop_string_over_tokens(engine):
    plain = engine.generate("Hello, MLX!", seed=4, max_tokens=30).result()
    text = plain.text
    at = next(i for i in range(4, len(text) - 3) if text.find(text[i : i + 3]) == i)
    result = engine.generate(
        "Hello, MLX!", seed=4, max_tokens=30, stop=[text[at : at + 3], "never there"]
    ).result()
    assert result.text == text[:at]
    assert (result.finish_reason, result.stop) == ("stop", text[at : at + 3])
    assert result.token_ids == plain.token_ids[: len(result.token_ids)]


def test_unstated_sampling_is_the_checkpoint_s(engine, tiny_llama):
    """top_k 64 and top_p 0.95 cut this off; a llama that says nothing draws from all."""
    given = engine.generate("Hello", seed=2, max_tokens=20, top_k=64, top_p=0.95, temperature=1)
    assert engine.generate("Hello", seed=2, max_tokens=20).result() == given.result()
    other = engine.generate("Hello", seed=2, max_tokens=20, top_k=0, top_p=1.0).result()
    assert other != given.result()
    llama = optiq.load(tiny_llama)
    plain = llama.generate("Hello", seed=2, max_tokens=20).result()
    full = llama.generate("Hello", seed=2, max_tokens=20, temperature=1, top_p=1.0, top_k=0)
    assert plain == full.result()


def test_unstated_length_is_the_rest_of_the_context(tmp_path):
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=40, eos_token_id=None)
    llama = optiq.load(folder)
    result = llama.generate("Hello", temperature=0).result()
    assert result.finish_reason in {"length", "stop"}
    assert result.usage.prompt_tokens + result.usage.completion_tokens <= 40
    longest = llama.generate("Hello", temperature=0, max_tokens=1000).result()
    assert longest == result
    with pytest.raises(UsageError, match="context of the model is 40"):
        llama.generate("Hello" * 10)


def test_bos_is_there_once(engine):
    with_bos = engine.generate("<bos>Hello", temperature=0, max_tokens=1).result()
    without = engine.generate("Hello", temperature=0, max_tokens=1).result()
    assert with_bos.usage.prompt_tokens == without.usage.prompt_tokens


def test_choices_are_those_of_separate_answers(engine):
    settings = {"seed": 3, "max_tokens": 9, "logprobs": True}
    found = engine.generate_choices("Hello", choices=3, **settings)
    answers = [each.result() for each in found]
    assert len({answer.token_ids for answer in answers}) > 1
    for choice, answer in enumerate(answers):
        single = engine.generate("Hello", choice=choice, **settings).result()
        assert answer.token_ids == single.token_ids
        assert answer.text == single.text
    with pytest.raises(UsageError, match="0 answers"):
        engine.generate_choices("Hello", choices=0)


# -- pasts that are kept, and memory -------------------------------------------------------------


def test_a_kept_past_changes_nothing_but_the_usage(artifact, gemma_release):
    """Text and images; a picture goes through the embedder once."""
    options = EngineOptions(kv_memory=1 << 26, prefix_memory=None)
    keeping = optiq.load(gemma_release.path, options=options)
    settings = {"temperature": 0, "max_tokens": 6}
    seen = []
    real = keeping.prompts.vision.features
    keeping.prompts.vision.features = lambda images: seen.append(1) or real(images)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look"}]}]
    cached = []
    for picked, more in [("chat_0.png", 0), ("chat_0.png", 1), ("late_0.png", 0)]:
        name = picture(picked)
        asked = [*turns, *NEXT[: 2 * more]]
        found = keeping.generate(asked, [name], **settings).result()
        cold = artifact.generate(asked, [name], **settings).result()
        assert found.token_ids == cold.token_ids
        cached.append(found.usage.cached_tokens)
        again = keeping.generate(asked, [name], **settings).result()
        assert again.token_ids == cold.token_ids
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert cached[1] > 20 > cached[2]
    assert len(seen) == 2


NEXT = [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And now?"}]


def test_a_retry_of_the_last_turn_hits_before_it(tmp_path):
    folder = tiny_checkpoint(tmp_path, "gemma3_text")
    engine = optiq.load(folder, options=EngineOptions(kv_memory=1 << 26, prefix_memory=None))
    first = [{"role": "user", "content": "Z" * 90}, *NEXT]
    used = engine.generate(first, max_tokens=2).result().usage
    retry = [*first[:-1], {"role": "user", "content": "Something else"}]
    found = engine.generate(retry, max_tokens=2).result().usage
    assert used.cached_tokens == 0
    assert 90 < found.cached_tokens < used.prompt_tokens - 8


def test_what_does_not_fit_into_memory_is_refused_at_once(tiny_llama):
    engine = optiq.load(tiny_llama, options=EngineOptions(kv_memory=1 << 19))
    longest = engine._loop.longest
    assert 0 < longest < 512
    found = engine.generate([5] * (longest - 3), temperature=0, logit_bias={258: -100}).result()
    assert found.usage.completion_tokens == 3
    for prompt, count in (([5] * (longest - 3), 4), ([5] * (longest + 1), None)):
        with pytest.raises(UsageError, match="give more kv_memory"):
            engine.generate(prompt, max_tokens=count)
    with pytest.raises(UsageError, match="kv_memory is -1"):
        EngineOptions(kv_memory=-1)


# -- texts that are read -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "mistral3"])
def test_embeddings_are_the_mean_of_the_states(tmp_path, family, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 100)
    engine = optiq.load(tiny_checkpoint(tmp_path, family))
    text = "Hello <|im_end|> there! " * 10
    bos = engine.prompts.raw("A").tokens[:-1]
    plain = [engine.prompts.raw(t).tokens[len(bos) :] for t in ("Hello <", "|im_end|> there! ")]
    tokens = [*bos, *(plain[0] + plain[1]) * 10]
    vectors = engine.embed([text, tokens, [*tokens, 258], "x"])
    cache = engine._target.make_cache()
    states = np.array(engine._target.hidden(mx.array([tokens]), cache)[0])
    logits = engine._target.logits(mx.array(states)) if family == "gemma4_text" else None
    mean = states[len(bos) :].mean(axis=0)
    for vector in vectors[:2]:
        assert vector.dtype == np.float32
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    assert all(np.linalg.norm(v) == pytest.approx(1, abs=1e-6) for v in vectors)
    assert vectors[2] == pytest.approx(vectors[1], abs=1e-5)
    assert logits is None or apart(logits, np.array(engine.logits(tokens))) < LIMIT
    with pytest.raises(UsageError, match="special"):
        engine.embed(["", "Hello"])
    with pytest.raises(UsageError, match="room for 512"):
        engine.embed([[5] * 600])


def test_prompt_logprobs_are_those_of_the_logits(engine):
    ids, _ = inputs("text/short")
    ids = (ids * 60)[:600]
    logits = np.array(engine.logits(ids)).astype(np.float64)
    logits[:, list(SUPPRESSED)] = -np.inf
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = engine.prompt_logprobs(ids, top=2)
    assert found[0] is None
    assert len(found) == len(ids)
    for row, entry, token in zip(logits, found[1:], ids[1:], strict=False):
        assert entry.token == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        assert [p for _, p in entry.top] == pytest.approx(np.sort(row)[::-1][:2], abs=1e-3)
    steps = engine.prompt_logprob_steps(ids)
    answer = engine.generate("Hello", max_tokens=3, seed=0)
    next(steps)
    assert answer.result().usage.completion_tokens <= 3
    with pytest.raises(UsageError, match="top is 21"):
        engine.prompt_logprobs(ids, top=21)


# -- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", [None, ASSISTANT, "ngram"])
def test_an_image_from_file_to_text(drafter, gemma_release):
    """All ways to give it, with and without a drafter."""
    engine = optiq.load(gemma_release.path, drafter, EngineOptions(num_drafts=3))
    settings = {"temperature": 0, "max_tokens": 16}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ]
    found = engine.generate(messages, [picture()], **settings).result()
    assert found.usage.prompt_tokens == INFO["image"]["chat"]["length"]
    held = json.loads(json.dumps(messages))
    held[0]["content"][0]["image"] = str(picture())
    with Image.open(picture()) as opened:
        others = [
            engine.generate(messages, [opened], **settings).result(),
            engine.generate(held, **settings).result(),
        ]
    assert {other.token_ids for other in others} == {found.token_ids}
    assert (
        found.token_ids
        == optiq.load(TARGET).generate(messages, [picture()], **settings).result().token_ids
    )
    blind = engine.generate("What is it?", **settings).result()
    assert blind.token_ids != found.token_ids


def test_detail_changes_the_soft_tokens(artifact):
    prompt = "<|image|>What?"
    sizes = [
        artifact.generate(prompt, [picture()], max_tokens=1, image_detail=wanted).result()
        for wanted in (6, "auto")
    ]
    assert sizes[0].usage.prompt_tokens < sizes[1].usage.prompt_tokens
    with pytest.raises(UsageError, match="soft tokens an image are not possible"):
        artifact.generate(prompt, [picture()], image_detail=10**6)


@pytest.mark.parametrize(
    ("prompt", "count"), [("no marker", 1), ("<|image|>", 0), ("<|image|><|image|>", 1)]
)
def test_as_many_markers_as_images(artifact, prompt, count):
    with pytest.raises(UsageError, match="image"):
        artifact.generate(prompt, [picture()] * count)


def test_bad_images(artifact, tmp_path):
    text = tmp_path / "a.png"
    text.write_text("no picture")
    cut = tmp_path / "b.png"
    cut.write_bytes(picture().read_bytes()[:60])
    empty = tmp_path / "c.png"
    empty.touch()
    for given in (text, cut, empty, tmp_path / "nowhere.png", "https://example.com/a.png"):
        with pytest.raises(UsageError):
            artifact.generate("<|image|>", [given])


def test_an_artifact_without_its_sidecar_says_so(gemma_release, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(gemma_release.path, folder)
    (folder / "optiq_vision.safetensors").unlink()
    blind = optiq.load(folder)
    with pytest.raises(UsageError, match="reads text alone"):
        blind.generate("<|image|>", [picture()])
    assert blind.generate("Hello", max_tokens=1).result().token_ids


def test_images_for_a_model_without_a_tower(tiny_llama):
    with pytest.raises(UnsupportedModel, match="tower not supported"):
        optiq.load(tiny_llama).generate("Look", [picture()])


# -- loading -------------------------------------------------------------------------------------


def test_packed_weights_where_dense_ones_do_not_fit(gemma_release):
    notices = []
    whole = open_target(gemma_release.path, emit=notices.append)
    assert notices == [Notice(f"weights are dense float32, {whole.size_bytes / 1e9:.2f} GB")]
    limit = f"{whole.size_bytes - 1}"
    packed = open_target(gemma_release.path, memory_limit=limit, emit=notices.append)
    assert packed.size_bytes < whole.size_bytes / 2
    assert "stay packed" in notices[-1].text
    engine = optiq.load(gemma_release.path, options=EngineOptions(memory_limit=limit))
    ids, _ = inputs("text/short")
    assert apart(engine.logits(ids), reference()["text/short/logits"]) <= LIMIT
    with pytest.raises(UsageError, match="are allowed"):
        open_target(gemma_release.path, memory_limit="1000")


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "gemma4_text", "mistral3"])
def test_other_families(tmp_path, family):
    folder = tiny_checkpoint(tmp_path, family)
    engine = optiq.load(folder)
    ids = [5, 6, 7, 8, 9] * 6
    logits = engine.logits(ids)
    assert logits.shape == (30, 320)
    assert np.isfinite(np.array(logits)).all()
    settings = {"temperature": 0, "max_tokens": 8}
    plain = engine.generate([{"role": "user", "content": "Hi"}], **settings).result()
    drafted = optiq.load(folder, folder).generate([{"role": "user", "content": "Hi"}], **settings)
    assert drafted.result().token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"heat": 1}, "heat"),
        ({"logit_bias": {600: 1.0}}, "600"),
        ({"thinking": True}, "need messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(engine, settings, words):
    with pytest.raises(UsageError, match=words):
        engine.generate("Hello", **settings)
