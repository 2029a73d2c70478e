"""The supervisor with a real engine process, whole and broken."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import optiq
from optiq.engine.events import Finished, TextDelta, collect
from optiq.engine.scheduler import Limits
from optiq.errors import EngineFailure, RequestRejected, UsageError
from optiq.server.catalog import Catalog
from optiq.server.jobs import (
    CountJob,
    DetokenizeJob,
    GenerateJob,
    Said,
    Started,
    Written,
)
from optiq.server.messages import WorkerOptions
from optiq.server.supervisor import Supervisor, SupervisorOptions
from tests.tiny import tiny_checkpoint

FAULTY = (sys.executable, str(Path(__file__).parent / "faulty.py"))
PATIENCE_S = 120
END = 258  # the token that ends an answer
RUNNING, QUEUE = 4, 4
WORKER = WorkerOptions(limits=Limits(running=RUNNING))
OPTIONS = SupervisorOptions(worker=WORKER, max_queue=QUEUE, restarts=50)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models in one directory."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3"):
        tiny_checkpoint(folder, family, max_position_embeddings=100_000)
    return folder


@pytest.fixture(scope="module")
def runner():
    """The event loop of the module."""
    with asyncio.Runner() as found:
        yield found


@pytest.fixture(scope="module")
def started(folders, runner):
    """A supervisor of an engine process that can fail."""
    supervisor = Supervisor(Catalog.of([folders]), OPTIONS, command=FAULTY)
    runner.run(asyncio.wait_for(supervisor.start(), PATIENCE_S))
    yield supervisor
    runner.run(supervisor.close())


@pytest.fixture
def engine(started, runner):
    """The same for one test, which may change its options; ready, and idle at the end."""
    runner.run(until(lambda: started.ready()[0]))
    yield started
    started._options, started._draining = OPTIONS, False
    runner.run(until(lambda: not started._answers))


async def until(condition):
    """Wait for a condition."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def job(prompt="Hello", tokens=8, model="llama", **fields):
    """A job of a given length."""
    sampling = {"seed": 1, "max_tokens": tokens, "logit_bias": {END: -100}}
    return GenerateJob(model, prompt, sampling=sampling | fields.pop("sampling", {}), **fields)


def endless(prompt="Hello"):
    """A job that does not end by itself within a test."""
    return job(prompt, tokens=90_000)


async def read(stream):
    """Everything that a stream gives."""
    async with asyncio.timeout(PATIENCE_S):
        return [reply async for reply in stream]


async def asked(supervisor, request):
    """Everything that a job gives."""
    return await read(supervisor.submit(request))


async def begun(stream):
    """Read until something was written."""
    async with asyncio.timeout(PATIENCE_S):
        async for reply in stream:
            if isinstance(reply, Written):
                return


def tokens_of(replies, choice=0):
    """Tokens of an answer."""
    return [
        piece.token
        for reply in replies
        if isinstance(reply, Written) and reply.choice == choice
        for piece in reply.pieces
    ]


def change(supervisor, **options):
    """Give a supervisor other limits."""
    supervisor._options = dataclasses.replace(supervisor._options, **options)


# -- answers ---------------------------------------------------------------------------------------


def test_answer_is_that_of_the_engine(engine, runner, folders):
    replies = runner.run(asked(engine, job(tokens=20)))
    assert isinstance(replies[0], Started)
    assert replies[0].prompt_tokens == 5
    assert isinstance(replies[-1], Said)
    assert isinstance(replies[-1].event, Finished)
    model = optiq.load(folders / "llama")
    alone = model.generate("Hello", seed=1, max_tokens=20, logit_bias={END: -100}).result()
    assert tokens_of(replies) == list(alone.token_ids)
    events = collect([reply.event for reply in replies if isinstance(reply, Said)])
    assert events.text == alone.text


def test_pieces_are_the_bytes_of_the_text(engine, runner):
    replies = runner.run(asked(engine, job(sampling={"logprobs": True, "top_logprobs": 2})))
    pieces = [p for reply in replies if isinstance(reply, Written) for p in reply.pieces]
    texts = [
        reply.event.text
        for reply in replies
        if isinstance(reply, Said) and isinstance(reply.event, TextDelta)
    ]
    ordinary = b"".join(piece.data for piece in pieces if piece.token < 256)
    assert ordinary.decode("utf-8", "replace").replace("\ufffd", "") == "".join(texts).replace(
        "\ufffd", ""
    )
    assert all(len(piece.top) == 2 and piece.logprob <= 0 for piece in pieces)


def test_choices_are_told_apart(engine, runner):
    replies = runner.run(asked(engine, job(choices=3)))
    assert sum(isinstance(reply, Started) for reply in replies) == 1
    answers = [tokens_of(replies, choice) for choice in range(3)]
    assert [len(answer) for answer in answers] == [8, 8, 8]
    assert len({tuple(answer) for answer in answers}) == 3


def test_echo_gives_the_prompt(engine, runner):
    replies = runner.run(asked(engine, job("Hi!", echo=True)))
    assert b"".join(piece.data for piece in replies[0].prompt) == b"Hi!"


def test_a_prompt_is_counted_and_tokens_are_text(engine, runner):
    messages = ({"role": "user", "content": "Hi"},)
    counted = runner.run(engine.count(CountJob(job(messages))))
    assert b"".join(piece.data for piece in counted.tokens).startswith(b"<|im_start|>user\nHi")
    assert counted.num_tokens == len(counted.tokens)
    ids = tuple(piece.token for piece in counted.tokens)
    text = runner.run(engine.detokenize(DetokenizeJob("llama", ids))).text
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_another_model_is_loaded_when_it_is_asked_for(engine, runner):
    runner.run(asked(engine, job(model="qwen3")))
    assert {card.name for card in engine.models() if card.loaded} >= {"qwen3"}
    assert "qwen3" in engine.snapshot().loaded


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "status", "code"),
    [
        (job(model="other"), 404, "model_not_found"),
        (job(sampling={"temperature": -1}), 400, None),
        (job(sampling={"colour": 1}), 400, None),
        (job("a" * 100_000), 400, "context_length_exceeded"),
        (job("a" * 10_000_000), 400, "context_length_exceeded"),
        (job(({"role": "user", "content": [{"type": "image"}]},), images=(b"x",)), 400, None),
        (job(({"role": "user", "content": [{"type": "image", "image": "/a.png"}]},)), 400, None),
    ],
)
def test_what_is_not_possible_is_refused(engine, runner, bad, status, code):
    with pytest.raises(RequestRejected) as caught:
        runner.run(asked(engine, bad))
    assert (caught.value.http_status, caught.value.code) == (status, code)


def test_what_is_nested_too_deeply_is_refused(engine, runner):
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(RequestRejected, match="nested"):
        runner.run(asked(engine, job(tools=(deep,))))
    while deep:  # so that it is not taken apart recursively
        deep = deep["a"]


def test_a_token_that_there_is_not_is_refused(engine, runner):
    with pytest.raises(RequestRejected, match="999"):
        runner.run(engine.detokenize(DetokenizeJob("llama", (999,))))


# -- limits ----------------------------------------------------------------------------------------


def test_cancelled_answers_make_room_for_others(engine, runner):
    async def scene():
        streams = [engine.submit(endless()) for _ in range(RUNNING)]
        for stream in streams:
            await begun(stream)
        for stream in streams:
            stream.cancel()
            stream.cancel()
            assert await read(stream) == []
        replies = await read(engine.submit(job()))  # else it would wait for them all
        assert len(tokens_of(replies)) == 8

    runner.run(scene())


def test_an_answer_that_takes_too_long_is_ended(engine, runner):
    change(engine, request_timeout_s=0.5)
    with pytest.raises(RequestRejected) as caught:
        runner.run(asked(engine, endless()))
    assert (caught.value.http_status, caught.value.code) == (504, "timeout")
    assert engine.snapshot().running == 0


def test_a_full_queue_refuses(engine, runner):
    async def scene():
        streams = [engine.submit(endless()) for _ in range(RUNNING + QUEUE)]
        with pytest.raises(RequestRejected) as caught:
            engine.submit(job())
        assert (caught.value.http_status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after_s >= 1
        streams.pop().cancel()
        streams.append(engine.submit(endless()))
        for stream in streams:
            stream.cancel()

    runner.run(scene())


def test_a_reader_who_does_not_read_is_cut_off(engine, runner):
    async def scene():
        change(engine, buffer_bytes=100_000)  # more than the quick answer takes in all
        stalled, quick = engine.submit(endless()), engine.submit(job(tokens=300))
        replies = await read(quick)
        assert len(tokens_of(replies)) == 300
        await until(lambda: stalled.outcome is not None)
        with pytest.raises(RequestRejected) as caught:
            await read(stalled)
        assert caught.value.code == "slow_reader"
        assert not stalled._kept

    runner.run(scene())


def test_draining_lets_answers_end_and_cuts_off_the_rest(engine, runner):
    async def scene():
        short, long = engine.submit(job()), engine.submit(endless())
        await begun(long)
        drain = asyncio.create_task(engine.drain(3600))
        await asyncio.sleep(0)
        assert not engine.ready()[0]
        with pytest.raises(RequestRejected) as caught:
            engine.submit(job())
        assert caught.value.http_status == 503
        assert len(tokens_of(await read(short))) == 8
        drain.cancel()
        assert await engine.drain(0.1) == 1
        with pytest.raises(RequestRejected, match="shutting down"):
            await read(long)
        assert (short.outcome, long.outcome) == ("finished", "cut")
        assert await engine.drain(3600) == 0

    runner.run(scene())


# -- faults ----------------------------------------------------------------------------------------


def test_a_fault_of_one_answer_ends_that_answer(engine, runner):
    async def scene():
        other = engine.submit(endless())
        await begun(other)
        with pytest.raises(EngineFailure, match="this sequence is broken"):
            await read(engine.submit(endless("FAIL")))
        await begun(other)
        other.cancel()

    restarts = engine.snapshot().restarts
    runner.run(scene())
    assert engine.snapshot().restarts == restarts


def broken(engine, runner, harm):
    """Break the engine process beside an answer that runs; why that ended."""

    async def scene():
        running = engine.submit(endless())
        await begun(running)
        harm()
        await until(lambda: not engine.ready()[0])
        next_one = engine.submit(job())  # waits for the next process
        with pytest.raises(EngineFailure) as caught:
            await read(running)
        replies = await read(next_one)
        assert len(tokens_of(replies)) == 8
        assert engine.ready() == (True, "ready")
        return str(caught.value)

    restarts = engine.snapshot().restarts
    why = runner.run(scene())
    assert engine.snapshot().restarts == restarts + 1
    return why


def test_a_killed_process_is_started_again(engine, runner):
    pid = engine._child.pid
    assert "SIGKILL" in broken(engine, runner, lambda: os.kill(pid, signal.SIGKILL))


def test_a_broken_loop_is_started_again(engine, runner):
    why = broken(engine, runner, lambda: engine.submit(job("CRASH")))
    assert "the loop is broken" in why


def test_a_step_that_hangs_is_noticed(engine, runner):
    change(engine, step_timeout_s=5)
    assert "a step took more than" in broken(engine, runner, lambda: engine.submit(job("HANG")))


def test_every_request_ends_in_one_way_and_they_add_up(engine, runner):
    draw = random.Random(7)
    change(engine, request_timeout_s=2.0)
    before = engine.snapshot()

    async def client(number):
        await asyncio.sleep(draw.random())
        kind = draw.choice(["plain", "plain", "cancel", "bad", "fail", "count", "endless"])
        seen = "finished"
        try:
            if kind == "count":
                await engine.count(CountJob(job()))
                return seen
            prompt = {"bad": "a" * 100_000, "fail": "FAIL now"}.get(kind, "Hello")
            stream = engine.submit(job(prompt, 90_000 if kind == "endless" else 1 + number % 9))
            count = 0
            async for reply in stream:
                count += isinstance(reply, Written)
                if kind == "cancel" and count == 1:
                    break
            seen = "finished" if stream.outcome == "finished" else "cancelled"
            stream.cancel()
        except RequestRejected as error:
            return {429: "refused", 504: "timeout"}.get(error.http_status, "rejected")
        except EngineFailure:
            return "failed"
        return seen

    async def scene():
        return await asyncio.gather(*(client(number) for number in range(200)))

    seen = runner.run(scene())
    after = engine.snapshot()
    assert after.submitted - before.submitted == 200
    assert after.queued == after.running == 0
    assert sum(after.outcomes.values()) == after.submitted
    for outcome in set(seen) | set(after.outcomes):
        told = after.outcomes.get(outcome, 0) - before.outcomes.get(outcome, 0)
        assert told == seen.count(outcome), outcome
    assert {"finished", "rejected", "refused"} <= set(seen)


# -- beginning and end -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def supervised(folder, **options):
    """A supervisor of its own, which is not started."""
    options = dataclasses.replace(OPTIONS, **options)
    supervisor = Supervisor(Catalog.of([folder]), options, command=FAULTY)
    try:
        yield supervisor
    finally:
        await supervisor.close()


def test_a_model_that_cannot_be_served_fails_the_start(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(b"nothing")

    async def scene():
        async with supervised(folder) as supervisor:
            await asyncio.wait_for(supervisor.start(), PATIENCE_S)

    with pytest.raises(UsageError, match="cannot be loaded"):
        asyncio.run(scene())


def test_a_program_that_does_not_start_fails_the_start(folders):
    async def scene():
        supervisor = Supervisor(Catalog.of([folders]), OPTIONS, command=("/nowhere/python",))
        waiting = supervisor.submit(job())
        with pytest.raises(EngineFailure, match="/nowhere/python"):
            await supervisor.start()
        with pytest.raises(EngineFailure):
            await read(waiting)
        assert not supervisor.ready()[0]
        await supervisor.close()

    asyncio.run(scene())


def test_requests_wait_for_the_start_and_restarts_have_a_limit(folders):
    async def scene():
        async with supervised(folders / "llama", restarts=1) as supervisor:
            early = supervisor.submit(job())
            start = asyncio.create_task(supervisor.start())
            assert not supervisor.ready()[0]
            assert len(tokens_of(await read(early))) == 8
            await start
            for _ in range(2):
                with pytest.raises(EngineFailure):
                    await read(supervisor.submit(job("CRASH")))
            await until(lambda: supervisor._state == "down")
            is_ready, why = supervisor.ready()
            assert not is_ready
            assert "the loop is broken" in why
            with pytest.raises(RequestRejected) as caught:
                supervisor.submit(job())
            assert caught.value.http_status == 503
            assert supervisor.snapshot().restarts == 1

    asyncio.run(scene())


PARENT = """
import asyncio, sys
from pathlib import Path
from optiq.server.catalog import Catalog
from optiq.server.jobs import GenerateJob
from optiq.server.supervisor import Supervisor

async def main():
    supervisor = Supervisor(Catalog.of([Path(sys.argv[1])]))
    await supervisor.start()
    stream = supervisor.submit(GenerateJob("llama", "Hello", sampling={"logit_bias": {258: -100}}))
    await anext(stream)
    print("started", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_the_engine_process_ends_with_its_parent(folders):
    command = [sys.executable, "-c", PARENT, str(folders / "llama")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with parent:
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
        # the engine process has the same standard error, which ends when both have ended
        parent.communicate(timeout=PATIENCE_S)


def test_http_side_does_without_mlx():
    program = "import sys, optiq.server.supervisor; print(any(m == 'mlx' for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert out.stdout.strip() == b"False"
