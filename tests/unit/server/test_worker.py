"""The turns of the engine process, in this process."""

import dataclasses
import io
import queue

import numpy as np
import pytest
from PIL import Image

from optiq.engine.events import Finished, TokenLogprob
from optiq.engine.scheduler import Limits
from optiq.errors import EngineFailure, RequestRejected
from optiq.events import no_emit
from optiq.server.catalog import Catalog
from optiq.server.jobs import (
    Counted,
    CountJob,
    Detokenized,
    DetokenizeJob,
    Embedded,
    EmbedJob,
    GenerateJob,
    Piece,
    Said,
    Started,
    Written,
)
from optiq.server.messages import Begin, Cancel, Models, Report, WorkerOptions
from optiq.server.shelf import Shelf
from optiq.server.worker import Worker
from tests.gemma4 import TARGET
from tests.tiny import tiny_checkpoint

END = 258
TURNS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of about one size."""
    found = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3"):
        tiny_checkpoint(found, family)
    return found


class Bench:
    """A worker, what goes in and what came out."""

    def __init__(self, folder, **options):
        self.inbox, self.sent = queue.SimpleQueue(), []
        entries = Catalog.of([folder]).entries
        self.shelf = Shelf(entries, WorkerOptions(**options), no_emit, lambda name: None)
        self.worker = Worker(self.shelf, self.inbox, self.sent.append)
        self.worker.ready()

    def put(self, number, job):
        self.inbox.put(Begin(number, job))

    def parts(self, number):
        """All that came for a job."""
        reports = [message for message in self.sent if isinstance(message, Report)]
        return [part for report in reports for part in report.parts if part.number == number]

    def replies(self, number):
        return [reply for part in self.parts(number) for reply in part.replies]

    def ended(self, number):
        return any(part.ended for part in self.parts(number))

    def run(self, *numbers):
        """Turn until jobs have ended."""
        for _ in range(TURNS):
            if all(self.ended(number) for number in numbers):
                return
            self.worker.turn()
        raise AssertionError(f"not ended after {TURNS} turns")

    def error(self, number):
        """Why a job failed."""
        self.run(number)
        return self.parts(number)[-1].error


@pytest.fixture
def bench(folder):
    """A worker with one model in memory."""
    return Bench(folder)


def job(prompt="Hello", tokens=8, model="llama", **fields):
    """A job of a given length."""
    sampling = {"seed": 1, "max_tokens": tokens, "logit_bias": {END: -100}}
    return GenerateJob(model, prompt, sampling=sampling, **fields)


def test_first_message_is_of_the_models(bench):
    assert isinstance(bench.sent[0], Models)
    assert [(card.name, card.loaded) for card in bench.sent[0].cards] == [
        ("llama", True),
        ("qwen3", False),
    ]


def test_a_step_is_one_message(bench):
    for number in range(5):
        bench.put(number, job(tokens=20))
    bench.run(*range(5))
    reports = [message for message in bench.sent if isinstance(message, Report)]
    written = [
        sum(isinstance(r, Written) for part in report.parts for r in part.replies)
        for report in reports
    ]
    assert written.count(5) >= 18
    assert sum(written) == 100
    for number in range(5):
        replies = bench.replies(number)
        assert replies[0] == Started(5)
        assert isinstance(replies[-1], Said)
        assert isinstance(replies[-1].event, Finished)
        assert [part.ended for part in bench.parts(number)].index(True) == (
            len(bench.parts(number)) - 1
        )


def test_steps_are_counted(bench):
    bench.put(0, job(tokens=20))
    bench.run(0)
    loads = [message.load for message in bench.sent if isinstance(message, Report) and message.load]
    assert sum(load.steps for load in loads) >= 20
    assert sum(load.step_seconds for load in loads) > 0
    assert loads[-1].active_memory_bytes > 0


def test_a_cancelled_job_ends_before_the_next_step(bench):
    bench.put(0, job(tokens=400))
    for _ in range(5):
        bench.worker.turn()
    before = len(bench.parts(0))
    assert before > 1
    bench.inbox.put(Cancel(0))
    bench.put(1, CountJob(job()))
    bench.worker.turn()
    assert len(bench.parts(0)) == before
    assert bench.shelf.loaded[0].engine.idle
    bench.run(1)
    assert bench.shelf.loaded[0].num_tasks == 0


def test_a_job_cancelled_while_its_prompt_is_read_ends_too(folder):
    bench = Bench(folder, limits=Limits(prefill_tokens=16))
    bench.put(0, job("a" * 400))
    bench.worker.turn()
    assert not any(isinstance(reply, Written) for reply in bench.replies(0))
    bench.inbox.put(Cancel(0))
    bench.put(1, job(tokens=2))
    bench.run(1)
    assert not any(isinstance(reply, Written) for reply in bench.replies(0))


def test_cancelling_what_is_not_there_is_nothing(bench):
    bench.inbox.put(Cancel(99))
    bench.put(0, job())
    bench.inbox.put(Cancel(0))
    bench.put(1, job())
    bench.run(1)
    assert bench.parts(0) == []


def test_a_job_waits_for_the_memory_of_a_busy_model_and_those_behind_it_wait_too(folder):
    bench = Bench(folder, memory_limit="2MB")  # room for one
    bench.put(0, job(tokens=30))
    bench.put(1, job(model="qwen3"))
    bench.put(2, job(tokens=3))
    bench.run(0, 1, 2)
    ends = [part.number for m in bench.sent if isinstance(m, Report) for part in m.parts]
    assert list(dict.fromkeys(ends)) == [0, 1, 2]
    loaded = [
        [card.name for card in message.cards if card.loaded]
        for message in bench.sent
        if isinstance(message, Models)
    ]
    assert loaded == [["llama"], ["qwen3"], ["llama"]]


def test_two_models_write_side_by_side(bench):
    bench.put(0, job(tokens=30))
    bench.put(1, job(tokens=30, model="qwen3"))
    bench.run(0, 1)
    both = [
        {part.number for part in message.parts}
        for message in bench.sent
        if isinstance(message, Report)
    ]
    assert both.count({0, 1}) > 20


def test_an_idle_model_is_unloaded(folder):
    bench = Bench(folder, idle_unload_s=0.05)
    bench.put(0, job())
    bench.run(0)
    bench.worker.turn()  # waits until there is something to unload
    assert bench.shelf.loaded == []
    cards = [message.cards for message in bench.sent if isinstance(message, Models)][-1]
    assert not any(card.loaded for card in cards)
    bench.put(1, job())
    bench.run(1)
    assert len(bench.replies(1)) > 8


def test_a_text_is_put_into_tokens_and_back(bench):
    bench.put(0, CountJob(job("Hé")))
    bench.put(1, DetokenizeJob("llama", (39, 256)))
    bench.run(0, 1)
    (counted,) = bench.replies(0)
    assert isinstance(counted, Counted)
    assert b"".join(piece.data for piece in counted.tokens) == "Hé".encode()
    assert bench.replies(1) == [Detokenized("H<|endoftext|>")]


class Reader:
    """An engine that reads texts in steps, around one that writes."""

    def __init__(self, engine):
        self._engine, self.prompts = engine, self

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def plain(self, text):
        return tuple(text.encode())

    def embed_steps(self, inputs):
        for _ in inputs:
            yield
        return [np.array([0.6, 0.8, 0.0], np.float32) for _ in inputs]  # noqa: B901

    def prompt_logprob_steps(self, tokens, images, *, top):
        for _ in tokens:
            yield
        rest = [TokenLogprob(token, -1.0, ((7, -0.5),) * top) for token in tokens[1:]]
        return [None, *rest]  # noqa: B901


@pytest.fixture
def reading(bench):
    """A worker whose engine reads."""
    bench.shelf.loaded[0].engine = Reader(bench.shelf.loaded[0].engine)
    return bench


def test_texts_are_embedded_between_steps(reading):
    reading.put(0, job(tokens=30))
    reading.worker.turn()
    reading.put(1, EmbedJob("llama", ("ab", (1, 2), "c"), 2))
    before = len(reading.parts(0))
    reading.run(1)
    assert len(reading.parts(0)) - before >= 3
    (value,) = reading.replies(1)
    assert isinstance(value, Embedded)
    assert value.prompt_tokens == 5
    assert [pytest.approx(vector) for vector in value.vectors] == [(0.6, 0.8)] * 3
    reading.put(2, EmbedJob("llama", ("ab",), 1))
    reading.run(2)
    assert reading.replies(2)[0].vectors == ((1.0,),)
    reading.put(3, EmbedJob("llama", ("ab",), 4))
    assert reading.error(3).param == "dimensions"


def test_an_embedding_can_be_cancelled(reading):
    reading.put(0, EmbedJob("llama", ("a",) * 500))
    reading.worker.turn()
    reading.inbox.put(Cancel(0))
    reading.put(1, job())
    reading.run(1)
    assert reading.parts(0) == []
    assert reading.shelf.loaded[0].num_tasks == 0


def test_echo_gives_the_prompt(bench):
    bench.put(0, job("Hi!", echo=True))
    bench.run(0)
    assert bench.replies(0)[0].prompt == tuple(Piece(ord(c) - 33, c.encode()) for c in "Hi!")


def test_echo_with_log_probabilities_comes_before_the_answer(reading):
    asked = job("Hi!", tokens=3, echo=True)
    sampling = dict(asked.sampling) | {"logprobs": True, "top_logprobs": 1}
    reading.put(0, dataclasses.replace(asked, sampling=sampling))
    reading.run(0)
    started, *rest = reading.replies(0)
    assert [piece.logprob for piece in started.prompt] == [None, -1.0, -1.0]
    assert started.prompt[1].top == ((7, b"(", -0.5),)
    assert sum(isinstance(reply, Written) for reply in rest) == 3


def test_a_picture_comes_as_bytes():
    bench = Bench(TARGET)
    data = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(data, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    asked = ({"role": "user", "content": content},)
    bench.put(0, GenerateJob("target", asked, (data.getvalue(),), sampling={"max_tokens": 2}))
    bench.put(1, CountJob(GenerateJob("target", asked, (data.getvalue(),))))
    bench.put(2, GenerateJob("target", asked, (b"no picture",)))
    bench.run(0, 1)
    counted = bench.replies(1)[0]
    assert bench.replies(0)[0] == Started(counted.num_tokens)
    assert counted.num_tokens > 20
    assert "is no image" in str(bench.error(2))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (job(({"role": "user"},)), "content is missing"),
        (job(({"role": "user", "content": "a"},), tools=({"type": "x"},)), "tools"),
        (job(thinking=True), "thinking"),
        (job(images=(b"not a picture",)), "images"),
        (job(""), "empty"),
    ],
)
def test_what_the_engine_refuses_is_refused(bench, bad, words):
    bench.put(0, bad)
    error = bench.error(0)
    assert isinstance(error, RequestRejected)
    assert error.http_status == 400
    assert words in str(error)
    assert bench.shelf.loaded[0].num_tasks == 0


def test_a_surprise_of_one_request_is_its_own(bench):
    bench.put(0, job(tokens=30))
    bench.put(1, job(object()))
    assert isinstance(bench.error(1), EngineFailure)
    bench.run(0)
    assert bench.parts(0)[-1].error is None
