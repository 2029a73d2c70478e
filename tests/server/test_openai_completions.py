"""/v1/completions against a scripted engine."""

import json

import pytest

from optiq.engine.events import ReasoningDelta, Usage
from optiq.engine.grammar import Grammar
from optiq.errors import EngineFailure, RequestRejected
from optiq.server.jobs import Piece, Said, Started, Written
from tests.server.apps_openai import client_of
from tests.server.fake import FakeService, ended, piece, said

PATH = "/v1/completions"


def ask(service=None, prompt="Hi", **rest):
    service = service or FakeService()
    return client_of(service).post(PATH, json={"prompt": prompt, **rest})


def chunks_of(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def echoing(job):
    """An engine that repeats the number of its prompt, and reads it as one token a letter."""
    if isinstance(job.prompt, str):
        letters = tuple(piece(letter) for letter in job.prompt)
    else:
        letters = tuple(Piece(token, bytes([token]), -1.0) for token in job.prompt)
    first, *rest = letters
    prompt = (Piece(first.token, first.data), *rest)
    answers = [said(f"<{len(prompt)}.{i}>", i) for i in range(job.choices)]
    ends = [ended("length", i, usage=Usage(len(prompt), 1)) for i in range(job.choices)]
    started = Started(len(prompt), prompt if job.echo else ())
    return (started, *[reply for answer in answers for reply in answer], *ends)


def test_a_text():
    body = ask().json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["total_tokens"] == 5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "Ho"], ["Hi", "Ho"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_prompts(prompt, expected):
    service = FakeService()
    assert ask(service, prompt).status_code == 200
    assert [job.prompt for job in service.jobs] == expected


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [True], [-1], [[1], "a"], {}, 5, None, [1.5], ["a"] * 257]
)
def test_prompts_that_are_none(prompt):
    service = FakeService()
    response = ask(service, prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")
    assert service.jobs == []


def test_answers_to_several_prompts_are_numbered_through():
    body = ask(FakeService(echoing), ["a", "bb"], n=2).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "<1.0>"),
        (1, "<1.1>"),
        (2, "<2.0>"),
        (3, "<2.1>"),
    ]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 4


def test_answers_to_several_prompts_are_streamed():
    options = {"include_usage": True}
    chunks = chunks_of(
        ask(FakeService(echoing), ["a", "bb"], n=2, stream=True, stream_options=options)
    )
    texts = dict.fromkeys(range(4), "")
    ends = {}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "<1.0>", 1: "<1.1>", 2: "<2.0>", 3: "<2.1>"}
    assert ends == dict.fromkeys(range(4), "length")
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 7


def test_log_probabilities_are_in_the_older_shape():
    top = ((7, b"the", -0.1), (8, b"a", -2.0), (9, b"an", -3.0))
    script = (
        Started(1),
        Written(0, (Piece(8, b"a", -2.5, top), Piece(5, b"\xe2\x82", -0.5, ()))),
        Written(0, (Piece(6, b"\xac!", -0.25, ((6, b"\xac!", -0.25),)),)),
        *said("a\u20ac!")[1:],
        ended(),
    )
    (choice,) = ask(FakeService(script), logprobs=2).json()["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 1],
        "tokens": ["a", "bytes:\\xe2\\x82", "bytes:\\xac\\x21"],
        "token_logprobs": [-2.5, -0.5, -0.25],
        "top_logprobs": [
            {"a": -2.0, "the": -0.1},
            {"bytes:\\xe2\\x82": -0.5},
            {"bytes:\\xac\\x21": -0.25},
        ],
    }
    service = FakeService()
    ask(service, logprobs=0)
    assert service.jobs[0].sampling == {"logprobs": True, "max_tokens": 16}


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(prompt, stream):
    """What lm-eval reads: the prompt's tokens first, of which the first has no probability."""
    response = ask(FakeService(echoing), prompt, echo=True, logprobs=1, max_tokens=1, stream=stream)
    if stream:
        parts = [chunk["choices"][0] for chunk in chunks_of(response)]
    else:
        parts = response.json()["choices"]
    logprobs = {
        key: [one for part in parts for one in part["logprobs"][key]]
        for key in parts[0]["logprobs"]
    }
    assert "".join(part["text"] for part in parts) == "ab<2.0>"
    assert logprobs["tokens"] == ["a", "b", "<2.0>"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    assert logprobs["top_logprobs"][2] == {"<2.0>": -0.5}


def test_a_bos_has_no_place_in_an_echoed_text():
    bos = Piece(2, b"<bos>")
    script = (Started(2, (bos, piece("Hi"))), *said("!"), ended())
    (choice,) = ask(FakeService(script), "Hi", echo=True, logprobs=0).json()["choices"]
    assert choice["text"] == "Hi!"
    assert choice["logprobs"]["text_offset"] == [0, 0, 2]


def test_a_prompt_can_be_scored_alone():
    script = (Started(1, (piece("Hi"),)), ended("length"))
    service = FakeService(script)
    (choice,) = ask(service, echo=True, max_tokens=0, logprobs=1).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert service.jobs[0].sampling["max_tokens"] == 0
    assert service.jobs[0].echo


def test_settings_reach_the_engine():
    service = FakeService()
    form = {"type": "choice", "choices": ["a"]}
    ask(service, response_format=form, temperature=0, n=2, best_of=2, logit_bias={"3": 1})
    (job,) = service.jobs
    assert job.grammar == Grammar("choice", ("a",))
    assert job.choices == 2
    assert job.sampling == {"temperature": 0, "logit_bias": {3: 1}, "max_tokens": 16}


def test_null_is_not_given():
    names = ["max_tokens", "temperature", "n", "best_of", "echo", "logprobs", "stop", "suffix"]
    service = FakeService()
    assert ask(service, **dict.fromkeys(names)).status_code == 200
    ask(service)
    assert service.jobs[0] == service.jobs[1]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_faults_name_the_parameter(given, param):
    response = ask(**given)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_text_of_a_raw_prompt_is_all_that_was_written():
    script = (Started(1), Said(0, ReasoningDelta("hm")), *said("Yes"), ended())
    assert ask(FakeService(script)).json()["choices"][0]["text"] == "hmYes"


def test_one_prompt_too_many_takes_back_the_others():
    service = FakeService()

    def full(_):
        if service.streams:
            return RequestRejected("full", http_status=429, retry_after_s=1)
        return (Started(1), ended())

    service.script = full
    assert ask(service, ["a", "b"]).status_code == 429
    assert service.streams[0].cancelled


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_that_fails_ends_all(stream):
    service = FakeService()

    def faulty(job):
        rest = [EngineFailure("broken")] if job.prompt == "b" else [*said("x"), 30, ended()]
        return (Started(1), *rest)

    service.script = faulty
    response = ask(service, ["a", "b"], stream=stream)
    if stream:
        assert chunks_of(response)[-1]["error"]["message"] == "broken"
    else:
        assert response.status_code == 500
    assert all(one.cancelled for one in service.streams)
