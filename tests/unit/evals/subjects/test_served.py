"""A model behind a URL: what is sent, what is read, and servers that are ill."""

import datetime
import email.utils
import socket
import time

import pytest

from optiq.configs import EvalConfig, ServedConfig
from optiq.errors import EngineFailure, UsageError
from optiq.evals.subjects.base import Ask
from optiq.evals.subjects.http import Retries
from optiq.evals.subjects.served import ServedModel
from optiq.evals.task import Chat, Choice, Continuation, ToolCall
from tests.unit.evals.subjects.stand_in import StandIn, echoed, message, ok, status

MODELS = ok({"data": [{"id": "m"}]})
ASK = Ask(Chat(({"role": "user", "content": "1 + 1?"},), 16))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLS = {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}


def server(chat=None, models=MODELS, **more):
    replies = {"models": models, "chat/completions": chat or message("2")}
    return StandIn(replies | {path.replace("_", "/"): reply for path, reply in more.items()})


def connect(stand_in, *, waits=None, config=None, key=None, **options):
    """The model, with pauses noted in place of being made."""
    served = ServedConfig(served=getattr(stand_in, "url", stand_in), **options)
    sleep = (waits if waits is not None else []).append
    return ServedModel(served, config or EvalConfig(), key, Retries(4, 1.0, sleep))


def answers(subject, *asks):
    found = dict(subject.answer(asks))
    return [found[index] for index in range(len(asks))]


def test_a_chat():
    with server(message("two", "length")) as s:
        subject = connect(s, key="secret")
        (answer,) = answers(subject, ASK)
        assert answer.response.text == "two"
        assert answer.response.truncated
        assert answer.response.num_tokens == 7
        assert answer.response.tool_calls is None
        body = s.bodies("chat/completions")[-1]
        assert body == {
            "model": "m",
            "messages": [{"role": "user", "content": "1 + 1?"}],
            "max_tokens": 16,
            "temperature": 0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        assert {h["Authorization"] for _, _, h in s.requests} == {"Bearer secret"}
        assert subject.info.name == f"m at {s.url}/v1"
        assert (subject.info.thinking, subject.info.sampling) == ("off", "greedy")
        assert "secret" not in repr(subject.info)


def test_sampling_is_the_servers_with_a_seed():
    with server() as s:
        subject = connect(s, config=EvalConfig(sampling="model"))
        answers(subject, Ask(ASK.prompt, key=2**40 + 5))
        body = s.bodies("chat/completions")[-1]
        assert "temperature" not in body
        assert body["seed"] == 5
        assert subject.info.sampling == "server"


@pytest.mark.parametrize(
    "reply",
    [
        message("<think>\nhm\n</think>\n\ntwo"),
        message("hm</think>two"),
        message("two", reasoning_content="hm"),
    ],
)
def test_reasoning_is_taken_out(reply):
    with server(reply) as s:
        (answer,) = answers(connect(s), ASK)
        assert answer.response.text == "two"
        assert answer.reasoning.strip() == "hm"


def test_tool_calls():
    asks = [Ask(Chat(ASK.prompt.messages, 16, tools=(TOOL,)))]
    with server(message(None, **CALLS)) as s:
        (answer,) = answers(connect(s), *asks)
        assert answer.response.tool_calls == (ToolCall("f", {"x": 1}),)
        assert s.bodies("chat/completions")[-1]["tools"] == [TOOL]
    broken = {"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}
    with server(message("", **broken)) as s:
        (answer,) = answers(connect(s), *asks)
        assert (answer.response.tool_calls, answer.response.text) == ((), "f({x)")


def test_a_continuation_is_cut_at_its_stop():
    reply = ok({"choices": [{"text": "4\nQ: next", "finish_reason": "length"}]})
    with server(completions=reply) as s:
        (answer,) = answers(connect(s), Ask(Continuation("2 + 2 =", 9, stop=("\nQ", "Z"))))
        assert answer.response.text == "4"
        assert not answer.response.truncated
        assert s.bodies("completions")[-1]["stop"] == ["\nQ", "Z"]


def test_choices_need_echoed_log_likelihoods():
    question = Choice("some words ", "and a question:", (" yes", " not this"))
    with server(completions=lambda body: echoed(body["prompt"])) as s:
        subject = connect(s)
        subject.check(question)
        (answer,) = answers(subject, Ask(question))
        assert answer.response.logprobs == (-4.0, -9.0)
        with pytest.raises(UsageError, match="--mmlu-form chat"):
            subject.check(Choice("a", "b", ("A", "B"), chat=True))
    unechoed = ok(
        {"choices": [{"text": "x", "logprobs": {"text_offset": [22], "token_logprobs": [-1.0]}}]}
    )
    for reply in (unechoed, ok({"choices": [{"text": "x"}]}), status(400), status(404)):
        with server(completions=reply) as s, pytest.raises(UsageError, match="leave mmlu out"):
            connect(s).check(question)


def test_requests_run_side_by_side_and_answers_keep_their_question():
    def reply(body):
        return message(body["messages"][0]["content"])

    asks = [Ask(Chat(({"role": "user", "content": f"{n}"},), 4)) for n in range(20)]
    with server(reply) as s:
        s.delay_s = 0.02
        found = answers(connect(s, concurrency=4), *asks)
        assert [a.response.text for a in found] == [f"{n}" for n in range(20)]
        assert s.most == 4


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_servers_are_asked_again_with_growing_pauses(code):
    waits = []
    with server([message("ok"), status(code), status(code), message("2")]) as s:
        (answer,) = answers(connect(s, waits=waits), ASK)
        assert answer.response.text == "2"
    assert len(waits) == 2
    assert 1 <= waits[0] <= 1.25
    assert 2 <= waits[1] <= 2.5


def test_retry_after_is_honoured():
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    date = email.utils.format_datetime(when, usegmt=True)
    replies = [status(429, retry_after="30"), status(429, retry_after=date)]
    replies += [status(429, retry_after="soon"), message("2")]
    waits = []
    with server([message("ok"), *replies]) as s:
        answers(connect(s, waits=waits), ASK)
    assert waits[0] == 30
    assert 55 <= waits[1] <= 60
    assert 4 <= waits[2] <= 5


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(429, "too many"), r"answers 429 \(too many\), after 4 attempts"),
        (status(500, "broken"), r"answers 500 \(broken\)"),
        ((200, {}, b"<html>"), "no JSON object"),
        ((200, {}, b"[1]"), "no JSON object"),
        (ok({"choices": []}), "another form than OpenAI's"),
        (ok({"choices": [{"message": None}]}), "another form than OpenAI's"),
    ],
)
def test_a_server_that_stays_ill_is_an_engine_failure(reply, words):
    with server([message("ok"), reply]) as s, pytest.raises(EngineFailure, match=words):
        answers(connect(s), ASK)


def test_a_dead_server_is_an_engine_failure():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    waits = []
    with pytest.raises(EngineFailure, match="cannot be reached .* run the same command again"):
        connect(url, waits=waits)
    assert len(waits) == 3


def test_a_slow_server_is_an_engine_failure():
    with server() as s:
        subject = connect(s, timeout=0.1)
        s.delay_s = 0.4
        start = time.perf_counter()
        with pytest.raises(EngineFailure, match="does not answer in time"):
            answers(subject, ASK)
        assert time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("code", "words"), [(401, "OPTIQ_API_KEY"), (403, "OPTIQ_API_KEY"), (404, "--served-model")]
)
def test_a_wrong_key_or_name(code, words):
    with server([message("ok"), status(code)]) as s, pytest.raises(UsageError, match=words):
        answers(connect(s), ASK)


def test_a_redirect_is_not_followed():
    reply = (302, {"location": "http://elsewhere"}, b"")
    with server(models=reply) as s, pytest.raises(UsageError, match="http://elsewhere"):
        connect(s)


def test_a_refused_question_fails_alone_unless_it_is_the_first():
    def reply(body):
        return status(400, "too long") if "long" in str(body) else message("2")

    long = Ask(Chat(({"role": "user", "content": "long"},), 4))
    with server(reply) as s:
        subject = connect(s, concurrency=1)
        first, second = answers(subject, ASK, long)
        assert first.response.text == "2"
        assert second.response is None
        assert "400: too long" in second.failure
        with pytest.raises(UsageError, match="too long"):
            answers(subject, long, ASK)


def test_a_server_that_knows_no_thinking_switch():
    def reply(body):
        refused = "chat_template_kwargs" in body
        return status(400, "unknown field") if refused else message("2")

    with server(reply) as s:
        subject = connect(s)
        assert subject.info.thinking == "server"
        assert answers(subject, ASK)[0].response.text == "2"
        with pytest.raises(UsageError, match="leave out --thinking"):
            connect(s, config=EvalConfig(thinking=True))


def test_a_server_without_chat_has_no_template():
    with server(status(404)) as s:
        assert not connect(s).has_template
    with server(status(400, "this model has no chat template")) as s:
        assert not connect(s).has_template
    with server() as s:
        assert connect(s).has_template


def test_names_of_models():
    two = ok({"data": [{"id": "a"}, {"id": "b"}]})
    with server(models=two) as s:
        with pytest.raises(UsageError, match="2 models .a, b.; choose"):
            connect(s)
        with pytest.raises(UsageError, match="not 'c'"):
            connect(s, served_model="c")
        connect(s, served_model="b")
        assert s.bodies("chat/completions")[-1]["model"] == "b"
    with server(models=status(404)) as s:
        connect(s, served_model="b")
        with pytest.raises(UsageError, match="give --served-model"):
            connect(s)


def test_options_of_a_url():
    with pytest.raises(UsageError, match="no http"):
        ServedConfig(served="localhost:80")
    with pytest.raises(UsageError, match="give the URL"):
        ServedConfig(served_model="m")
    with pytest.raises(UsageError, match="--concurrency"):
        ServedConfig(served="http://x", concurrency=0)
