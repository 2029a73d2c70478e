"""The server as users start it, engine and all, with the tiny Gemma-4: what they may rely on."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading

import httpx
import pytest

import optiq
from optiq.upstream import tokenizer_of
from tests import gemma4
from tests.server.local import WAIT_S, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
        },
    },
}
CONTEXT = 512
LONG = "word " * CONTEXT
WORDS = "the cat sat on the mat and the dog ran to the house"
PATIENCE_S = 4 * WAIT_S
MARGIN = 1e-3


@contextlib.contextmanager
def serving(model, *options):
    """A server program, and a client of it; it is ready."""
    code = "from optiq.cli.main import run; run()"
    command = [sys.executable, "-c", code, "serve", "--model", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watchdog = threading.Timer(4 * PATIENCE_S, process.kill)
    watchdog.start()
    try:
        url = process.stdout.readline().strip()
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            until(lambda: client.get("/ready").status_code == 200)
            yield process, client
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client():
    with serving(gemma4.TARGET, "--max-context", str(CONTEXT)) as (_, found):
        yield found
        assert found.get("/ready").status_code == 200


@pytest.fixture(scope="module")
def engine():
    """The same model in this process."""
    return optiq.load(gemma4.TARGET)


def asked(client, path=CHAT, **body):
    """The answer to a body, to which the least that a route needs is added."""
    least = {"messages": USER} if path == CHAT else {"prompt": WORDS}
    answer = client.post(path, json={"max_tokens": 8, "seed": 1} | least | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer):
    (choice,) = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def events(client, path=CHAT, **body):
    """The data of a stream, which ends as it has to."""
    least = {"messages": USER} if path == CHAT else {"prompt": WORDS}
    with client.stream("POST", path, json={"max_tokens": 8} | least | body | {"stream": True}) as a:
        assert a.status_code == 200
        lines = [line[6:] for line in a.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# -- requests that kill or fool other servers ------------------------------------------------------


def test_a_list_of_prompts_is_as_each_alone(client):
    both = asked(client, TEXT, prompt=["hi", WORDS], temperature=0)["choices"]
    alone = [asked(client, TEXT, prompt=prompt, temperature=0) for prompt in ("hi", WORDS)]
    assert [choice["text"] for choice in both] == [text_of(answer) for answer in alone]


def test_a_prompt_that_is_an_earlier_prompt_and_its_answer(client):
    ids = client.post("/tokenize", json={"prompt": "the old house"}).json()["tokens"]
    first = asked(client, TEXT, prompt=ids, temperature=0, logprobs=0, max_tokens=4)
    names = first["choices"][0]["logprobs"]["tokens"]
    assert len(names) == 4
    whole = client.post("/tokenize", json={"prompt": "the old house" + text_of(first)})
    again = [asked(client, TEXT, prompt=whole.json()["tokens"], temperature=0) for _ in range(2)]
    assert text_of(again[0]) == text_of(again[1])
    assert cached(again[1]) == len(whole.json()["tokens"]) - 1  # one is read for its logits


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (CHAT, {"stop": [1]}, "stop[0]"),
        (CHAT, {"logit_bias": {"99999999": 5}}, None),
        (CHAT, {"logit_bias": {"512": 5}}, None),
        (TEXT, {"logit_bias": {"-1": 5}}, "logit_bias.-1"),
        (TEXT, {"prompt": [99999999]}, None),
        (TEXT, {"prompt": [[1], [512]]}, None),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"best_of": 2}, "best_of"),
        (CHAT, {"response_format": {"type": "regex", "pattern": "(a"}}, None),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_cannot_be_is_refused(client, path, given, param):
    least = {"messages": USER} if path == CHAT else {"prompt": WORDS}
    answer = client.post(path, json=least | given)
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
    assert client.get("/ready").status_code == 200


def test_null_is_as_if_nothing_was_given(client):
    names = ("temperature", "top_p", "stop", "logit_bias", "n", "response_format", "stream_options")
    least = {"messages": USER, "max_tokens": 8, "seed": 3}
    bare, nulls = (
        client.post(CHAT, json=least | given).json() for given in ({}, dict.fromkeys(names))
    )
    assert text_of(bare) == text_of(nulls)
    assert asked(client, TEXT, max_tokens=None)["usage"]["completion_tokens"] <= 16
    assert events(client, stream_options={})


def test_choices_differ_and_their_prompt_counts_once(client):
    answer = asked(client, n=2, temperature=1)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 2
    assert answer["usage"]["prompt_tokens"] == asked(client)["usage"]["prompt_tokens"]


def test_a_schema_binds(client):
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "light", "schema": schema}}
    answer = asked(client, response_format=wanted, max_tokens=64)
    assert json.loads(text_of(answer))["on"] in {True, False}
    streamed = events(client, response_format=wanted, max_tokens=64, seed=1)
    parts = [event["choices"][0]["delta"].get("content") or "" for event in streamed]
    assert "".join(parts) == text_of(answer)


def test_a_call_is_written_where_one_is_required(client):
    answer = asked(client, tools=[TOOL], tool_choice="required", max_tokens=64)
    (choice,) = answer["choices"]
    call = choice["message"]["tool_calls"][0]["function"]
    assert choice["finish_reason"] == "tool_calls"
    assert (call["name"], set(json.loads(call["arguments"]))) == ("light", {"on"})


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_tokens", [True, False])
def test_a_text_is_scored_as_in_process(client, engine, max_tokens, as_tokens):
    ids = client.post("/tokenize", json={"prompt": WORDS}).json()["tokens"]
    prompt = ids if as_tokens else WORDS
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0}
    answer = asked(client, TEXT, max_tokens=max_tokens, **body)
    found = answer["choices"][0]["logprobs"]
    want = engine.prompt_logprobs(ids, top=1)
    assert len(found["token_logprobs"]) == len(ids) + max_tokens
    assert found["token_logprobs"][0] is want[0] is None
    scores = [one.logprob for one in want[1:]]
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(scores, abs=1e-3)
    best = [max(top.values()) for top in found["top_logprobs"][1 : len(ids)]]
    assert best == pytest.approx([max(one.top[0][1], one.logprob) for one in want[1:]], abs=1e-3)


def test_tokens_go_there_and_back(client):
    made = client.post("/tokenize", json={"prompt": WORDS}).json()
    text = client.post("/detokenize", json={"tokens": made["tokens"]}).json()["prompt"]
    assert text.removeprefix("<bos>") == WORDS
    chat = client.post("/tokenize", json={"messages": USER}).json()
    assert chat["count"] == asked(client)["usage"]["prompt_tokens"]


def test_embeddings_are_those_of_the_engine(client, engine):
    body = {"input": [WORDS, "hi"], "encoding_format": "float"}
    found = client.post("/v1/embeddings", json=body).json()["data"]
    for one, want in zip(found, engine.embed([WORDS, "hi"]), strict=True):
        assert one["embedding"] == pytest.approx(want.tolist(), abs=1e-4)


# -- many at a time --------------------------------------------------------------------------------


def test_a_seed_gives_the_same_alone_and_among_others(client):
    body = {"temperature": 1, "seed": 11, "max_tokens": 12, "logprobs": True, "top_logprobs": 20}
    alone = asked(client, **body)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        others = [pool.submit(asked, client, TEXT, prompt=f"{i} x", seed=i) for i in range(15)]
        among = pool.submit(asked, client, **body).result()
        assert len({text_of(other.result()) for other in others}) > 1
    pairs = zip(tokens_of(alone), tokens_of(among), strict=True)
    first = next(((a, b) for a, b in pairs if a["bytes"] != b["bytes"]), None)
    if first is not None:  # a draw on the edge between two tokens may fall to either side
        assert first[0]["logprob"] == pytest.approx(first[1]["logprob"], abs=MARGIN)


def tokens_of(answer):
    return answer["choices"][0]["logprobs"]["content"]


def test_a_stream_goes_on_when_another_is_left(client):
    endless = {"max_tokens": 400, "logit_bias": no_end(client), "stream": True, "prompt": WORDS}
    with client.stream("POST", TEXT, json=endless) as one:
        lines = one.iter_lines()
        next(lines)
        with client.stream("POST", TEXT, json=endless | {"seed": 2}) as other:
            next(other.iter_lines())
        until(lambda: gauge(client, "running") <= 1)  # the other one was left
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
    assert 'outcome="cancelled"' in client.get("/metrics").text


def no_end(client):
    """Biases against the tokens that end an answer."""
    found = client.post("/tokenize", json={"prompt": "<eos><turn|><|tool_response>"}).json()
    return {str(token): -100 for token in found["tokens"][1:]}


def gauge(client, name):
    return float(
        re.search(rf"^optiq:num_requests_{name} (\S+)", client.get("/metrics").text, re.M)[1]
    )


def test_a_prefix_is_read_once(client):
    talk = [{"role": "system", "content": WORDS * 3}, *USER]
    cold = asked(client, messages=talk, temperature=0)
    warm = asked(client, messages=talk, temperature=0)
    assert cached(cold) < cached(warm) < warm["usage"]["prompt_tokens"]
    assert cached(warm) > warm["usage"]["prompt_tokens"] // 2
    assert text_of(warm) == text_of(cold)


# -- what is too long, in every dialect ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, ("error", "code")),
        (TEXT, {"prompt": LONG}, ("error", "code")),
        (TEXT, {"prompt": [5] * (CONTEXT + 1)}, ("error", "code")),
        ("/v1/responses", {"input": LONG}, ("error", "code")),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": LONG}], "max_tokens": 8},
            ("error", "type"),
        ),
        ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}, ("error",)),
        ("/api/generate", {"prompt": LONG}, ("error",)),
    ],
)
def test_a_prompt_that_is_too_long(client, path, body, where):
    answer = client.post(path, json={"model": "default_model"} | body)
    assert answer.status_code == 400
    said = answer.json()
    for name in where:
        said = said[name]
    assert said in {"context_length_exceeded", "invalid_request_error"} or "context" in said
    assert "context" in answer.text


# -- its end ---------------------------------------------------------------------------------------

NEVER, NEVER_TEXT = 510, "<audio|>"  # a token that the checkpoint suppresses
STREAMS = {
    CHAT: ({"messages": USER}, "data: [DONE]", '"error"'),
    TEXT: ({"prompt": WORDS, "max_tokens": 50_000}, "data: [DONE]", '"error"'),
    "/v1/responses": ({"input": "Hi"}, "data: ", "response.failed"),
    "/v1/messages": ({"messages": USER, "max_tokens": 50_000}, "data: ", '"error"'),
    "/api/chat": ({"messages": USER}, '{"error"', '"error"'),
}
"""Route -> body, how the last line begins, and what is in the lines of a stream that failed."""


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """The same model, which ends no answer."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(gemma4.TARGET, folder)
    for name, values in {
        "config.json": {"eos_token_id": NEVER},
        "generation_config.json": {"eos_token_id": NEVER},
        "tokenizer_config.json": {"eos_token": NEVER_TEXT},
    }.items():
        given = json.loads((folder / name).read_text())
        for part in (given, given.get("text_config", {})):
            part |= values | ({"max_position_embeddings": 60_000} if name == "config.json" else {})
        (folder / name).write_text(json.dumps(given))
    return folder


def under_load(pool, client):
    """A stream on every route, all of which have begun; their lines are read to the end."""
    begun = [threading.Event() for _ in STREAMS]
    reading = [
        pool.submit(read_to_the_end, client, path, event)
        for path, event in zip(STREAMS, begun, strict=True)
    ]
    until(lambda: all(one.is_set() for one in begun) or any(one.done() for one in reading))
    assert not any(one.done() for one in reading)
    return reading


def read_to_the_end(client, path, begun):
    body = {"model": "default_model", "stream": True} | STREAMS[path][0]
    with client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        lines = []
        for line in answer.iter_lines():
            lines += [line] if line else []
            if len(lines) > 8:
                begun.set()
    return lines


def assert_failed(path, lines):
    """A stream that was cut off: it says so in its own words, and its JSON is whole."""
    _, last, fault = STREAMS[path]
    assert lines[-1].startswith(last)
    assert any(fault in line for line in lines[-3:])
    for line in lines:
        data = line.removeprefix("data: ")
        if data != "[DONE]" and not line.startswith(("event: ", ":")):
            json.loads(data)


def test_streams_of_every_protocol_end_at_sigterm(endless_model):
    with (
        serving(endless_model, "--drain", "0.2") as (process, client),
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        reading = under_load(pool, client)
        process.send_signal(signal.SIGTERM)
        for path, one in zip(STREAMS, reading, strict=True):
            assert_failed(path, one.result(PATIENCE_S))
        assert process.wait(PATIENCE_S) == 0


def test_the_death_of_the_engine_ends_streams_and_is_survived(endless_model):
    with (
        serving(endless_model, "--drain", "0.2") as (process, client),
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        reading = under_load(pool, client)
        os.kill(engine_of(process), signal.SIGKILL)
        for path, one in zip(STREAMS, reading, strict=True):
            assert_failed(path, one.result(PATIENCE_S))
        assert client.get("/health").status_code == 200
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post(TEXT, json={"prompt": WORDS}).status_code == 200
        assert "optiq:engine_restarts_total 1.0" in client.get("/metrics").text


def engine_of(process):
    """Number of the engine process of a server: its only child."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    (number,) = found.stdout.split()
    return int(number)


# -- the small Gemma-4 that was trained ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """Its directory."""
    folder = tmp_path_factory.mktemp("trained")
    with tarfile.open(shared / "assets" / "gemma4-small" / "weights.tar.xz", "r|xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "it-qat-q4_0-unquantized"


@pytest.mark.assets
def test_history_goes_on_from_the_tokens_of_the_turn(shared, trained):
    """After a result of a tool nothing is read again; after the user's next turn, as templated."""
    tokenizer = tokenizer_of(trained, {})
    file = shared / "assets" / "gemma4-small" / "eval" / "tools.jsonl"
    items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first = [item for item in items if all(m["role"] != "tool" for m in item["messages"])][:4]
    with serving(trained) as (_, client):
        for item in first:
            tools, talk = item["tools"], item["messages"]
            given = {"messages": talk, "tools": tools, "max_tokens": 200}
            answer = asked(client, **given, temperature=0, logprobs=True)
            message = answer["choices"][0]["message"]
            result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"]}
            talk = [*talk, message, result | {"content": '{"result": 5}'}]
            written = [token["token"] for token in tokens_of(answer)]
            names, _ = read_as(client, item["messages"], tools)
            names_after, _ = read_as(client, talk, tools)
            assert names_after[: len(names) + len(written)] == names + written
            last = asked(client, messages=talk, tools=tools, max_tokens=64, temperature=0)
            assert cached(last) >= len(names) + len(written) - 1
            talk = [*talk, last["choices"][0]["message"], {"role": "user", "content": "Thanks"}]
            _, ids = read_as(client, talk, tools)
            assert ids == tokenizer.apply_chat_template(
                [templated(turn) for turn in talk],
                tools=tools,
                add_generation_prompt=True,
                enable_thinking=False,
            )


def read_as(client, messages, tools):
    """The texts of the tokens of a conversation, and their ids."""
    body = {"messages": messages, "tools": tools, "return_token_strs": True}
    made = client.post("/tokenize", json=body).json()
    return made["token_strs"], made["tokens"]


def templated(turn):
    """A message as templates have it: JSON texts are values."""
    turn = {"content": ""} | {name: value for name, value in turn.items() if value is not None}
    if turn["role"] == "tool":
        turn["content"] = json.loads(turn["content"])
    for call in turn.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return turn
